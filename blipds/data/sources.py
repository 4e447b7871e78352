"""Where an image comes from: a file below an image folder, or a stretch of a tar shard."""

import io
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from PIL import Image

from blipds.data.processors import FORMATS, Shrink, load_image
from blipds.errors import CONTROL, UserError

# by which the images of a folder and of a shard are known; those of formats that this Pillow may lack
SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
OPTIONAL_SUFFIXES = {".avif": "AVIF", ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF"}
OTHER_IMAGES = {  # that people keep, and nothing here reads
    *(".jxl", ".svg", ".psd", ".xcf", ".tga", ".ico", ".eps", ".exr", ".hdr", ".dcm", ".fits", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *OPTIONAL_SUFFIXES,
} - SUFFIXES


class ImageSource(Protocol):
    """Where an image comes from; `str()` of it names the image in messages. Hashable: equal sources are one image."""

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        """The image as RGB; OSError where it cannot be read. It may be smaller by `shrink(width, height)`."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file, or `member` of a tar shard: `size` bytes from `offset` of it, read without looking at the rest."""

    path: Path
    member: str = ""
    offset: int = 0
    size: int = 0

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        if not self.member:
            return load_image(self.path, shrink)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return load_image(str(self), shrink, data=io.BytesIO(file.read(self.size)))

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


class ImageFolder:
    """Gives the images of a folder by their names in an annotation file. UserError for names that lead out of it.

    A name that no file has is looked for by `loose_key`. Which files are there, a listing of each folder says: one
    call a folder, not one an image.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no such image folder: {folder} (datasets.<name>.images, or below env.cache_root)")
        self.root = os.path.abspath(folder)  # noqa: PTH100 (the root may be a link)
        self.images: dict[str, ImageFile] = {}
        self.listings: dict[str, set[str]] = {}
        self.by_loose_key: dict[str, str | None] | None = None
        self.mended: list[tuple[str, str]] = []
        self.unread: Counter[str] = Counter()

    def __call__(self, name: str) -> ImageFile:
        if name not in self.images:
            path = inside(self.root, name)
            if not self.exists(path) and (found := self.look_for(name)):
                self.mended.append((name, found))
                path = inside(self.root, found)
            if suffix := unread_suffix(name):
                self.unread[suffix] += 1
            self.images[name] = ImageFile(path)
        return self.images[name]

    def exists(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.listings:
            try:
                self.listings[folder] = set(os.listdir(folder))  # noqa: PTH208
            except OSError:
                self.listings[folder] = set()
        return name in self.listings[folder]

    def look_for(self, name: str) -> str | None:
        """The one file that has this name but for its spelling. The first call looks through the whole folder."""
        if self.by_loose_key is None:
            self.by_loose_key = {}
            for found in files_in(self.root):
                key = loose_key(found)
                self.by_loose_key[key] = None if key in self.by_loose_key else found
        path = os.path.normpath(name.replace("\\", "/"))
        return self.by_loose_key.get(loose_key(path.removeprefix(f"{self.root}/")))

    def notices(self) -> list[str]:
        lines = passed_over(self.unread)
        if self.mended:
            name, found = self.mended[0]
            lines.append(
                f"{len(self.mended)} image names differ from the file that is there by letter case, Unicode form, "
                f"backslashes or URL quoting, and are read; the first: {name!r} is {found!r}"
            )
        return lines


def loose_key(name: str) -> str:
    """Equal for names that differ by Unicode form, letter case, backslashes or URL quoting."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", unquote(name.replace("\\", "/"))).casefold())


def files_in(folder: str | Path) -> list[str]:
    """Names below a folder, in order, links followed but not in circles; hidden ones left out."""
    names: list[str] = []
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(folders)
        if real not in seen:
            below = os.path.relpath(here, folder)
            names += [name if below == "." else f"{below}/{name}" for name in files]
        seen.add(real)
    return sorted(name for name in names if not is_hidden(name))


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
    if not path.startswith(root.rstrip("/") + "/"):
        raise UserError(
            f"image {image!r} lies outside of the image folder {root}; where it is meant, give a folder above it as "
            f"datasets.<name>.images"
        )
    return Path(path)


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def unread_suffix(name: str) -> str | None:
    """The suffix of an image whose format is not read here; None for any other file."""
    suffix = os.path.splitext(name)[1]  # noqa: PTH122
    return suffix if suffix.lower() in OTHER_IMAGES else None


def passed_over(unread: Mapping[str, int]) -> list[str]:
    """A line about the images whose format is not read, from their number by suffix; no line where there are none."""
    if not unread:
        return []
    remedies = {"HEIF": "pip install pillow-heif reads HEIC", "AVIF": "Pillow 11.3 or later reads AVIF"}
    lacking = {OPTIONAL_SUFFIXES.get(suffix.lower()) for suffix in unread}
    hints = [remedy for form, remedy in remedies.items() if form in lacking] or ["convert them to JPEG or PNG"]
    count = sum(unread.values())
    counts = ", ".join(f"{suffix} ({number:,})" for suffix, number in sorted(unread.items()))
    files = "1 file" if count == 1 else f"{count:,} files"
    return [f"{files} passed over, of formats that are not read: {counts}; {'; '.join(hints)}"]


def is_hidden(name: str) -> bool:
    """.DS_Store, ._photo.jpg (what macOS puts beside a photograph) and the like, in any folder of the path."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
