"""The images that somebody names: files, folders, addresses, and names on standard input, which need not end.

Memory does not grow with their number: the names in a folder are sorted in a temporary file.
"""

import io
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from blipds.data.images import Images, stack
from blipds.data.processors import ImageProcessor, load_image
from blipds.data.sources import is_hidden, is_image
from blipds.errors import UserError
from blipds.files.download import read

MAX_IMAGE_BYTES = 200 << 20  # behind an address: they are held in memory


class NamedImage(NamedTuple):
    """`name`: a path or an address. `folder`: the named folder that holds it, "" for an image named itself."""

    name: str
    folder: str = ""


def check_named(given: Sequence[str]) -> None:
    """UserError for a path that does not exist: most likely a typing error."""
    for name in given:
        if name != "-" and not is_address(name) and not os.path.lexists(name):
            raise UserError(f"{name}: no such file or folder")


def named_images(given: Iterable[str], other_files: Counter[str]) -> Iterator[NamedImage]:
    """The images of files, folders, addresses and, for -, of a name on each line of standard input.

    A folder stands for the images in it and below, in the order of their paths. They are known by their suffix; the
    suffixes of its other files are counted in `other_files`, and hidden files ignored.
    """
    for name in given:
        if name == "-":
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            yield from named_images(filter(None, lines), other_files)
        elif is_address(name) or not os.path.isdir(name):  # noqa: PTH112 (a Path for each name is slow)
            yield NamedImage(name)
        else:
            folder = os.path.normpath(name)
            yield from (NamedImage(path, folder) for path in Names(images_below(folder, other_files)))


def is_address(name: str) -> bool:
    return "://" in name


def images_below(folder: str, other_files: Counter[str], above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths in no particular order. A folder that cannot be read and a broken link are among them: opening them says
    why. Pipes and devices are not: opening one may wait for ever.

    `above`: the real paths of the folders on the way here; a link back to one of them is not followed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                link = Path(entry.path) if entry.is_symlink() else None  # a DirEntry that links to itself raises
                if (link or entry).is_dir():
                    yield from images_below(entry.path, other_files, (*above, real))
                elif not is_image(entry.name):
                    other_files[os.path.splitext(entry.name)[1]] += 1  # noqa: PTH122
                elif (link or entry).is_file() or (link and not link.exists()):
                    yield entry.path
    except OSError:
        yield folder


class Names:
    """A set of names that gives them in order. It lies in a temporary file that sqlite removes: about 100 bytes a name
    there, 2 MB of memory."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE name (name BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")  # never committed: nothing is to last
        for name in names:
            self.add(name)

    def add(self, name: str) -> bool:
        """Whether it is new."""
        return self._database.execute("INSERT OR IGNORE INTO name VALUES (?)", (os.fsencode(name),)).rowcount == 1

    def __iter__(self) -> Iterator[str]:
        for (name,) in self._database.execute("SELECT name FROM name ORDER BY name"):
            yield os.fsdecode(name)


Sample = tuple[NamedImage, Tensor | str]  # its pixels, or why it cannot be read


class ImageReader(Dataset[Sample]):
    """Samples by named image."""

    def __init__(self, processor: ImageProcessor) -> None:
        self.processor = processor

    def __getitem__(self, image: NamedImage) -> Sample:
        try:
            content = io.BytesIO(read(image.name, max_bytes=MAX_IMAGE_BYTES)) if is_address(image.name) else None
            return image, self.processor(load_image(image.name, self.processor.shrink, content))
        except (OSError, UserError) as error:
            reason = str(getattr(error, "strerror", None) or error)
            return image, reason.removeprefix("cannot read the image ").removeprefix(f"{image.name}: ")

    def collate(self, samples: Sequence[Sample]) -> tuple[Images, list[NamedImage], list[tuple[str, str]]]:
        """The images that can be read, stacked; the same by name; and (name, why it cannot be read) of the others."""
        readable = [(image, found) for image, found in samples if isinstance(found, Tensor)]
        errors = [(image.name, found) for image, found in samples if isinstance(found, str)]
        pixels = stack([found for _, found in readable], self.processor)
        return pixels, [image for image, _ in readable], errors
