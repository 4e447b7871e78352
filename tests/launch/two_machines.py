"""Two machines on one: two network namespaces joined by a virtual cable, with an sshd in each.

Needs root. Everything is temporary: keys, configuration and sshd's files are in one folder, and `ssh` on the machines'
PATH is a wrapper that uses them, so that neither ~/.ssh nor the system's configuration is touched.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from launching import LAUNCHER, environment

PROGRAMS = ("ip", "sshd", "ssh-keygen", "pdsh")
INTERFACE = "cable0"  # the same name at both ends, so that one GLOO_SOCKET_IFNAME serves both
ADDRESSES = ("10.99.0.1", "10.99.0.2")
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"

SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
SSH = """\
#!/bin/sh
exec {ssh} -F none -i {folder}/key -o UserKnownHostsFile={folder}/known_hosts -o StrictHostKeyChecking=accept-new \
-o LogLevel=ERROR "$@"
"""


def what_is_missing() -> str | None:
    """Why two machines cannot be simulated here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "only root on Linux can make network namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install openssh-server pdsh iproute2)"
    probe = f"blipds-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, env={"PATH": SBIN})
    if made.returncode != 0:
        return f"no network namespaces here: {made.stderr.strip()}"
    run("ip", "netns", "del", probe)
    return None


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, "PATH": SBIN}, capture_output=True)


class TwoMachines:
    """`folder` is the working directory on both machines, and holds .deepspeed_env."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"blipds-{os.getpid()}-{end}" for end in "ab")
        self.servers: list[subprocess.Popen[bytes]] = []
        self.programs = folder / "bin"
        (folder / ".deepspeed_env").write_text(
            f"GLOO_SOCKET_IFNAME={INTERFACE}\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nCUDA_VISIBLE_DEVICES=\n"
        )

    def start(self) -> None:
        for name in self.names:
            run("ip", "netns", "add", name)
        a, b = self.names
        run("ip", "link", "add", INTERFACE, "netns", a, "type", "veth", "peer", "name", INTERFACE, "netns", b)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            run("ip", "-n", name, "link", "set", INTERFACE, "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        for key in ("host_key", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key)
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it; a service manager would make it
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self.start_sshd(name, address)
        self.programs.mkdir()
        wrapper = self.programs / "ssh"
        wrapper.write_text(SSH.format(ssh=shutil.which("ssh"), folder=self.folder))
        wrapper.chmod(0o755)

    def start_sshd(self, name: str, address: str) -> None:
        sshd = shutil.which("sshd", path=SBIN)
        options = ["-D", "-f", str(self.folder / "sshd_config"), "-o", f"ListenAddress={address}"]
        log = (self.folder / f"sshd-{address}.log").open("wb")
        self.servers.append(subprocess.Popen([*self.inside(name), str(sshd), *options, "-e"], stderr=log))

    def inside(self, name: str) -> list[str]:
        return [str(shutil.which("ip", path=SBIN)), "netns", "exec", name]

    def environment(self) -> dict[str, str]:
        # pdsh starts the first `ssh` on PATH
        start = f"{self.programs}{os.pathsep}{LAUNCHER.parent}{os.pathsep}{SBIN}"
        return {**environment(), "PATH": start, "DS_ACCELERATOR": "cpu"}

    def popen(self, *command: object, log: Path) -> subprocess.Popen[bytes]:
        """Starts a command on the first machine."""
        return subprocess.Popen(
            [*self.inside(self.names[0]), *map(str, command)],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def run(self, *command: object, timeout: float = 600) -> tuple[int, str]:
        """Runs a command on the first machine to its end; returns its status and all that it printed."""
        log = self.folder / "log"
        process = self.popen(*command, log=log)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not finished after {timeout} s:\n{log.read_text()[-4000:]}") from None
        return status, log.read_text()

    def processes(self, machine: int) -> list[psutil.Process]:
        """What runs on a machine, except its listening sshd."""
        name = self.names[machine]
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, env={"PATH": SBIN})
        found = []
        for pid in map(int, listed.stdout.split()):
            if pid not in [server.pid for server in self.servers] and psutil.pid_exists(pid):
                found.append(psutil.Process(pid))
        return found

    def kill(self) -> None:
        for machine in (0, 1):
            for process in self.processes(machine):
                os.kill(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        self.kill()
        for server in self.servers:
            server.terminate()
            server.wait(10)
        for name in self.names:
            run("ip", "netns", "del", name)  # the cable goes with its ends


@contextmanager
def two_machines(folder: Path) -> Iterator[TwoMachines]:
    machines = TwoMachines(folder)
    try:
        machines.start()
        yield machines
    finally:
        machines.stop()


def until(condition, seconds: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
