"""Images that somebody names: files, folders, addresses, and names on standard input, as an endless stream if need be.

Nothing here grows with the number of images: a folder's names are sorted in a temporary file.
"""

import hashlib
import io
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blipds.data.images import Images, stack
from blipds.data.processors import ImageProcessor, Shrink, load_image
from blipds.data.sources import ImageSource, is_hidden, is_image
from blipds.errors import UserError
from blipds.files.download import read
from blipds.signals import leave_signals_alone

MAX_IMAGE_BYTES = 200 << 20  # of an address: it is held in memory


@dataclass(frozen=True)
class NamedImage:
    """`name` is a path or an address; `below` is the folder that was named, where it was found by looking into it."""

    name: str
    below: str = ""


@dataclass(frozen=True)
class PathImage:
    path: str

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        return load_image(self.path, shrink)


@dataclass(frozen=True)
class AddressImage:
    address: str

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        try:
            data = read(self.address, max_bytes=MAX_IMAGE_BYTES)
        except UserError as error:
            raise OSError(str(error).removeprefix(f"{self.address}: ")) from error
        return load_image(self.address, shrink, data=io.BytesIO(data))


def source_of(name: str) -> ImageSource:
    return AddressImage(name) if is_address(name) else PathImage(name)


def is_address(name: str) -> bool:
    return "://" in name


# --- the stream of names ---------------------------------------------------------------------------------------------


def check_named(given: Sequence[str]) -> None:
    """UserError for a path of the command line that does not exist: most likely a typing error."""
    if given.count("-") > 1:
        raise UserError("standard input (-) can be named once")
    for name in given:
        if name != "-" and not is_address(name) and not os.path.lexists(name):
            raise UserError(f"{name}: no such file or folder")


def named_images(given: Iterable[str]) -> Iterator[NamedImage]:
    """The images of files, folders (in the order of their names, those below too), addresses and, for -, of a name a
    line of standard input. In a folder that is what has an image's suffix; what is hidden is left out."""
    for name in given:
        if name == "-":
            yield from named_images(names_on_stdin())
        elif not is_address(name) and os.path.isdir(name):  # noqa: PTH112 (a Path for each name is slow)
            folder = os.path.normpath(name)
            yield from images_in(folder, folder, ())
        else:
            yield NamedImage(name)


def names_on_stdin() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if name := os.fsdecode(line.rstrip(b"\r\n")):
            yield name


def images_in(folder: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[NamedImage]:
    """`above`: the folders on the way here, as (device, inode), so that a link into one of them is no circle."""
    try:
        status = os.stat(folder)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        entries = iter(()) if here in above else sorted_entries(folder)
    except OSError:
        yield NamedImage(folder, below)  # to be named among what cannot be read
        return
    for name, is_folder in entries:
        path = os.path.join(folder, name)  # noqa: PTH118
        if is_folder:
            yield from images_in(path, below, (*above, here))
        else:
            yield NamedImage(path, below)


def sorted_entries(folder: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of folders and images, by name. Raises OSError at once, not in the middle.

    They are sorted in a temporary file, which sqlite removes, in 2 MB of memory.
    """
    database = sqlite3.connect("")
    database.execute("CREATE TABLE entry (name BLOB PRIMARY KEY, is_folder INTEGER) WITHOUT ROWID")
    with os.scandir(folder) as entries:
        found = ((os.fsencode(entry.name), entry.is_dir()) for entry in entries if is_wanted(entry))
        database.executemany("INSERT INTO entry VALUES (?, ?)", found)
    return read_sorted(database)


def read_sorted(database: sqlite3.Connection) -> Iterator[tuple[str, bool]]:
    with closing(database):
        for name, is_folder in database.execute("SELECT name, is_folder FROM entry ORDER BY name"):
            yield os.fsdecode(name), bool(is_folder)


def is_wanted(entry: os.DirEntry[str]) -> bool:
    """Folders and images; of images, pipes and devices not (opening one might wait for ever), broken links do count."""
    if is_hidden(entry.name):
        return False
    if entry.is_dir():
        return True
    return is_image(entry.name) and (entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)))  # noqa: PTH110


def count_images(given: Sequence[str]) -> int | None:
    """How many there are, for a progress bar; None where standard input is among them. About 2 s a million."""
    if "-" in given:
        return None
    return sum(1 for _ in named_images(given))


class Names:
    """A set of names in a temporary file, which sqlite removes: 16 bytes of hash a name there, 2 MB in memory."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE name (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")  # and no end: nothing is to last

    def add(self, name: str) -> bool:
        """Whether it is new."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=16).digest()
        return self._database.execute("INSERT OR IGNORE INTO name VALUES (?)", (digest,)).rowcount == 1


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class NamedBatch:
    """Images that could be read, and their names; `errors` is {name: why} of the others."""

    images: Images
    names: list[str]
    errors: dict[str, str]

    def pin_memory(self) -> "NamedBatch":
        return NamedBatch(self.images.pin_memory(), self.names, self.errors)


class _Reader(Dataset[tuple[str, Tensor | None, str]]):
    """Addressed by name."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor

    def __getitem__(self, name: str) -> tuple[str, Tensor | None, str]:
        try:
            return name, self.processor(source_of(name).open(self.processor.shrink)), ""
        except OSError as error:
            return name, None, error.strerror or str(error).removeprefix(f"cannot read the image {name}: ")

    def collate(self, found: Sequence[tuple[str, Tensor | None, str]]) -> NamedBatch:
        readable = [(name, pixels) for name, pixels, _ in found if pixels is not None]
        images = stack([pixels for _, pixels in readable], self.processor)
        errors = {name: error for name, pixels, error in found if pixels is None}
        return NamedBatch(images, [name for name, _ in readable], errors)


def named_batches(
    names: Iterable[list[str]], processor: ImageProcessor, num_workers: int, pin_memory: bool
) -> Iterator[NamedBatch]:
    """A batch for each list of names, decoded in `num_workers` processes. Lists are asked for by this thread, two for
    each worker ahead."""
    reader = _Reader(processor)
    return iter(
        DataLoader(
            reader,
            batch_sampler=names,
            collate_fn=reader.collate,
            num_workers=num_workers,
            worker_init_fn=leave_signals_alone,
            pin_memory=pin_memory,
        )
    )
