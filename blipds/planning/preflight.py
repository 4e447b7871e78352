"""Before a run on several machines: is everything there, and the same, on each?

`checks` runs where the command is typed. It starts `python -m blipds.planning.preflight` on every host, by the ssh that
DeepSpeed uses too, and compares what they answer. A rank itself never sees the hostfile.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import blipds
from blipds.config.run import load_run_config
from blipds.errors import UserError
from blipds.files.paths import user_path

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")  # never asks for a password
PACKAGES = ("torch", "deepspeed", "transformers", "timm")
ANSWER = "blipds-preflight "  # what a shell prints at login stands before it
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")  # names that DeepSpeed 0.19 hands to the other machines
COPIES = 3  # of a checkpoint: the latest, the best, and the one being written
Facts = dict[str, dict[str, Any]]  # host -> what it answered


# ---- Files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """`NAME slots=N`, one host a line, as DeepSpeed reads it; # starts a comment. UserError names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"no such hostfile: {path}; deepspeed would go on with this machine alone, so give the right path"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the hostfile: {error}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) < 1:
            raise UserError(f"{path}:{number}: '{text}' is no host; expected NAME slots=N, such as node1 slots=8")
        if match[1] in hosts:
            raise UserError(f"{path}:{number}: {match[1]} stands twice; give all its slots in one line")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"{path}: names no host; expected lines such as node1 slots=8")
    return list(hosts.values())


