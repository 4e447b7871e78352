"""Before a run on several machines: is everything there, and the same, on each?

`run_checks` runs where the command is typed. It starts `python -m blipds.planning.preflight` on every host, over ssh as
DeepSpeed does, and compares the answers. A rank itself never sees the hostfile.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import blipds
from blipds import cli
from blipds.config.run import load_run_config
from blipds.config.sections import Config
from blipds.errors import UserError
from blipds.files.paths import find_config, user_path
from blipds.report.machine import versions

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")  # never asks for a password
ANSWER = "blipds-preflight "  # begins the answer's line: a login shell may print others
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")  # names that DeepSpeed 0.19 hands to the other machines
SAME = {  # what must be the same on all hosts, and how to make it so
    "versions": "install the same everywhere",
    "code": "every host must run the same blipds",
    "config": "run config and DeepSpeed JSON must be the same files",
    "data": "annotations must be the same, at the same path",
}
COPIES = 3  # of a checkpoint: the latest, the best, and the one being written
Hosts = dict[str, int]  # name -> slots


class Check(NamedTuple):
    """One line of the report: what was found, or what is wrong and how to fix it."""

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'failed':8}{self.name:12}{self.text}"


def checked(name: str, function: Callable[..., str], *args: Any) -> Check:
    """A check is a function that returns what it found, or raises a UserError that says what to fix."""
    try:
        return Check(name, True, function(*args))
    except UserError as error:
        return Check(name, False, str(error))


def run_checks(hostfile: Path, words: Sequence[str]) -> Iterator[Check]:
    """All checks of a hostfile and a command, one after the other; ends early where the rest would fail alike."""
    name = "hostfile"
    try:
        hosts, command = read_hostfile(hostfile), parse_command(words)
        variables = exported_variables(dict(os.environ), [Path.home(), Path.cwd()])
        yield Check(name, True, f"{hostfile}: {len(hosts)} hosts, {sum(hosts.values())} slots")
        if words:
            yield checked("command", check_command, hostfile, command)
        name = "ssh"
        remedy = ": ssh must work without a password, and this folder must exist there"
        on_all(hosts, ["true"], {}, 20, remedy)
        yield Check(name, True, "every host answers, without a password")
        name = "python"
        checks = [*compare(hosts, ask(hosts, shared_folder(command), words, variables))]
        yield from checks
        if all(check.good for check in checks):  # it may compile for minutes, and clears an interrupted compile's locks
            name = "ops"
            printed = on_all(hosts, [sys.executable, "-m", "blipds.engine"], variables, 1200)
            removed = sorted({line for text in printed.values() for line in text.splitlines() if "removed" in line})
            yield Check(name, True, "; ".join(["DeepSpeed's parts are compiled on every host", *removed]))
    except UserError as error:
        yield Check(name, False, str(error))


# ---- What the user gives --------------------------------------------------------------------------------------------


def read_hostfile(path: Path) -> Hosts:
    """`NAME slots=N`, one host a line, as DeepSpeed reads it; # starts a comment. UserError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; deepspeed may then run on this machine alone") from None
    hosts: Hosts = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) < 1:
            raise UserError(f"{path}:{number}: '{text}' is not a host; expected NAME slots=N, such as node1 slots=8")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: {match[1]} is listed twice; give all its slots in one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: lists no hosts; expected lines such as node1 slots=8")
    return hosts


def parse_command(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a training command that preflight looks at; the others are ignored."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--hostfile", "-H")
    parser.add_argument("--master_port", default="29500")
    parser.add_argument("--launcher", default="pdsh")
    parser.add_argument("--cfg-path", type=Path)
    parser.add_argument("--ds-config", type=Path)
    parser.add_argument("--options", nargs="*", default=[])
    parser.add_argument("--plugin", action="append", default=[])
    command, _ = parser.parse_known_args(words)
    if not command.master_port.isdigit():
        raise UserError(f"--master_port {command.master_port} is not a number")
    return command


def check_command(hostfile: Path, command: argparse.Namespace) -> str:
    if command.hostfile is None:
        raise UserError(f"it has no --hostfile: deepspeed --hostfile {hostfile} ...")
    if Path(command.hostfile).resolve() != hostfile.resolve():
        raise UserError(f"it says --hostfile {command.hostfile}, but {hostfile} was checked")
    if command.launcher == "pdsh" and shutil.which("pdsh") is None:
        raise UserError("pdsh is not installed on this machine (Debian, Ubuntu: apt-get install pdsh)")
    return f"the same hostfile, started by {command.launcher}"


