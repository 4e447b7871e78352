"""What DeepSpeed compiles on first use: built once on each node, before the ranks need it."""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blipds import distributed
from blipds.errors import UserError

SHARED_MEMORY = "ShareMemCommBuilder"  # all-reduce between the ranks of a machine without GPUs
ASYNC_IO = ("PinMemoryBuilder", "AsyncIOBuilder")  # NVMe; the second loads the first


def prepare_ops(offload: bool, say: Callable[[str], None] = print) -> bool:
    """Compiles (the first time, about a minute) and loads what DeepSpeed needs on the device at hand. Collective.

    On each node one rank compiles while the others wait: compiling side by side takes minutes. Returns whether
    DeepSpeed's Adam is there; where any rank lacks it (no compiler), says why: torch's fused AdamW takes its place.
    """
    adam = "CPUAdamBuilder" if offload else "FusedAdamBuilder"
    if distributed.device_type() == "cpu" and (failure := load_everywhere(SHARED_MEMORY, say)):
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # else deepspeed.initialize would fail over it
        say(f"without DeepSpeed's shared-memory all-reduce, gloo does it all ({failure})")
    if failure := load_everywhere(adam, say):
        say(f"DeepSpeed's Adam cannot be compiled here ({failure}); torch's fused AdamW is used in its place")
        return False
    return True


def prepare_nvme(say: Callable[[str], None] = print) -> None:
    """Compiles (the first time) and loads what offloading to NVMe needs; UserError where that fails. Collective."""
    for builder_name in ASYNC_IO:
        if failure := load_everywhere(builder_name, say):
            raise UserError(
                f"offloading to NVMe needs a C++ compiler and libaio's headers (Debian, Ubuntu: apt-get install "
                f"libaio-dev): {builder_name} does not compile ({failure})"
            )


def load_everywhere(builder_name: str, say: Callable[[str], None]) -> str:
    """Loads an op on every rank, the first of each node ahead; returns a reason if any failed. Collective."""
    failure = load_op(builder_name, say) if distributed.local_rank() == 0 else ""
    failures = distributed.gather(failure)
    if not any(failures):
        failure = load_op(builder_name, say) if distributed.local_rank() != 0 else ""
        failures = distributed.gather(failure)
    return next(filter(None, failures), "")


def load_op(builder_name: str, say: Callable[[str], None]) -> str:
    """Loads an op on this rank, compiling it if need be; returns why it failed, or nothing."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    builder = get_accelerator().create_op_builder(builder_name)
    try:
        folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    except OSError as error:
        raise UserError(f"no folder for what DeepSpeed compiles: {error}; set HOME or TORCH_EXTENSIONS_DIR") from error
    if hasattr(cpp_extension, "FileBaton") and clear_stale_lock(folder / "lock"):
        say(f"removed {folder / 'lock'}, left behind by a compile that was interrupted")
    compiling = not any(folder.glob("*.so"))
    start = time.monotonic()
    if compiling:
        say(f"compiling DeepSpeed's {builder.name} in {folder}: once, about a minute ...")
    # a real file: the check for libaio duplicates its descriptor, and finds no libaio where there is none
    with tempfile.TemporaryFile("w") as chatter:
        try:
            with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter), compiler_environment():
                builder.load(verbose=False)
        except Exception as error:  # a missing compiler shows up as any of half a dozen types
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if compiling:
        say(f"compiled in {time.monotonic() - start:.0f} s")
    return ""


@contextlib.contextmanager
def compiler_environment() -> Iterator[None]:
    """What DeepSpeed's builders read, as they need it; afterwards as it was.

    ninja comes from pip and lies beside this python, which need not be on PATH. Architectures are plain numbers to
    them: Hopper's 9.0a, which CUDA images set in TORCH_CUDA_ARCH_LIST, would fail.
    """
    before = {name: os.environ.get(name) for name in ("PATH", "TORCH_CUDA_ARCH_LIST")}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before['PATH']}"
    if architectures := before["TORCH_CUDA_ARCH_LIST"]:
        os.environ["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(\.\d+)[a-z]+", r"\1", architectures)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def clear_stale_lock(lock: Path) -> bool:
    """Removes the lock of a compile that no longer runs; with it, every later start would wait for ever.

    torch keeps the lock file open while it compiles, so a lock that no process of this machine holds open is stale.
    (Only a torch with FileBaton waits for the mere file; later ones lock it in the kernel, which forgets the dead.)
    """
    if not lock.exists():
        return False
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if link.readlink() == lock:
                return False
    lock.unlink(missing_ok=True)
    return True
