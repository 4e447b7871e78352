"""Where captions go: JSON Lines, CSV, or a .txt beside each image; each can be gone on with after a break."""

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blipds.captioning.inputs import NamedImage, Names, is_address
from blipds.errors import UserError
from blipds.files.download import cache_name

Settings = Mapping[str, Any]


class CaptionSink(Protocol):
    def take(self, image: NamedImage) -> bool:
        """Whether the image is still to be captioned; asked once for each image, in order."""

    def write(self, image: NamedImage, captions: list[str]) -> None: ...

    def flush(self) -> None:
        """Hands what was written over to the system: a later SIGKILL takes nothing of it."""


class StandardOutput:
    """JSON Lines on standard output, each image once."""

    def __init__(self) -> None:
        self.names = Names()

    def take(self, image: NamedImage) -> bool:
        return self.names.add(image.name)

    def write(self, image: NamedImage, captions: list[str]) -> None:
        sys.stdout.buffer.write(json_line(image.name, captions).encode())

    def flush(self) -> None:
        sys.stdout.buffer.flush()


class CaptionFile:
    """One file, .jsonl or .csv, in the order of the images; `<file>.settings.json` says what wrote it.

    One that is there is gone on with: a last line that a kill tore is cut off, and the images that it holds are not
    captioned again. They are known by a hash in a temporary file, so that memory does not grow with them. UserError
    where the file was written with other settings, by something else, or is being written by another process.
    """

    def __init__(self, path: Path, settings: Settings, num_captions: int, force: bool = False) -> None:
        self.path = path
        self.is_csv = path.suffix.lower() == ".csv"
        if not self.is_csv and path.suffix.lower() != ".jsonl":
            raise UserError(f"--output {path}: captions are written as .jsonl or .csv")
        stated = path.with_name(path.name + ".settings.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = path.open("a+b")
            self._lock()
            if force:
                self.file.truncate(0)
            if path.stat().st_size:
                check_settings(stated, settings, path)
            else:
                write_settings(stated, settings)
            self.names = Names()
            self._go_on()
            if self.is_csv and not path.stat().st_size:
                captions = [f"caption_{k + 1}" for k in range(num_captions)] if num_captions > 1 else ["caption"]
                self.file.write(csv_line(["image", *captions]))
        except OSError as error:
            raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {self.path}: another process is writing it") from None

    def _go_on(self) -> None:
        """Notes the images that the file holds and cuts off what is no whole line."""
        self.file.seek(0)
        whole = 0
        for number, record in enumerate(records(self.file, self.is_csv), start=1):
            name = record_name(record, self.is_csv)
            if name is None:
                raise UserError(f"--output {self.path}: line {number} is none of this command's; give another file")
            if not (self.is_csv and number == 1):
                self.names.add(name)
            whole += len(record)
        self.file.truncate(whole)
        self.file.seek(0, os.SEEK_END)

    def take(self, image: NamedImage) -> bool:
        return self.names.add(image.name)

    def write(self, image: NamedImage, captions: list[str]) -> None:
        line = csv_line([image.name, *captions]) if self.is_csv else json_line(image.name, captions).encode()
        try:
            self.file.write(line)
        except OSError as error:
            raise self._full(error) from error

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            raise self._full(error) from error

    def _full(self, error: OSError) -> UserError:
        return UserError(f"--output {self.path}: {error.strerror}; the same command goes on from here later")


class Sidecars:
    """A .txt with a caption a line for each image: beside it, or below `folder` as the image lies below what was named.

    A .txt that is there stays as it is, whoever wrote it. `.captions.json`, in `folder` or in each folder that was
    named, says with which settings; UserError where they are others.
    """

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.targets = Names()  # a.jpg and a.png have the same one
        self.checked = lru_cache(maxsize=10_000)(self._check)

    def take(self, image: NamedImage) -> bool:
        target = self.path(image)
        self.checked(self.folder or Path(image.below or target.parent))
        there = target.is_file() and target.stat().st_size > 0  # one without a byte is of a power cut
        return self.targets.add(str(target)) and not there

    def path(self, image: NamedImage) -> Path:
        name = Path(image.name)
        if self.folder is None:
            if is_address(image.name):
                raise UserError(f"{image.name}: nothing lies beside an address; give --sidecar FOLDER")
            return name.with_suffix(".txt")
        if is_address(image.name):
            return (self.folder / cache_name(image.name)).with_suffix(".txt")
        below = os.path.relpath(image.name, image.below) if image.below else name.name
        return (self.folder / below).with_suffix(".txt")

    def _check(self, folder: Path) -> None:
        stated = folder / ".captions.json"
        try:
            if stated.exists():
                check_settings(stated, self.settings, folder)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_settings(stated, self.settings)
        except OSError as error:
            raise UserError(f"--sidecar: {folder} cannot be written ({error.strerror or error})") from error

    def write(self, image: NamedImage, captions: list[str]) -> None:
        path = self.path(image)
        partial = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise UserError(f"--sidecar: {path} cannot be written ({error.strerror or error})") from error

    def flush(self) -> None:
        """Each file is whole when it is there."""


# --- settings --------------------------------------------------------------------------------------------------------


def write_settings(path: Path, settings: Settings) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_settings(path: Path, settings: Settings, output: Path) -> None:
    """UserError where what `path` states differs from `settings`."""
    if not path.exists():
        raise UserError(f"{output} is there already, and not by this command ({path.name} is missing); give another")
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(stated.keys() | settings.keys())
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not the settings of captions ({error})") from error
    others = [f"{name} {stated.get(name)!r}, now {settings.get(name)!r}" for name in names
              if stated.get(name) != settings.get(name)]  # fmt: skip
    if others:
        raise UserError(f"{output} holds captions with other settings ({'; '.join(others)}); give another output")


# --- lines -----------------------------------------------------------------------------------------------------------


def json_line(name: str, captions: list[str]) -> str:
    value = {"image": name, "caption": captions[0]} if len(captions) == 1 else {"image": name, "captions": captions}
    line = json.dumps(value, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in name):  # a file name that is no UTF-8
        line = json.dumps(value)
    return line + "\n"


def csv_line(cells: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return os.fsencode(text.getvalue())


def records(file: BinaryIO, is_csv: bool) -> Iterator[bytes]:
    """Whole lines; of CSV, with the line ends that a quoted name holds. What a kill tore is left out."""
    record = b""
    for line in file:
        record += line
        if record.endswith(b"\n") and not (is_csv and record.count(b'"') % 2):
            yield record
            record = b""


def record_name(record: bytes, is_csv: bool) -> str | None:
    """The image of a line; None where it is no line of `CaptionFile`'s."""
    try:
        if is_csv:
            cells = next(csv.reader(io.StringIO(os.fsdecode(record), newline="")))
            return cells[0] if len(cells) > 1 else None
        name = json.loads(record)["image"]
    except (ValueError, KeyError, TypeError, StopIteration, csv.Error):
        return None
    return name if isinstance(name, str) else None
