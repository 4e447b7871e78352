"""The files of the standard datasets: annotations are fetched on first use, images by launch/prepare_data.py."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from blipds import distributed
from blipds.config.sections import ArchiveConfig, Config, DatasetConfig
from blipds.data.annotations import ImageFile, read_annotations, read_splits
from blipds.errors import UserError
from blipds.files.archives import BadFile, unpack
from blipds.files.download import cache_name, check_address, fetch, file_md5, locked
from blipds.files.paths import user_path

DATASETS = {  # launch/prepare_data.py's names -> the names in run configs
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


# --- on first use ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file at `path`, and where it comes from; `member` as in AnnotationConfig, `md5` of the download."""

    split: str
    url: str
    md5: str | None
    member: str | None
    path: Path

    def fetch(self, downloads: Path) -> None:
        """Downloads it, unless another process did so meanwhile. UserError, with the place to put the file by hand."""
        try:
            with locked(downloads / f"{self.path.name}.lock"):
                if self.path.exists():
                    return
                by_hand = self.path if self.member is None else self.path.parent.parent / Path(self.url).name
                with obtained(self.url, by_hand, downloads, md5=self.md5) as file:
                    if self.member is None:
                        if self.path.suffix == ".json":
                            check_json(file)
                        place(file, self.path)
                    else:
                        write_split(file, self.member, self.split, self.path, downloads)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error


def annotation_files(dataset: DatasetConfig, root: Path) -> list[AnnotationFile]:
    """Those that have an address; `root` is `env.cache_root`."""
    return [
        AnnotationFile(split, url, md5, files.member, root / user_path(storage))
        for split, files in dataset.build_info.annotations.items()
        for url, md5, storage in zip(files.url, files.md5 or repeat(None), files.storage, strict=False)
    ]


def fetch_annotations(config: Config, splits: Collection[str], say: Callable[[str], None]) -> None:
    """Downloads what is missing of these splits' annotation files, where they have an address. Collective.

    One rank a node downloads. UserError, on every rank: a download failed, or a standard set has no image folder.
    """
    root = user_path(config.env.cache_root)
    with distributed.raising_together():
        for name, dataset in config.datasets.items() if distributed.local_rank() == 0 else ():
            files = [file for file in annotation_files(dataset, root) if file.split in splits]
            images = dataset.images or dataset.build_info.images.storage
            if files and images is not None:
                check_images(name, config, [root / user_path(images)])
            for file in files:
                if not file.path.exists():
                    file.fetch(root / "downloads")
                    say(f"data       {file.path}: {file.path.stat().st_size / 1e6:.1f} MB from {file.url}")


def check_images(name: str, config: Config, paths: Sequence[Path]) -> None:
    """UserError where `name` is a standard set, and none of these images (or image folders) is there."""
    commands = [command for command, dataset in DATASETS.items() if dataset == name]
    if commands and paths and not any(path.exists() for path in paths):
        raise UserError(
            f"no such images: {paths[0]}; python launch/prepare_data.py {commands[0]} --root {config.env.cache_root} "
            f"gets them, datasets.{name}.images names another folder"
        )


@contextmanager
def obtained(url: str, by_hand: Path, downloads: Path, **checks: Any) -> Iterator[Path]:
    """The file `by_hand` if somebody has put it there, else the download (`checks` as of `fetch`).

    A download that turns out to be a bad file is removed: kept, it would never be downloaded again.
    """
    if by_hand.is_file():
        yield by_hand
        return
    try:
        check_address(url)
        path = fetch(url, downloads, **checks)
    except UserError as error:
        raise UserError(f"{error}. Where there is no network, put it at {by_hand}") from error
    try:
        yield path
    except BadFile:
        path.unlink()
        raise


