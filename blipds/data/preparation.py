"""The standard datasets, put where their packaged configs look: annotations, and images as far as they may be had."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipds.config.run import ArchiveConfig, DatasetConfig
from blipds.data.annotations import read_annotations, read_splits
from blipds.data.sources import ImageFile
from blipds.errors import UserError
from blipds.files.archives import BadArchive, unpack
from blipds.files.download import cache_name, fetch, file_md5

DATASETS = {
    "coco": "coco_caption",
    "flickr30k": "flickr30k_caption",
    "flickr8k": "flickr8k_caption",
    "nocaps": "nocaps",
}
ANNOTATION_BYTES = 100_000_000  # of a file, at most; for the estimate
SPICE_BYTES = 1_000_000_000  # CoreNLP's zip and the two jars of it, roughly
SPEEDS = (10, 100)  # MB/s, for the estimate
MOST_UNPACKED = 20  # times the size of an archive; JPEGs come to once, captions to eight times
CORENLP = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"


@dataclass
class Step:
    """Something to do: a line about it, bytes to download, bytes that it needs on the disk, and how."""

    line: str
    download: int
    disk: int
    do: Callable[[], None]


class StandardSet:
    """One of DATASETS below `root`, which is `env.cache_root` of the runs that use it."""

    def __init__(self, dataset: DatasetConfig, root: Path) -> None:
        self.dataset, self.root = dataset, root.absolute()
        self.downloads = self.root / "downloads"
        assert dataset.build_info.images.storage is not None
        self.images = self.root / dataset.build_info.images.storage

    # --- what is there

    def annotation_files(self) -> Iterator[tuple[str, str, str | None, str | None, Path]]:
        """(split, url, md5, member, path)"""
        for split, files in self.dataset.build_info.annotations.items():
            for index, (url, storage) in enumerate(zip(files.url, files.storage, strict=True)):
                yield split, url, files.md5[index] if files.md5 else None, files.member, self.root / storage

    def missing_images(self) -> dict[str, tuple[int, Path]]:
        """Archive target -> how many images that annotations name are not there, and the first of them.

        Where nothing names them yet: 0 and the folder, if that is empty.
        """
        missing: dict[str, tuple[int, Path]] = {}
        files = list(self.annotation_files())
        targets = [archive.target for archive in self.dataset.build_info.images.archives]
        if not self.images.is_dir() or not all(path.exists() for *_, path in files):
            for target in targets:
                folder = self.images / target
                if not folder.is_dir() or not any(folder.iterdir()):
                    missing[target] = (0, folder)
            return missing
        for split, *_, path in files:
            for record in read_annotations([path], self.images, split == "train", split).records:
                assert isinstance(record.image, ImageFile)
                image = record.image.path
                if not image.exists():
                    below = image.relative_to(self.images).parts[0]
                    target = below if below in targets else ""
                    count, first = missing.get(target, (0, image))
                    missing[target] = (count + 1, first)
        return missing

    def place_of(self, archive: ArchiveConfig) -> Path:
        """Where an archive that was had by hand is looked for."""
        return self.images.parent / archive.file

    # --- what there is to do

    def steps(self, with_images: bool) -> list[Step]:
        """UserError for an annotation file of other content than the published one."""
        found = [
            step
            for split, url, md5, member, path in self.annotation_files()
            if (step := self.annotation_step(split, url, md5, member, path)) is not None
        ]
        if with_images:
            missing = self.missing_images()
            for archive in self.dataset.build_info.images.archives:
                if archive.target in missing and (step := self.archive_step(archive)) is not None:
                    found.append(step)
        return found

    def annotation_step(self, split: str, url: str, md5: str | None, member: str | None, path: Path) -> Step | None:
        if path.exists():
            if md5 is not None and (other := file_md5(path)) != md5:
                raise UserError(f"{path}: its md5 is {other}, not {md5} as published; take it away to download it anew")
            return None

        def do() -> None:
            if member is None:
                place(self.download(url, path, md5=md5, check=readable_json), path)
                return
            by_hand = self.images.parent / url.rpartition("/")[2]
            archive = by_hand if by_hand.is_file() else self.download(url, by_hand)
            try:
                write_split(archive, member, split, path, self.downloads)
            except BadArchive:
                if archive != by_hand:
                    archive.unlink()
                raise

        return Step(f"{path}  from {url}", ANNOTATION_BYTES, ANNOTATION_BYTES, do)

    def archive_step(self, archive: ArchiveConfig) -> Step | None:
        """None where it can neither be downloaded nor lies in its place: `by_hand` says so."""
        placed = self.place_of(archive)
        target = self.images / archive.target
        if archive.file and placed.is_file():
            size = placed.stat().st_size

            def take() -> None:
                if archive.md5 is not None and (found := file_md5(placed)) != archive.md5:
                    raise UserError(f"{placed}: its md5 is {found}, not {archive.md5}: damaged, or another file")
                unpack(placed, target, archive.source, max_bytes=MOST_UNPACKED * size)

            return Step(f"{target}  from {placed}, which stays", 0, size, take)
        if archive.url is None:
            return None
        url = archive.url

        def do() -> None:
            fetched = self.download(url, placed, md5=archive.md5, size=archive.size or None)
            unpack_download(fetched, target, archive.source, max_bytes=MOST_UNPACKED * fetched.stat().st_size)

        part = self.downloads / (cache_name(url) + ".part")
        left = archive.size - (part.stat().st_size if part.exists() else 0)
        return Step(f"{target}  from {url}", max(left, 0), max(left, 0) + archive.size, do)

    def download(
        self,
        url: str,
        by_hand: Path,
        md5: str | None = None,
        size: int | None = None,
        check: Callable[[Path], None] | None = None,
    ) -> Path:
        try:
            return fetch(url, self.downloads, md5=md5, size=size, check=check)
        except UserError as error:
            raise UserError(f"{error}. Where there is no network, put it at {by_hand}") from error

    def missing_lines(self) -> list[str]:
        """A line for each archive whose images are not all there: what is missing, and which file goes where."""
        lines = []
        missing = self.missing_images()
        for archive in self.dataset.build_info.images.archives:
            if archive.target in missing:
                count, first = missing[archive.target]
                there = f"{count:,} images, {first} for one" if count else f"all images, in {first}"
                lines.append(f"{there}; {self.how(archive)}")
        return lines

    def how(self, archive: ArchiveConfig) -> str:
        images = self.images / archive.target
        if archive.url is not None:
            return f"they are not in {archive.url}"
        if not archive.file:
            return f"{archive.request} says how to get them; put them into {images}"
        return (
            f"ask for {archive.file} at {archive.request}, put it at {self.place_of(archive)} and give this command "
            f"again (or put the images themselves into {images})"
        )

    def tidy(self) -> None:
        """Removes from `downloads` what is not needed any more."""
        for _, url, *_ in self.annotation_files():
            for name in (cache_name(url), f"{cache_name(url)}.lock"):
                (self.downloads / name).unlink(missing_ok=True)
        for archive in self.dataset.build_info.images.archives:
            if archive.url is not None:
                (self.downloads / f"{cache_name(archive.url)}.lock").unlink(missing_ok=True)
        with suppress(OSError):  # others have something in it, or it never was
            self.downloads.rmdir()


def place(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)


def unpack_download(archive: Path, target: Path, source: str, **options: Any) -> None:
    """As `unpack`; the archive goes when it is done, or when it is bad: kept, it would never be downloaded anew."""
    try:
        unpack(archive, target, source, **options)
    except BadArchive:
        archive.unlink()
        raise
    archive.unlink()


def readable_json(path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name.removesuffix('.part')}: the server sent no JSON ({error})") from error


def write_split(archive: Path, member: str, split: str, path: Path, scratch: Path) -> None:
    """A split of Karpathy's file `member` in a zip as a list of {image, caption: [...], image_id}."""
    folder = scratch / f"{archive.name}-{split}"
    try:
        unpack(archive, folder, max_bytes=10 * ANNOTATION_BYTES, wanted=lambda name: name == member, progress=False)
        splits = read_splits([folder / member], folder, None)
        if split not in splits:
            raise UserError(f"{archive}: {member} has no split '{split}'")
        entries = [
            {"image": Path(str(record.image)).name, "caption": list(record.captions), "image_id": record.image_id}
            for record in splits[split].records
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(entries, ensure_ascii=False, indent=0), encoding="utf-8")
    partial.replace(path)