def exported(environ: dict[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """What DeepSpeed sets on the other machines: variables by name, and the `.deepspeed_env` files of the folders."""
    found = {name: value for name, value in environ.items() if name.startswith(EXPORTED)}
    for folder in folders:
        path = folder / environ.get("DS_ENV_FILE", ".deepspeed_env")
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
            name, sign, value = line.partition("=")
            if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
                raise UserError(f"{path}:{number}: '{line}' is not NAME=value; DeepSpeed would stop at it")
            found[name.strip()] = value.strip()
    return found


# ---- What is asked of each host -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What a host is to look at. `first` is the host that all ranks connect to, `token` stands in the file `shared`."""

    first: str
    port: int
    shared: str
    token: str
    cfg_path: str | None = None
    ds_config: str | None = None
    options: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """The arguments of a training command that preflight looks at too."""

    hostfile: str | None = None
    port: int = 29500
    launcher: str = "pdsh"
    cfg_path: str | None = None
    ds_config: str | None = None
    options: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Command":
        values: dict[str, list[str]] = {}
        name = ""
        for word in words:
            if word.startswith("-"):
                name, sign, value = word.lstrip("-").replace("-", "_").partition("=")
                values.setdefault(name, []).extend([value] if sign else [])
            elif name:
                values[name].append(word)
        one = {key: found[0] for key, found in values.items() if found}
        port = one.get("master_port", "29500")
        if not port.isdigit():
            raise UserError(f"--master_port {port} is no number")
        return cls(
            one.get("hostfile") or one.get("H"),
            int(port),
            one.get("launcher", "pdsh"),
            one.get("cfg_path"),
            one.get("ds_config"),
            tuple(values.get("options", ())),
            tuple(word for word in values.get("plugin", ())),
        )


def answer(question: Question) -> dict[str, Any]:
    """Runs on each host; what it says must survive JSON."""
    import psutil
    import torch

    first = socket.gethostbyname(question.first)
    addresses = {
        entry.address: name for name, entries in psutil.net_if_addrs().items() for entry in entries if entry.address
    }
    facts: dict[str, Any] = {
        "versions": {"python": platform.python_version(), "blipds": blipds.__version__, **package_versions()},
        "code": digest(sorted(Path(blipds.__file__).parent.rglob("*.py"))),
        "gpus": torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0,
        "interfaces": sorted(psutil.net_if_addrs()),
        "named": {name: value for name, value in os.environ.items() if name.endswith("_SOCKET_IFNAME")},
        "route": addresses.get(source_address(first)),
        # what gloo takes by itself: the interface of the machine's own name
        "own": addresses.get(own_address()),
        "port_free": first not in addresses or port_is_free(question.port),
        "shared": seen(Path(question.shared), question.token),
    }
    if question.cfg_path is not None:
        facts |= answer_about_run(question)
    return facts


def answer_about_run(question: Question) -> dict[str, Any]:
    """About the run config, its data, and the disk that checkpoints go to."""
    from blipds.data.datasets import build_dataset
    from blipds.data.streams import streams_of
    from blipds.planning.planner import Sizes

    assert question.cfg_path is not None
    files = [Path(path) for path in (question.cfg_path, question.ds_config) if path is not None]
    for path in files:
        if not path.is_file():
            return {"run": f"no such file: {path}"}
    try:
        sys.path.insert(0, str(Path.cwd()))
        for plugin in question.plugins:
            __import__(plugin)
        config, _ = load_run_config(files[0], question.options)
        records = hashlib.sha256()
        streams = streams_of(config)
        records.update("\0".join(streams).encode())
        splits = {*config.run.valid_splits, *([] if streams else config.run.train_splits)}
        for name in config.datasets:
            for split in sorted(splits):
                dataset = build_dataset(name, config, split, training=split in config.run.train_splits)
                dataset.records[0].image.open()
                for record in dataset.records:
                    records.update(f"{record.image_id}\0{record.captions}\0".encode())
        output = user_path(config.run.output_dir).absolute()
        sizes = Sizes.of(config)
    except (UserError, ImportError, OSError) as error:
        return {"run": str(error)}
    existing = next(folder for folder in (output, *output.parents) if folder.exists())
    return {
        "run": "",
        "config": digest(files),
        "data": records.hexdigest(),
        "output": str(output),
        "free": shutil.disk_usage(existing).free,
        # fp32 weights for reading; parameters, master copies and two moments for going on
        "needed": COPIES * (sizes.all * 4 + sizes.all * 4 + sizes.trainable * 12),
    }


def package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def digest(paths: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def source_address(target: str) -> str:
    """The address of this machine that packets to `target` bear; none are sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))
        return str(probe.getsockname()[0])


def own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def seen(path: Path, token: str) -> bool:
    try:
        return path.read_text("utf-8") == token
    except OSError:
        return False


# ---- Asking ---------------------------------------------------------------------------------------------------------


def on_host(host: str, words: Sequence[str], variables: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command in this folder on a host, with this Python's environment."""
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    command = f"cd {shlex.quote(str(Path.cwd()))} && env {exports} {shlex.join(words)}"
    try:
        done = subprocess.run(
            [*SSH, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {timeout:.0f} s"
    return done.returncode, done.stdout, done.stderr


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no reason given"


def on_all(hosts: Sequence[Host], action: Callable[[str], Any]) -> dict[str, Any]:
    """The action's result for each host, side by side."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip((host.name for host in hosts), pool.map(action, (host.name for host in hosts)), strict=True))


# ---- Checks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of the report: what was found, or what is wrong and what mends it."""

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'failed':8}{self.name:12}{self.text}"


def checks(hostfile: Path, words: Sequence[str]) -> Iterator[Check]:
    """All checks, one after the other; ends early where what is left would only repeat the failure."""
    try:
        hosts, command = read_hostfile(hostfile), Command.parse(words)
        variables = exported(dict(os.environ), [user_path("~"), Path.cwd()])
    except UserError as error:
        yield Check("hostfile", False, str(error))
        return
    slots = sum(host.slots for host in hosts)
    yield Check("hostfile", True, f"{hostfile}: {len(hosts)} hosts, {slots} slots")
    if words:
        yield check_command(hostfile, command)
    reached = on_all(hosts, lambda host: on_host(host, ["true"], {}, timeout=20))
    silent = {host: last_line(stderr) for host, (status, _, stderr) in reached.items() if status != 0}
    yield Check(
        "ssh",
        not silent,
        "; ".join(f"{host} does not answer ({reason})" for host, reason in silent.items())
        + ": ssh must work without a password, and this folder be there"
        if silent
        else "every host answers, without a password",
    )
    if silent:
        return
    yield from check_hosts(hosts, command, variables)


def check_command(hostfile: Path, command: Command) -> Check:
    named = command.hostfile
    if named is None:
        return Check("command", False, f"it says no --hostfile: deepspeed --hostfile {hostfile} ...")
    if Path(named).resolve() != hostfile.resolve():
        return Check("command", False, f"it says --hostfile {named}, but {hostfile} was checked")
    if command.launcher == "pdsh" and shutil.which("pdsh") is None:
        return Check("command", False, "pdsh is not installed on this machine (Debian, Ubuntu: apt-get install pdsh)")
    return Check("command", True, f"the same hostfile, started by {command.launcher}")


def check_hosts(hosts: Sequence[Host], command: Command, variables: dict[str, str]) -> Iterator[Check]:
    facts: Facts = {}
    shared = shared_folder(command)
    token = uuid.uuid4().hex
    path = shared / f".preflight-{token}"
    path.write_text(token, "utf-8")
    question = Question(
        hosts[0].name,
        command.port,
        str(path),
        token,
        command.cfg_path,
        command.ds_config,
        command.options,
        command.plugins,
    )
    try:
        asking = [sys.executable, "-m", "blipds.planning.preflight", json.dumps(asdict(question))]
        answers = on_all(hosts, lambda host: on_host(host, asking, variables, timeout=600))
    finally:
        path.unlink()
    for host, (_, stdout, stderr) in answers.items():
        found = [line for line in stdout.splitlines() if line.startswith(ANSWER)]
        if not found:
            yield Check("python", False, f"{host}: {last_line(stderr)}; {sys.executable} and blipds must be there too")
            return
        facts[host] = json.loads(found[-1].removeprefix(ANSWER))
    compared = [*compare(hosts, facts, command, shared)]
    yield from compared
    if all(check.good for check in compared):  # it may compile for minutes
        yield check_ops(hosts, variables)


def compare(hosts: Sequence[Host], facts: Facts, command: Command, shared: Path) -> Iterator[Check]:
    """What the hosts answered, against the hostfile and each other."""
    yield check_same("versions", facts, "install the same everywhere")
    yield check_same("code", facts, "every host must run the same blipds")
    yield check_gpus(hosts, facts)
    yield check_interfaces(hosts, facts)
    yield check_port(hosts, facts, command)
    yield check_shared(facts, shared)
    if command.cfg_path is not None:
        yield from check_run(facts)


def shared_folder(command: Command) -> Path:
    """run.output_dir, or what there is of it; it is made by the run itself."""
    output = Path("output")
    if command.cfg_path is not None and Path(command.cfg_path).is_file():
        with suppress(UserError):  # check_run says it
            output = user_path(load_run_config(Path(command.cfg_path), command.options)[0].run.output_dir)
    return next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())


def check_same(key: str, facts: Facts, remedy: str) -> Check:
    """Every host's answer is the first one's."""
    reference, expected = next((host, found[key]) for host, found in facts.items())
    for host, found in facts.items():
        if found[key] == expected:
            continue
        if isinstance(expected, dict):
            name = next(name for name in expected if found[key].get(name) != expected[name])
            text = f"{name} is {expected[name]} on {reference} and {found[key].get(name)} on {host}"
        else:
            text = f"{host} differs from {reference}"
        return Check(key, False, f"{text}: {remedy}")
    shown = ", ".join(f"{name} {value}" for name, value in expected.items()) if isinstance(expected, dict) else "equal"
    return Check(key, True, shown)


def check_gpus(hosts: Sequence[Host], facts: Facts) -> Check:
    if not any(found["gpus"] for found in facts.values()):
        return Check("gpus", True, "none on any host: slots are ranks on CPUs")
    for host in hosts:
        if (here := facts[host.name]["gpus"]) < host.slots:
            return Check("gpus", False, f"{host.name} has {here} GPUs, but the hostfile gives it {host.slots} slots")
    unused = sum(facts[host.name]["gpus"] - host.slots for host in hosts)
    return Check("gpus", True, f"as many as slots{f'; {unused} more stay unused' if unused else ''}")


def check_interfaces(hosts: Sequence[Host], facts: Facts) -> Check:
    """gloo takes the interface of the machine's own name, NCCL the first that fits, unless they are told."""
    for host, found in facts.items():
        for variable, given in found["named"].items():
            wanted = [name for name in given.lstrip("=^").split(",") if name]
            if not given.startswith("^") and not any(
                here.startswith(name) for here in found["interfaces"] for name in wanted
            ):
                have = ", ".join(found["interfaces"])
                return Check("network", False, f"{variable}={given}, but {host} has {have}: set it in .deepspeed_env")
    if len(hosts) > 1:
        for host, found in facts.items():
            taken = found["named"].get("GLOO_SOCKET_IFNAME", found["own"])
            if found["route"] not in (None, "lo") and taken != found["route"]:
                return Check(
                    "network",
                    False,
                    f"{host} reaches the others by {found['route']}, but gloo would take {taken or 'none'}: put "
                    f"GLOO_SOCKET_IFNAME={found['route']} (and NCCL_SOCKET_IFNAME) into .deepspeed_env",
                )
    used = sorted({found["named"].get("GLOO_SOCKET_IFNAME") or found["own"] or "?" for found in facts.values()})
    return Check("network", True, f"interface {', '.join(used)}")


def check_port(hosts: Sequence[Host], facts: Facts, command: Command) -> Check:
    if facts[hosts[0].name]["port_free"]:
        return Check("port", True, f"{command.port} is free on {hosts[0].name}")
    return Check(
        "port", False, f"{command.port} is in use on {hosts[0].name}: deepspeed --master_port {command.port + 1}"
    )


def check_shared(facts: Facts, folder: Path) -> Check:
    blind = [host for host, found in facts.items() if not found["shared"]]
    if blind:
        return Check(
            "shared disk",
            False,
            f"{', '.join(blind)} cannot see what is written to {folder} here: run.output_dir must be on a file system "
            f"that all share",
        )
    return Check("shared disk", True, f"{folder} is seen by all")


def check_run(facts: Facts) -> Iterator[Check]:
    broken = {host: found["run"] for host, found in facts.items() if found["run"]}
    if broken:
        host, reason = next(iter(broken.items()))
        yield Check("run config", False, f"{host}: {reason}")
        return
    yield check_same("config", facts, "the run config and the DeepSpeed JSON must be the same files")
    yield check_same("data", facts, "annotations must be the same, and lie at the same path")
    host, found = min(facts.items(), key=lambda item: item[1]["free"])
    free, needed = found["free"] / 1e9, found["needed"] / 1e9
    text = f"{free:.1f} GB free for {needed:.1f} GB of checkpoints in {found['output']}"
    yield Check("disk", free >= needed, text if free >= needed else f"{host}: only {text}")


def check_ops(hosts: Sequence[Host], variables: dict[str, str]) -> Check:
    """Compiles on each host, if need be, and clears locks that an interrupted compile left behind."""
    words = [sys.executable, "-m", "blipds.engine"]
    done = on_all(hosts, lambda host: on_host(host, words, variables, timeout=1200))
    failed = {host: last_line(stderr) for host, (status, _, stderr) in done.items() if status != 0}
    if failed:
        return Check("ops", False, "; ".join(f"{host}: {reason}" for host, reason in failed.items()))
    said = sorted({line for _, stdout, _ in done.values() for line in stdout.splitlines() if "removed" in line})
    return Check("ops", True, "; ".join(["DeepSpeed's parts are compiled on every host", *said]))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    asked |= {"options": tuple(asked["options"]), "plugins": tuple(asked["plugins"])}
    print(ANSWER + json.dumps(answer(Question(**asked))))