def exported_variables(environ: dict[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """What DeepSpeed sets on the other machines: variables by name, and the `.deepspeed_env` files of the folders."""
    found = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    for folder in folders:
        path = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
        for number, line in enumerate(lines, start=1):
            name, sign, value = line.partition("=")
            if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                raise UserError(f"{path}:{number}: '{line}' is not NAME=value; DeepSpeed would stop there")
            found[name.strip()] = value.strip()
    return found


def shared_folder(command: argparse.Namespace) -> Path:
    """Where the command's run will write, which all hosts must see: as much of the path as exists."""
    output = Path("output")
    if command.cfg_path is not None:
        with suppress(UserError):  # the hosts' answers say it
            output = user_path(load_run_config(command.cfg_path, command.options)[0].run.output_dir)
    return existing_part(output)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# ---- On each host ---------------------------------------------------------------------------------------------------


def answer(first: str, hosts: int, marker: Path, words: Sequence[str]) -> dict[str, Any]:
    """What this host has that must be the `same` on all, its `gpus`, and its own `checks`. It must survive JSON.

    `first`: the host that all ranks connect to. `hosts`: how many there are. `marker`: a file on the shared disk.
    """
    command, address = parse_command(words), socket.gethostbyname(first)
    addresses = {entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing, but picks the interface
        route = addresses.get(probe.getsockname()[0]) if hosts > 1 else None
    own = None
    with suppress(OSError):
        own = addresses.get(socket.gethostbyname(socket.gethostname()))
    named = {name: value for name, value in os.environ.items() if name.endswith("_SOCKET_IFNAME")}
    same = {
        "versions": versions(),
        "code": {"blipds": blipds.__version__, "digest": digest(sorted(Path(blipds.__file__).parent.rglob("*.py")))},
    }
    checks = [
        checked("network", check_interfaces, sorted(set(addresses.values())), named, own, route),
        checked("shared disk", check_shared, marker),
    ]
    if address in addresses:
        checks.append(checked("port", check_port, int(command.master_port)))
    if command.cfg_path is not None:
        try:
            config, inputs = inspect_run(command)
            same |= inputs
            checks.append(checked("disk", check_disk, config))
        except (UserError, OSError) as error:
            checks.append(Check("run config", False, str(error)))
    gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    return {"same": same, "gpus": gpus, "checks": checks}


def digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in paths)).hexdigest()[:12]


def check_interfaces(interfaces: list[str], named: dict[str, str], own: str | None, route: str | None) -> str:
    """`named`: the variables *_SOCKET_IFNAME, `route`: the interface that reaches the other hosts.

    Unless told, gloo takes the interface of the machine's `own` name, NCCL the first that fits.
    """
    for variable, given in named.items():
        wanted = tuple(name for name in given.lstrip("=^").split(",") if name)
        if not given.startswith("^") and not any(name.startswith(wanted) for name in interfaces):
            raise UserError(f"{variable}={given}, but there is {', '.join(interfaces)}: set it in .deepspeed_env")
    taken = named.get("GLOO_SOCKET_IFNAME") or own or "none"
    if route not in (None, "lo", taken):
        raise UserError(
            f"the others are reached by {route}, but gloo would take {taken}: put GLOO_SOCKET_IFNAME={route} (and "
            f"NCCL_SOCKET_IFNAME) into .deepspeed_env"
        )
    return f"interface {taken}"


def check_port(port: int) -> str:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        raise UserError(f"{port} is in use: deepspeed --master_port {port + 1}") from None
    return f"{port} is free on the first host"


def check_shared(marker: Path) -> str:
    if not marker.exists():
        raise UserError(f"{marker.parent} is not the asking machine's: run.output_dir must be on a disk that all share")
    return f"all see {marker.parent}"


def inspect_run(command: argparse.Namespace) -> tuple[Config, dict[str, dict[str, str]]]:
    """The run config, and digests of config and data."""
    from blipds.data.datasets import build_dataset
    from blipds.data.preparation import fetch_annotations
    from blipds.data.streams import streams_of

    cli.import_plugins(command.plugin)
    config, _ = load_run_config(command.cfg_path, command.options)
    streams = streams_of(config)
    records = hashlib.sha256("\0".join(streams).encode())
    splits = {*config.run.valid_splits, *([] if streams else config.run.train_splits)}
    fetch_annotations(config, splits, lambda line: None)
    for name in config.datasets:
        for split in sorted(splits):
            dataset = build_dataset(name, config, split, training=split in config.run.train_splits)
            dataset.records[0].image.open()
            for record in dataset.records:
                records.update(f"{record.image_id}\0{record.captions}\0".encode())
    files = [find_config(command.cfg_path, "run_configs", ".yaml")]
    if command.ds_config is not None:
        files.append(find_config(command.ds_config, "ds_configs", ".json", "DeepSpeed JSON"))
    return config, {"config": {"digest": digest(files)}, "data": {"digest": records.hexdigest()[:12]}}


def check_disk(config: Config) -> str:
    from blipds.planning.planner import ParameterSizes

    output, sizes = user_path(config.run.output_dir).absolute(), ParameterSizes.of(config)
    # fp32 weights to load; parameters, master copies and two moments to resume
    needed = COPIES * (sizes.total * 4 + sizes.total * 4 + sizes.trainable * 12)
    free = shutil.disk_usage(existing_part(output)).free
    text = f"{free / 1e9:.1f} GB free for {needed / 1e9:.1f} GB of checkpoints in {output}"
    if free < needed:
        raise UserError(f"only {text}")
    return text


# ---- Asking the hosts -----------------------------------------------------------------------------------------------


def on_all(
    hosts: Hosts, words: Sequence[str], variables: dict[str, str], timeout: float, remedy: str = ""
) -> dict[str, str]:
    """Runs a command in this folder on every host at once: what each printed. UserError names the hosts that failed."""
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    command = f"cd {shlex.quote(str(Path.cwd()))} && env {exports} {shlex.join(words)}"

    def on_one(host: str) -> tuple[str, str]:
        typed = [*SSH, host, command]
        try:
            done = subprocess.run(typed, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return "", f"{host}: no answer within {timeout:.0f} s"
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        return done.stdout, f"{host}: {reason}" if done.returncode else ""

    with ThreadPoolExecutor(len(hosts)) as pool:
        results = dict(zip(hosts, pool.map(on_one, hosts), strict=True))
    if failures := [failure for _, failure in results.values() if failure]:
        raise UserError("; ".join(failures) + remedy)
    return {host: printed for host, (printed, _) in results.items()}


def ask(hosts: Hosts, folder: Path, words: Sequence[str], variables: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What `answer` returns on each host. `folder` is on the shared disk."""
    marker = folder / f".preflight-{uuid.uuid4().hex}"
    marker.touch()
    asking = [sys.executable, "-m", "blipds.planning.preflight", next(iter(hosts)), str(len(hosts)), str(marker)]
    try:
        remedy = f"; {sys.executable} and blipds must be there too"
        printed = on_all(hosts, [*asking, *words], variables, 600, remedy)
    finally:
        marker.unlink()
    return {host: json.loads(text.partition(ANSWER)[2].splitlines()[0]) for host, text in printed.items()}


# ---- Comparing ------------------------------------------------------------------------------------------------------


def compare(hosts: Hosts, answers: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """The hosts' answers, against the hostfile and each other."""
    for key, remedy in SAME.items():
        found = {host: said["same"][key] for host, said in answers.items() if key in said["same"]}
        if len(found) == len(hosts):
            yield checked(key, check_same, found, remedy)
    yield checked("gpus", check_gpus, hosts, {host: said["gpus"] for host, said in answers.items()})
    checks = [(host, Check(*check)) for host, said in answers.items() for check in said["checks"]]
    for name in dict.fromkeys(check.name for _, check in checks):
        texts = sorted({check.text for _, check in checks if check.name == name})
        failed = [f"{host}: {check.text}" for host, check in checks if check.name == name and not check.good]
        yield Check(name, not failed, "; ".join(failed or texts))


def check_same(found: dict[str, dict[str, str]], remedy: str) -> str:
    """Every host must have what the first one has."""
    reference, expected = next(iter(found.items()))
    for host, here in found.items():
        for name, value in expected.items():
            if here[name] != value:
                raise UserError(f"{name} is {value} on {reference} and {here[name]} on {host}: {remedy}")
    return ", ".join(f"{name} {value}" for name, value in expected.items())


def check_gpus(hosts: Hosts, gpus: dict[str, int]) -> str:
    if not any(gpus.values()):
        return "none on any host: slots are ranks on CPUs"
    for host, slots in hosts.items():
        if gpus[host] < slots:
            raise UserError(f"{host} has {gpus[host]} GPUs, but the hostfile gives it {slots} slots")
    unused = sum(gpus.values()) - sum(hosts.values())
    return f"as many as slots{f'; {unused} more stay unused' if unused else ''}"


if __name__ == "__main__":
    first, hosts, marker, *words = sys.argv[1:]
    print(ANSWER + json.dumps(answer(first, int(hosts), Path(marker), words)))
