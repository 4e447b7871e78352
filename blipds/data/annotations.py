"""Annotations of any layout become records: an image with its captions."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from blipds import distributed
from blipds.data.layouts import CAPTION_KEYS, Entry, canonical_split, read_layout
from blipds.data.sources import ImageFile, ImageSource
from blipds.errors import CONTROL, UserError

__all__ = ["Annotations", "ImageFile", "ImageSource", "Record", "annotations_of", "read_annotations"]

LONGEST_CAPTION = 10_000  # characters; METEOR would take hours over one of a hundred thousand
MOST_FILES = 100_000  # that braces may stand for
WORD = re.compile(r"\w")
BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}", re.ASCII)


@dataclass(frozen=True)
class Record:
    """One image. `captions` is empty where the annotations have none (nocaps)."""

    image: ImageSource
    captions: tuple[str, ...]
    image_id: str | int


@dataclass(frozen=True)
class Annotations:
    """`pairs`: (record, caption) indices in the order of the file, which `run.shuffle: false` keeps.

    `kinds`: what was read (blipds/data/layouts.py). `notices`: what was left out or mended, a line each.
    """

    records: list[Record]
    pairs: list[tuple[int, int]]
    kinds: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    def limited(self, images: int | None) -> "Annotations":
        """The first `images` images only."""
        if images is None or images >= len(self.records):
            return self
        pairs = [pair for pair in self.pairs if pair[0] < images]
        return replace(self, records=self.records[:images], pairs=pairs)


def annotations_of(records: list[Record]) -> Annotations:
    return Annotations(records, [(i, k) for i, record in enumerate(records) for k in range(len(record.captions))])


def read_annotations(
    paths: Sequence[Path],
    image_root: Path | None,
    captions_needed: bool,
    split: str | None = None,
    index_cache: Path | None = None,
) -> Annotations:
    """Reads files and folders of any layout; entries about the same image become one record.

    `image_root`: where image names start; None: the folder of the annotation file. `split`: which one to take of
    those that a layout names itself; None: all. `index_cache`: the folder that keeps the indices of shards.

    With `captions_needed` (training) images without a caption are left out with a notice; else all or none of the
    images have captions, and no two have one id. Raises UserError naming file and entry.
    """
    builder = RecordBuilder()
    wanted = None if split is None else canonical_split(split)
    others = set()
    for entry in entries_of(paths, image_root, index_cache, builder, wanted):
        if wanted is None or entry.split in (None, wanted):
            builder.add(entry)
        else:
            others.add(entry.split)
    if not builder.images:
        found = f"no split '{split}'; it has {', '.join(sorted(map(str, others)))}" if others else "no image in it"
        raise UserError("; ".join([f"{paths[0]}: {found}", *builder.notices]))
    annotations = builder.annotations()
    if captions_needed:
        return keep_captioned(annotations, paths[0])
    check_evaluable(annotations, paths[0])
    return annotations


def read_splits(paths: Sequence[Path], image_root: Path | None, index_cache: Path | None) -> dict[str, Annotations]:
    """All that is there, by split; what belongs to none is under "". Images without captions stay."""
    whole = RecordBuilder()
    splits: dict[str, RecordBuilder] = {}
    for entry in entries_of(paths, image_root, index_cache, whole, None):
        splits.setdefault(entry.split or "", RecordBuilder()).add(entry)
    for builder in splits.values():
        builder.kinds, builder.notices = whole.kinds, whole.notices
    return {split: builder.annotations() for split, builder in splits.items()}


class RecordBuilder:
    """Collects entries by image."""

    def __init__(self) -> None:
        self.numbers: dict[ImageSource, int] = {}
        self.images: list[tuple[str | int, list[str]]] = []
        self.pairs: list[tuple[int, int]] = []
        self.kinds: dict[str, None] = {}
        self.notices: list[str] = []
        self.blank: list[str] = []
        self.cut: list[str] = []

    def add(self, entry: Entry) -> None:
        number = self.numbers.setdefault(entry.source, len(self.images))
        if number == len(self.images):
            self.images.append((entry.image_id, []))
        captions = self.images[number][1]
        for text in entry.captions:
            caption = CONTROL.sub(" ", text).strip()
            if not WORD.search(caption):
                self.blank.append(entry.place)
                continue
            if len(caption) > LONGEST_CAPTION:
                self.cut.append(entry.place)
                caption = caption[:LONGEST_CAPTION]
            self.pairs.append((number, len(captions)))
            captions.append(caption)

    def annotations(self) -> Annotations:
        pairs = zip(self.numbers, self.images, strict=True)
        records = [Record(source, tuple(texts), image_id) for source, (image_id, texts) in pairs]
        notices = list(self.notices)
        if self.blank:
            notices.append(f"{len(self.blank)} captions without a word left out; the first: {self.blank[0]}")
        if self.cut:
            notices.append(f"{len(self.cut)} captions cut to {LONGEST_CAPTION:,} characters; the first: {self.cut[0]}")
        return Annotations(records, self.pairs, tuple(self.kinds), tuple(notices))


def entries_of(
    paths: Sequence[Path], image_root: Path | None, index_cache: Path | None, builder: RecordBuilder, split: str | None
) -> Iterator[Entry]:
    """The entries of all files; notes their kinds and notices in `builder`. A bar shows where it takes a while."""
    # a file that has braces in its name goes first
    files = [file for path in paths for file in ([path] if path.exists() else map(Path, expand_braces(str(path))))]
    hidden = None if distributed.is_main() and len(files) > 1 else True
    for path in tqdm(files, desc="annotations", unit="file", delay=3, leave=False, disable=hidden):
        kind, entries = read_layout(path, image_root, builder.notices, split, index_cache)
        builder.kinds[kind] = None
        yield from entries


def expand_braces(text: str) -> list[str]:
    """shards/{000..012}.tar as a shell reads it."""
    found = BRACES.search(text)
    if found is None:
        return [text]
    first, last = int(found[1]), int(found[2])
    if last - first >= MOST_FILES:
        raise UserError(f"{text} stands for {last - first + 1:,} files; at most {MOST_FILES:,} are read")
    numbers = (str(number).zfill(len(found[1])) for number in range(first, last + 1))
    return [file for number in numbers for file in expand_braces(text[: found.start()] + number + text[found.end() :])]


def keep_captioned(annotations: Annotations, path: Path) -> Annotations:
    """The images that have a caption, for training."""
    without = [record for record in annotations.records if not record.captions]
    if not without:
        return annotations
    if len(without) == len(annotations.records):
        reason = (
            f"{path}: no image has a caption ({len(without)} images; keys and columns that are read: "
            f"{', '.join(CAPTION_KEYS)}, with an s or a number too)"
        )
        raise UserError("; ".join([reason, *annotations.notices]))
    kept = [number for number, record in enumerate(annotations.records) if record.captions]
    moved = {number: place for place, number in enumerate(kept)}
    notice = f"{len(without)} images without a caption left out; the first: {without[0].image}"
    return replace(
        annotations,
        records=[annotations.records[number] for number in kept],
        pairs=[(moved[number], caption) for number, caption in annotations.pairs],
        notices=(*annotations.notices, notice),
    )


def check_evaluable(annotations: Annotations, path: Path) -> None:
    """Scores over part of the images would not be comparable, and results are told apart by their ids."""
    without = [record for record in annotations.records if not record.captions]
    if without and len(without) < len(annotations.records):
        raise UserError(f"{path}: {len(without)} images have no caption, others have; the first is {without[0].image}")
    if twice := same_id(annotations.records):
        image_id, first, second = twice[0]
        raise UserError(f"{path}: the image_id {image_id} belongs to two images, {first.image} and {second.image}")


def same_id(records: Sequence[Record]) -> list[tuple[str, Record, Record]]:
    """(id, first image, other image) for each image whose id an earlier one has."""
    seen: dict[str, Record] = {}
    pairs = ((str(record.image_id), seen.setdefault(str(record.image_id), record), record) for record in records)
    return [(image_id, first, record) for image_id, first, record in pairs if first is not record]
