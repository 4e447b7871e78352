"""Annotation files become records: an image with its captions."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from PIL import Image

from blipds.data.processors import Shrink, load_image
from blipds.errors import UserError

COCO_NUMBER = re.compile(r"_(\d{12})$")  # COCO_val2014_000000391895


class ImageSource(Protocol):
    """Where an image comes from; `str()` of it names the image in messages."""

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        """The image as RGB; OSError where it cannot be read. It may be smaller by `shrink(width, height)`."""


@dataclass(frozen=True)
class ImageFile:
    path: Path

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        return load_image(self.path, shrink)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Record:
    """One image. `captions` is empty where the annotations have none (nocaps)."""

    image: ImageSource
    captions: tuple[str, ...]
    image_id: str | int


@dataclass(frozen=True)
class Annotations:
    """`pairs`: (record, caption) indices in the order of the file, which `run.shuffle: false` keeps."""

    records: list[Record]
    pairs: list[tuple[int, int]]

    def limited(self, images: int | None) -> "Annotations":
        """The first `images` images only."""
        if images is None or images >= len(self.records):
            return self
        return Annotations(self.records[:images], [pair for pair in self.pairs if pair[0] < images])


def annotations_of(records: list[Record]) -> Annotations:
    return Annotations(records, [(i, k) for i, record in enumerate(records) for k in range(len(record.captions))])


def read_annotations(paths: Sequence[Path], image_root: Path, captions_needed: bool) -> Annotations:
    """Reads LAVIS's flat lists: {image, caption, image_id} a pair, or {image, caption: [...]} an image.

    Entries of the same image become one record. With `captions_needed` every entry has a caption; else all or none
    have. Raises UserError naming file and entry.
    """
    if not image_root.is_dir():
        raise UserError(f"no such image folder: {image_root} (datasets.<name>.images, or below env.cache_root)")
    images: dict[str, tuple[str | int, list[str]]] = {}
    order: list[tuple[str, int]] = []
    for path in paths:
        for number, entry in enumerate(read_list(path)):
            place = f"{path}, entry {number}"
            image, image_id, captions = read_entry(entry, place)
            if captions_needed and not captions:
                raise UserError(f"{place} ({image}) has no caption")
            _, collected = images.setdefault(image, (image_id, []))
            for caption in captions:
                order.append((image, len(collected)))
                collected.append(caption)
    without = [image for image, (_, captions) in images.items() if not captions]
    if without and len(without) < len(images):
        raise UserError(f"{paths[0]}: {len(without)} images have no caption, others have; the first is {without[0]}")
    root = os.path.abspath(image_root)  # noqa: PTH100 (the root may be a link)
    records = [
        Record(ImageFile(inside(root, image)), tuple(captions), image_id)
        for image, (image_id, captions) in images.items()
    ]
    index = {image: number for number, image in enumerate(images)}
    return Annotations(records, [(index[image], caption) for image, caption in order])


def read_list(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such annotation file: {path} (relative paths start at env.cache_root)") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"annotation file {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"annotation file {path}: expected a list of entries like {{'image', 'caption', 'image_id'}}")
    return entries


def read_entry(entry: Any, place: str) -> tuple[str, str | int, list[str]]:
    """(image, image id, captions) of one entry"""
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or not entry["image"]:
        raise UserError(f"{place}: expected an object with 'image', a file name; got {str(entry)[:80]}")
    image = entry["image"]
    captions = entry.get("caption", [])
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{place} ({image}): 'caption' is neither a text nor a list of texts")
    image_id = entry.get("image_id", entry.get("img_id"))
    if image_id is None:
        stem = str(PurePosixPath(image).with_suffix(""))
        number = COCO_NUMBER.search(stem)
        image_id = int(number[1]) if number else stem
    if not isinstance(image_id, str | int):
        raise UserError(f"{place} ({image}): 'image_id' is {image_id!r}; expected a text or a whole number")
    return image, image_id, [caption for caption in captions if caption.strip()]


def inside(root: str, image: str) -> Path:
    """The path of an image, which must not leave its root."""
    path = os.path.normpath(f"{root}/{image}")
    if os.path.commonpath([root, path]) != root or "\0" in image:
        raise UserError(f"image {image!r} lies outside of the image folder {root}")
    return Path(path)
