"""Starts real ranks through the real launcher."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from blipds.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def environment() -> dict[str, str]:
    """This environment, with the virtual environment's programs first and no GPU, so that figures are the CPU's."""
    path = f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}


def command(ranks: int, script: Path | str, *arguments: object) -> list[str]:
    """What a person types: deepspeed for several ranks, python for one."""
    port = ["--master_port", str(free_port())]  # other runs on this machine may hold the usual one
    start = [str(LAUNCHER), "--num_accelerators", str(ranks), *port] if ranks > 1 else [sys.executable]
    return [*start, str(REPOSITORY / script), *map(str, arguments)]


def launch(ranks: int, script: Path | str, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
    """Runs to the end from the repository's root; stdout and stderr come back as one text.

    A run that ends well leaves no shared memory behind.
    """
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
        port = typed[typed.index("--master_port") + 1]
        assert list(Path("/dev/shm").glob(f"*_{port}_*")) == []
    return process


def start_ranks(ranks: int, log: Path, script: Path | str, *arguments: object) -> list[subprocess.Popen]:
    """The ranks alone, as a scheduler starts them: no launcher between them and a signal. They all write to `log`."""
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    with log.open("a") as output:
        return [
            subprocess.Popen(
                [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
                cwd=REPOSITORY,
                env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank in range(ranks)
        ]


def kill(processes: list[subprocess.Popen]) -> None:
    """SIGKILL for ranks and their loaders' workers."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