def place(path: Path, target: Path) -> None:
    """Moves a file, across file systems too; `target` is there whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, staged := target.with_name(f".{target.name}.tmp"))
    staged.replace(target)


def check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path.name}: the server sent no JSON ({error})") from error


def write_split(archive: Path, member: str, split: str, path: Path, scratch: Path) -> None:
    """A split of Karpathy's file `member` in a zip as a list of {image, caption: [...], image_id}."""
    folder = scratch / f"{archive.name}-{split}"
    try:
        unpack(archive, folder, max_bytes=10 * ANNOTATION_BYTES, wanted=lambda name: name == member)
        splits = read_splits([folder / member], folder, None)
        if split not in splits:
            raise UserError(f"{archive}: {member} has no split '{split}'")
        entries = [
            {"image": Path(str(record.image)).name, "caption": list(record.captions), "image_id": record.image_id}
            for record in splits[split].records
        ]
        written = folder / path.name
        written.write_text(json.dumps(entries, ensure_ascii=False, indent=0), encoding="utf-8")
        place(written, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- launch/prepare_data.py ------------------------------------------------------------------------------------------


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
        self.root = root.absolute()
        self.downloads = self.root / "downloads"
        self.annotations = annotation_files(dataset, self.root)
        self.archives = dataset.build_info.images.archives
        assert dataset.build_info.images.storage is not None
        self.images = self.root / dataset.build_info.images.storage

    def missing(self) -> list[tuple[ArchiveConfig, Path, list[Path]]]:
        """Archives of which images are missing, with their folder and these images; all of them are the folder."""
        missing = self.missing_images()
        folders = [(archive, self.images / archive.target) for archive in self.archives]
        found = [(archive, folder, [p for p in missing if p.is_relative_to(folder)]) for archive, folder in folders]
        return [(archive, folder, absent) for archive, folder, absent in found if absent]

    def missing_images(self) -> list[Path]:
        """The images that the annotations name and that do not exist; without annotations, the empty folders."""
        if not self.images.is_dir() or not all(file.path.exists() for file in self.annotations):
            folders = [self.images / archive.target for archive in self.archives]
            return [folder for folder in folders if not folder.is_dir() or not any(folder.iterdir())]
        images = set()
        for file in self.annotations:
            annotations = read_annotations([file.path], self.images, file.split == "train", file.split)
            images |= {record.image.path for record in annotations.records if isinstance(record.image, ImageFile)}
        return sorted(image for image in images if not image.exists())

    def steps(self, with_images: bool) -> list[Step]:
        """What there is to do. UserError for an annotation file of other content than the published one."""
        steps = []
        for file in self.annotations:
            if not file.path.exists():
                do = partial(file.fetch, self.downloads)
                steps.append(Step(f"{file.path}  from {file.url}", ANNOTATION_BYTES, ANNOTATION_BYTES, do))
            elif file.md5 is not None and file.member is None and (other := file_md5(file.path)) != file.md5:
                raise UserError(
                    f"{file.path}: its md5 is {other}, not {file.md5} as published; remove it to download it again"
                )
        archives = [archive for archive, _, _ in self.missing()] if with_images else []
        return steps + [step for archive in archives if (step := self.archive_step(archive))]

    def archive_step(self, archive: ArchiveConfig) -> Step | None:
        """None where it can neither be downloaded nor lies in its place; `missing_lines` says what to do then."""
        by_hand, target, url = self.images.parent / archive.file, self.images / archive.target, archive.url or ""

        def do() -> None:
            checks = {"md5": archive.md5, "size": archive.size or None}
            with obtained(url, by_hand, self.downloads, **checks) as path:
                if path == by_hand and archive.md5 is not None and (found := file_md5(path)) != archive.md5:
                    raise UserError(f"{path}: its md5 is {found}, not {archive.md5}: damaged, or another file")
                unpack(path, target, archive.source, max_bytes=MOST_UNPACKED * path.stat().st_size)
                if path != by_hand:
                    path.unlink()

        if archive.file and by_hand.is_file():
            return Step(f"{target}  from {by_hand}, which stays", 0, by_hand.stat().st_size, do)
        part = self.downloads / (cache_name(url) + ".part")
        left = max(archive.size - (part.stat().st_size if part.exists() else 0), 0)
        return Step(f"{target}  from {url}", left, left + archive.size, do) if url else None

    def missing_lines(self) -> list[str]:
        """A line for each archive whose images are not all there: what is missing, and which file goes where."""
        lines = []
        for archive, folder, absent in self.missing():
            by_hand = self.images.parent / archive.file
            what = "all images" if absent == [folder] else f"{len(absent):,} images, such as {absent[0]}"
            remedy = f"{archive.request} says how to get them; put them into {folder}"
            if archive.url is not None:
                remedy = f"they are not in {archive.url}"
            elif archive.file:
                remedy = f"request {archive.file} at {archive.request}, put it at {by_hand} and run this command again"
            lines.append(f"{what}; {remedy}")
        return lines


def spice_steps(downloads: Path) -> list[Step]:
    """Stanford CoreNLP's two jars, into the folder of pycocoevalcap where SPICE looks for them."""
    from pycocoevalcap.spice import get_stanford_models

    assert get_stanford_models.__file__ is not None
    folder = Path(get_stanford_models.__file__).with_name("lib")
    jars = [f"{get_stanford_models.JAR}.jar", f"{get_stanford_models.JAR}-models.jar"]
    if all((folder / jar).is_file() for jar in jars):
        return []

    def do() -> None:
        source, wanted = get_stanford_models.CORENLP, lambda name: name in jars
        with obtained(CORENLP, downloads / Path(CORENLP).name, downloads) as archive:
            unpack(archive, folder, source, max_bytes=2 * SPICE_BYTES, wanted=wanted)
            archive.unlink()

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
