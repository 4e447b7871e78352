"""Where an image comes from: a file below an image folder, or a stretch of a tar shard."""

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from PIL import Image

from blipds.data.processors import Shrink, load_image
from blipds.errors import CONTROL, UserError

# by which the images of a folder and of a shard are known
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
}


class ImageSource(Protocol):
    """Where an image comes from; `str()` of it names the image in messages. Hashable: equal sources are one image."""

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        """The image as RGB; OSError where it cannot be read. It may be smaller by `shrink(width, height)`."""


@dataclass(frozen=True)
class ImageFile:
    path: Path

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        return load_image(self.path, shrink)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class ShardImage:
    """`size` bytes from `offset` of a tar shard: the member is read without looking at the rest."""

    shard: str
    member: str
    offset: int
    size: int

    @property
    def path(self) -> Path:
        """The file that changes where the image does."""
        return Path(self.shard)

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        with open(self.shard, "rb") as file:  # noqa: PTH123 (a Path costs as much as the open)
            file.seek(self.offset)
            return load_image(str(self), shrink, data=io.BytesIO(file.read(self.size)))

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"


def files_below(folder: Path) -> Callable[[str], ImageFile]:
    """name -> image; the same name gives the same object. Raises UserError for names that lead out of the folder."""
    if not folder.is_dir():
        raise UserError(f"no such image folder: {folder} (datasets.<name>.images, or below env.cache_root)")
    root = os.path.abspath(folder)  # noqa: PTH100 (the root may be a link)
    return cache(lambda name: ImageFile(inside(root, name)))


def inside(root: str, image: str) -> Path:
    """The path of an image, which must not leave its root.

    Links below the root are followed wherever they lead: whoever made the folder put them there, as the cache of
    huggingface_hub does for every file. An absolute path is taken where it lies below the root.
    """
    path = os.path.normpath(os.path.join(root, image))  # noqa: PTH118 (a Path for each caption is slow)
    if CONTROL.search(image):
        raise UserError(f"image name {image!r} holds control characters")
    if path == root:
        raise UserError(f"image name {image!r} names the image folder {root} itself")
    if os.path.commonpath([root, path]) != root:
        raise UserError(
            f"image {image!r} lies outside of the image folder {root}; where it is meant, give a folder above it as "
            f"datasets.<name>.images"
        )
    return Path(path)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def is_hidden(name: str) -> bool:
    """.DS_Store, ._photo.jpg (what macOS puts beside a photograph) and the like, in any folder of the path."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
