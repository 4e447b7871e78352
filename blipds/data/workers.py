"""What passes between this process and the workers of a DataLoader: batches, through /dev/shm."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import get_worker_info

from blipds.errors import UserError

T = TypeVar("T")


def worker_context(num_workers: int) -> str | None:
    """How a loader starts its workers: by forks, which share this process's records instead of a pickled copy each.

    It was Linux's default before Python 3.14; elsewhere forks are not safe, and Python's default is taken.
    """
    return "fork" if num_workers and sys.platform == "linux" else None


@dataclass(frozen=True)
class Shared:
    """`collate`, whose batches a worker puts into shared memory at once.

    Left to the queue's thread, a batch for which there is no room is lost, and this process waits for it for ever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else tree_map_only(Tensor, Tensor.share_memory_, batch)


def received(batches: Iterable[T]) -> Iterator[T]:
    """Batches of a loader, out of shared memory: a tensor in it keeps a file open, of which there may be 1,024.

    Where they are pinned they have left it. UserError where /dev/shm is too small.
    """
    try:
        for batch in batches:
            yield tree_map_only(Tensor, lambda found: found.clone() if found.is_shared() else found, batch)
    except RuntimeError as error:
        if "shared memory" not in str(error):  # of a worker that was killed by a bus error, too
            raise
        size = shutil.disk_usage("/dev/shm").total >> 20
        raise UserError(
            f"/dev/shm ({size:,} MiB) is too small for the batches of the workers: give it more (docker run "
            "--shm-size=8g, or --ipc=host), or load without workers (num_workers 0)"
        ) from error
