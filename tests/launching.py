"""Starts real ranks: as a person types it, or in forks of a process that has done the imports."""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from blipds.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = Path(sys.executable).with_name("deepspeed")
if not LAUNCHER.exists():  # installed with --target (gpu.sh)
    LAUNCHER = Path(shutil.which("deepspeed") or LAUNCHER)

# What a rank imports takes 6 s of processor time, and the launcher and its own launcher 5 s more; a fork takes none.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


def environment() -> dict[str, str]:
    """This environment, with the virtual environment's programs first and no GPU, so that figures are the CPU's.

    Tests with the marker `gpu` keep their GPU: they run `bash tests/gpu.sh`, or work in pytest's own process.
    """
    path = f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}


def command(ranks: int, script: Path | str, *arguments: object, launcher: bool = False) -> list[str]:
    """What a person types: deepspeed for several ranks, or where it is asked for, else python."""
    port = ["--master_port", str(free_port())]  # other runs on this machine may hold the usual one
    start = [str(LAUNCHER), "--num_accelerators", str(ranks), *port] if launcher or ranks > 1 else [sys.executable]
    return [*start, str(REPOSITORY / script), *map(str, arguments)]


def launch_as_typed(
    ranks: int, script: Path | str, *arguments: object, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """`launch` through the real launcher, with processes that import everything anew and each have a hash seed."""
    typed = command(ranks, script, *arguments)
    process = subprocess.run(
        typed,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if process.returncode == 0 and ranks > 1:
        assert_no_shared_memory(typed[typed.index("--master_port") + 1])
    return process


def launch(ranks: int, script: Path | str, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs to the end from the repository's root; stdout and stderr come back as one text.

    A rank that fails ends the others, as the launchers do, and its exit status is the run's. A run that ends well
    leaves no shared memory behind.
    """
    port = free_port()
    with tempfile.NamedTemporaryFile("r") as log:
        processes = start_ranks(ranks, Path(log.name), script, *arguments, port=port)
        try:
            status = wait(processes, timeout)
        except BaseException:
            kill(processes)
            raise
        output = log.read()
    if status == 0 and ranks > 1:
        assert_no_shared_memory(str(port))
    return subprocess.CompletedProcess([str(script), *map(str, arguments)], status, output)


def assert_no_shared_memory(port: str) -> None:
    assert list(Path("/dev/shm").glob(f"*_{port}_*")) == []


def start_ranks(
    ranks: int, log: Path, script: Path | str, *arguments: object, port: int | None = None
) -> list[BaseProcess]:
    """The ranks alone, as a scheduler starts them: no launcher between them and a signal. They all write to `log`."""
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port or free_port())}
    typed = [REPOSITORY / script, *arguments]
    if ranks == 1:
        return [start_script(typed, environment(), log)]
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [start_script(typed, environment() | place | variables, log) for variables in own]


def start_script(typed: Sequence[object], variables: dict[str, str], log: Path) -> BaseProcess:
    """Forks a process for a script and its arguments; `variables` are its whole environment."""
    one_thread = {"OMP_NUM_THREADS": "1"}  # as in conftest.py, unless a rank asks for more
    with mock.patch.dict(os.environ, environment() | one_thread):
        forkserver.ensure_running()
    process = FORKS.Process(target=run_script, args=([str(word) for word in typed], variables, str(log)))
    process.start()
    return process


def run_script(typed: Sequence[str], variables: dict[str, str], log: str) -> None:
    """In a fork: what `python SCRIPT ARGUMENTS` does in a process of its own."""
    os.setsid()
    gc.freeze()  # or each collection goes through what half a million imported objects hold: 0.1 to 0.3 s
    multiprocessing.set_start_method(None, force=True)  # loaders start their workers as in any process
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    sys.argv = list(typed)
    sys.path.insert(0, str(Path(typed[0]).parent))
    runpy.run_path(typed[0], run_name="__main__")


def wait(processes: Sequence[BaseProcess], timeout: float) -> int:
    """The exit status of the first rank that fails, else 0."""
    deadline = time.monotonic() + timeout
    while running := [process for process in processes if process.exitcode is None]:
        left = deadline - time.monotonic()
        if left < 0:
            raise TimeoutError(f"{len(running)} ranks run after {timeout} s")
        connection.wait([process.sentinel for process in running], left)
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            for process in processes:
                process.join(1)  # it may have something to say itself
                process.terminate()
            for process in processes:
                process.join(30)
                process.kill()
            return failed[0]
    return 0


def kill(processes: Sequence[BaseProcess]) -> None:
    """SIGKILL for ranks and their loaders' workers."""
    for process in processes:
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not lead a group yet
        process.join()


def load_script(name: str) -> Any:
    """A command line of launch/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