def spice_steps(downloads: Path) -> list[Step]:
    """Stanford CoreNLP's two jars, into the folder of pycocoevalcap where SPICE looks for them."""
    from pycocoevalcap.spice import get_stanford_models

    assert get_stanford_models.__file__ is not None
    folder = Path(get_stanford_models.__file__).with_name("lib")
    jars = [f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar"]
    if all((folder / jar).is_file() for jar in jars):
        return []

    def do() -> None:
        archive = fetch(CORENLP, downloads)
        source, wanted = get_stanford_models.CORENLP, lambda name: name in jars
        unpack_download(archive, folder, source, max_bytes=2 * SPICE_BYTES, wanted=wanted)

    return [Step(f"{folder}  from {CORENLP}", SPICE_BYTES // 2, SPICE_BYTES, do)]


def announcement(steps: list[Step], root: Path) -> list[str]:
    """What is going to happen, for a person to say yes to. UserError where the disk is too small."""
    download, disk = sum(step.download for step in steps), sum(step.disk for step in steps)
    there = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if disk > free:
        raise UserError(f"{root}: {disk / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; give another --root")
    minutes = ", ".join(f"{download / speed / 60e6:.0f} min at {speed} MB/s" for speed in SPEEDS)
    return [
        *(step.line for step in steps),
        f"disk       {disk / 1e9:.1f} GB needed while it is unpacked, {free / 1e9:.1f} GB free",
        f"download   {download / 1e9:.1f} GB at most: {minutes}",
    ]
