"""Ranks: who am I, and the few collective calls that are needed outside DeepSpeed.

"Collective" in a docstring means that every rank must call it.
"""

import atexit
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from blipds.errors import UserError

T = TypeVar("T")

LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # those of deepspeed and torchrun
OTHER_LAUNCHERS = (  # what OpenMPI's mpirun and SLURM's srun call them
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def initialise(collective_minutes: float = 120.0) -> torch.device:
    """Joins the ranks that the launcher started (or makes a world of one) and returns this rank's device. Collective.

    Understands the environment of deepspeed, torchrun, mpirun, srun and a plain `python`. A collective call fails where
    a rank does not join it within `collective_minutes`. fp32 is computed in fp32.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers run in forked workers
    take_launcher_names()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type() == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # gloo beside nccl: objects are gathered on the host, without going through the GPU
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # oneDNN caches 1024 matrix products, 6 MB each, and captions of many lengths keep needing new ones: in 1,000
        # steps a rank grows by 6 GB with the default (seen with torch 2.14), by 0.7 GB with this limit
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if local_world_size() > 1:
        share_cores()
    allow_tf32(False)
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=collective_minutes))
        except dist.DistNetworkError as error:
            port = os.environ.get("MASTER_PORT")
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {port} is in use, perhaps by another run on this machine: give the launcher --master_port"
            ) from error
        if world_size() > 1:
            _watch_for_failures()
    return device


def share_cores() -> None:
    """Gives this rank its share of the machine's cores, whatever its launcher gave it.

    deepspeed gives each rank a thread per core, so that ranks fight for them, and torchrun one thread. Adam on the host
    (offload) runs with torch's threads.
    """
    torch.set_num_threads(max((os.cpu_count() or 1) // local_world_size(), 1))


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA devices may compute fp32 products and convolutions in TF32, with 10 bits after the leading one.

    torch's own default has it for cuDNN's convolutions, such as the patch embedding, and not for products.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def take_launcher_names() -> None:
    """Sets the variables of deepspeed and torchrun from those of mpirun and srun, where they started this rank.

    UserError where MASTER_ADDR is missing: they do not say where ranks meet, and each would be a run of its own.
    """
    for theirs in OTHER_LAUNCHERS:
        if "RANK" in os.environ or not all(name in os.environ for name in theirs):
            continue
        values = [os.environ[name].partition("(")[0] for name in theirs]  # "8(x2)": 8 on 2 nodes
        if int(values[1]) > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UserError(f"{theirs[0]} is set but MASTER_ADDR is not: set it to the first machine's name")
            os.environ.update(zip(LAUNCHER_NAMES, values, strict=True))
            os.environ.setdefault("MASTER_PORT", "29500")


def device_type() -> str:
    """ "cuda" where there is a GPU, unless DS_ACCELERATOR=cpu tells DeepSpeed otherwise; else "cpu"."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def shut_down() -> None:
    if _watcher is not None:  # a thread that is inside a C++ call at the interpreter's exit would crash it
        _ended.set()
        _watcher.join()
    if dist.is_initialized():
        dist.destroy_process_group()


_failures: dist.Store | None = None
_watcher: threading.Thread | None = None
_ended = threading.Event()


def _watch_for_failures() -> None:
    """Ends this process when another rank has failed, also while a collective call hangs or on another machine.

    A launcher ends the ranks of its own machine only, and NCCL would wait until the call times out.
    """
    global _failures, _watcher
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _failures = store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def watch() -> None:
        while not _ended.wait(5):
            try:
                failed, patience = store.check(["blipds failures"]), 10
            except RuntimeError:  # rank 0, which hosts the store, has exited, for better or worse
                failed, patience = True, 30
            if failed and not _ended.wait(patience):  # time for this rank to report its own error, or to finish
                os._exit(1)

    _watcher = threading.Thread(target=watch, daemon=True)
    _watcher.start()
    atexit.register(shut_down)


def first_to_fail() -> bool:
    """Whether this rank is the first to fail. All ranks then learn of the failure and end within seconds."""
    if _failures is None:
        return True
    try:
        return _failures.add("blipds failures", 1) == 1
    except RuntimeError:  # rank 0 is gone, and has reported its failure
        return False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine. deepspeed's launcher sets LOCAL_SIZE instead."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    """Collective."""
    if world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sums in place. Collective."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective."""
    return bool(sum_over_ranks(torch.tensor([int(flag)])).item())


class ReadLater:
    """Copies a small device tensor to the host while the device continues; `numbers` waits for that copy alone.

    A later `.item()` would wait for everything queued in between.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event = torch.cuda.Event() if tensor.is_cuda else None
        if self._event is not None:
            self._event.record()

    def numbers(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank. Collective."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def raising_together() -> Iterator[None]:
    """A UserError in its block is raised on every rank: those without one would wait for the others. Collective."""
    error = None
    try:
        yield
    except UserError as own:
        error = own
    for failed in gather(error):
        if failed is not None:
            raise failed


def broadcast(value: T) -> T:
    """Rank 0's value on every rank. Collective."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
