"""DeepSpeed's communication between ranks."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

from blipds import distributed


def join_deepspeed() -> None:
    """Has DeepSpeed communicate over the process group that is there; more calls do nothing more. Collective.

    Its CPU all-reduce leaves buffers (69 MB a rank) in /dev/shm for ever. Once every rank has mapped them their names
    are taken away, so that they go with the last rank, however it ends.
    """
    from deepspeed import init_distributed

    with redirect_stdout(io.StringIO()):  # it prints one line a rank for each op
        init_distributed(verbose=False)
    distributed.barrier()
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ['MASTER_PORT']}_{distributed.rank()}"
    for path in Path("/dev/shm").glob(names):
        path.unlink()
