"""Ranks: who am I, and the few collective calls that are needed outside DeepSpeed.

"Collective" in a docstring means that every rank must call it.
"""

import atexit
import os
import socket
import threading
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from blipds.errors import UserError

T = TypeVar("T")

# What OpenMPI's mpirun and SLURM's srun call what deepspeed and torchrun call by these names.
OTHER_LAUNCHERS = (
    {
        "RANK": "OMPI_COMM_WORLD_RANK",
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
    },
    {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
        "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",
    },
)
TIMEOUT = timedelta(hours=2)  # rank 0 may score captions for minutes while the others wait


def initialise() -> torch.device:
    """Joins the ranks that the launcher started (or makes a world of one) and returns this rank's device. Collective.

    Understands the environment of deepspeed, torchrun, mpirun, srun and a plain `python`. On CPUs the cores of the
    machine are shared out among its ranks: two ranks with all threads each would fight for them.
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
        # gloo beside nccl: objects are gathered on the host, without a detour over the GPU
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        # oneDNN keeps 1024 matrix products, 6 MB each, and captions of many lengths need new ones all the time: without
        # a limit a run of 1,000 steps grows by 6 GB a rank (seen with torch 2.14), with it by 0.7 GB
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        if local_world_size() > 1:
            torch.set_num_threads(max((os.cpu_count() or 1) // local_world_size(), 1))
    if not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except dist.DistNetworkError as error:
            port = os.environ.get("MASTER_PORT")
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {port} is in use, by another run on this machine perhaps: give the launcher --master_port"
            ) from error
        if world_size() > 1:
            _watch_for_failures()
    return device


def take_launcher_names() -> None:
    """Sets the variables of deepspeed and torchrun from those of mpirun and srun, where they started this rank.

    They do not say where the ranks meet: UserError where MASTER_ADDR is missing, rather than many runs of one rank.
    """
    for names in OTHER_LAUNCHERS:
        if "RANK" in os.environ or not all(name in os.environ for name in names.values()):
            continue
        found = {name: os.environ[theirs].partition("(")[0] for name, theirs in names.items()}  # "8(x2)": 8 on 2 nodes
        if int(found["WORLD_SIZE"]) > 1:
            if "MASTER_ADDR" not in os.environ:
                raise UserError(f"{names['RANK']} is set but MASTER_ADDR is not: set it to the first machine's name")
            os.environ.update(found)
            os.environ.setdefault("MASTER_PORT", "29500")


def device_type() -> str:
    """cuda where there is a GPU, unless DeepSpeed is told otherwise by DS_ACCELERATOR=cpu"""
    return "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"


def shut_down() -> None:
    if _watcher is not None:  # a thread in the middle of a C++ call would bring the interpreter's end down
        _ended.set()
        _watcher.join()
    if dist.is_initialized():
        dist.destroy_process_group()


_failures: dist.Store | None = None
_watcher: threading.Thread | None = None
_ended = threading.Event()


def _watch_for_failures() -> None:
    """Ends this process when another rank has failed, also while a collective call hangs or on another machine.

    A launcher ends the ranks of its own machine only, and NCCL would wait for TIMEOUT.
    """
    global _failures, _watcher
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _failures = store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)

    def watch() -> None:
        while not _ended.wait(5):
            try:
                failed, patience = store.check(["blipds failures"]), 10
            except RuntimeError:  # rank 0, which keeps the store, is gone: in good order, or not
                failed, patience = True, 30
            if failed and not _ended.wait(patience):  # this rank may be about to say more, or to end by itself
                os._exit(1)

    _watcher = threading.Thread(target=watch, daemon=True)
    _watcher.start()
    atexit.register(shut_down)


def first_to_fail() -> bool:
    """Whether no other rank has failed before; all ranks learn of it and end within seconds."""
    if _failures is None:
        return True
    try:
        return _failures.add("blipds failures", 1) == 1
    except RuntimeError:  # rank 0 is gone, and has spoken
        return False


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine. deepspeed's launcher calls it LOCAL_SIZE."""
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


def any_rank(wish: bool) -> bool:
    """Whether any rank wishes it. Collective."""
    return bool(sum_over_ranks(torch.tensor([int(wish)])).item())


class ReadLater:
    """A copy of a small device tensor on the host, made while the device goes on; `numbers` waits for the copy alone.

    An `.item()` later would wait for all that was queued in between.
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


def raise_together(error: UserError | None) -> None:
    """Raises the first rank's error on every rank: those without one would wait for the others. Collective."""
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
