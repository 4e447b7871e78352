"""DeepSpeed's compiled optimizers: built once, before the ranks need them.

python -m blipds.engine.ops     compiles Adam for the device at hand, so that later starts are quick
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from blipds import distributed


def prepare_adam(offload: bool, say: Callable[[str], None] = print) -> bool:
    """Compiles (the first time, about a minute) and loads the Adam of DeepSpeed for the device at hand. Collective.

    On each node one rank compiles while the others wait: compiling side by side takes minutes. Returns False, and says
    why, where any rank cannot have it (no compiler): the caller then takes torch's fused AdamW.
    """
    failure = ""
    if distributed.local_rank() == 0:
        failure = load_op(offload, say)
    failures = [text for text in distributed.gather(failure) if text]
    if not failures and distributed.local_rank() != 0:
        failure = load_op(offload, say)
        failures = [failure] if failure else []
    failures = [text for texts in distributed.gather(failures) for text in texts]
    if failures:
        say(f"DeepSpeed's Adam cannot be compiled here ({failures[0]}); torch's fused AdamW is used in its place")
    return not failures


def load_op(offload: bool, say: Callable[[str], None]) -> str:
    """Loads the op on this rank, compiling it if need be; returns why it failed, or nothing."""
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    path_before = os.environ["PATH"]
    # ninja comes from pip and lies beside this python, which need not be on PATH
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path_before}"
    builder = get_accelerator().create_op_builder("CPUAdamBuilder" if offload else "FusedAdamBuilder")
    folder = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    if hasattr(cpp_extension, "FileBaton") and clear_stale_lock(folder / "lock"):
        say(f"removed {folder / 'lock'}, left behind by a compile that was interrupted")
    compiling = not any(folder.glob("*.so"))
    start = time.monotonic()
    if compiling:
        say(f"compiling DeepSpeed's {builder.name} in {folder}: once, about a minute ...")
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            builder.load(verbose=False)
    except Exception as error:  # a missing compiler shows up as any of half a dozen types
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        os.environ["PATH"] = path_before
    if compiling:
        say(f"compiled in {time.monotonic() - start:.0f} s")
    return ""


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


def main() -> None:
    prepare_adam(offload=False)


if __name__ == "__main__":
    main()
