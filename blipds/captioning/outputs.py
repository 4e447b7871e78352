"""Where captions go: JSON Lines, CSV, or a .txt beside each image. All but standard output can be continued later."""

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from blipds.captioning.confidence import Caption, Confidence
from blipds.captioning.inputs import NamedImage, Names, is_address
from blipds.errors import UserError
from blipds.files.download import cache_name
from blipds.files.replacing import replace_text


@contextmanager
def naming_errors() -> Iterator[None]:
    """UserError for an OSError: a full disk, somebody else's folder. A pipe that nobody reads is no error (cli.run)."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"the captions cannot be written: {error}") from error


class CaptionLines:
    """A line for each image, once: JSON on standard output.

    With at most `num_captions` captions an image; with `scores` also the model's confidence in each.
    """

    def __init__(
        self, file: BinaryIO | None = None, is_csv: bool = False, num_captions: int = 1, scores: bool = False
    ) -> None:
        self.file, self.is_csv = file or sys.stdout.buffer, is_csv
        self.num_captions, self.scores = num_captions, scores
        self.names = Names()

    def needs(self, image: NamedImage) -> bool:
        """Whether the image is still to be captioned; asked once for each, in order."""
        return self.names.add(image.name)

    @naming_errors()
    def write(self, captions: Iterable[tuple[NamedImage, list[Caption]]]) -> None:
        """What is written survives a SIGKILL. UserError for a full disk."""
        self.file.writelines(self.line(image.name, found) for image, found in captions)
        self.file.flush()

    def line(self, name: str, captions: Sequence[Caption]) -> bytes:
        values = self.values(captions)
        if self.is_csv:
            gaps = [""] * (self.num_captions - len(captions))
            return csv_line([name, *(cell for column in values.values() for cell in [*map(csv_cell, column), *gaps])])
        if self.num_captions == 1:
            line: dict[str, Any] = {"image": name, **{key: found[0] for key, found in values.items()}}
        else:
            line = {"image": name, "captions": values.pop("caption"), **values}
        try:
            return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
        except UnicodeEncodeError:  # a file name that is not UTF-8
            return f"{json.dumps(line)}\n".encode()

    def header(self) -> bytes:
        """The names of a CSV's columns."""
        numbers = [f"_{k + 1}" for k in range(self.num_captions)] if self.num_captions > 1 else [""]
        return csv_line(["image", *(f"{key}{number}" for key in self.values([]) for number in numbers)])

    def values(self, captions: Sequence[Caption]) -> dict[str, list[Any]]:
        """What is written of captions, by key."""
        found: dict[str, list[Any]] = {"caption": [caption.text for caption in captions]}
        if self.scores:
            fields = [{} if caption.confidence is None else caption.confidence.fields() for caption in captions]
            found |= {key: [one.get(key) for one in fields] for key in Confidence.KEYS}
        return found


def csv_line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return os.fsencode(text.getvalue())


def csv_cell(value: Any) -> Any:
    """Lists as JSON; csv writes nothing for None."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


class CaptionFile(CaptionLines):
    """One file, .jsonl or .csv, in the order of the images; `<file>.settings.json` keeps how they were captioned.

    An existing file is continued: a last line that a kill tore is cut off, and images that the file names are not
    captioned again. UserError where it was written with other settings, by another program, or is being written now.
    """

    @naming_errors()
    def __init__(
        self, path: Path, settings: Mapping[str, Any], num_captions: int, force: bool = False, scores: bool = False
    ) -> None:
        suffix = path.suffix.lower()
        if suffix not in (".csv", ".jsonl"):
            raise UserError(f"--output {path}: captions are written as .jsonl or .csv")
        kept = path.with_name(path.name + ".settings.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        super().__init__(path.open("a+b"), suffix == ".csv", num_captions, scores)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {path}: another process is writing it") from None
        if force or path.stat().st_size == 0:
            self.file.truncate(0)
            kept.unlink(missing_ok=True)
        elif not kept.exists():
            raise UserError(f"{path} was not written by this command ({kept.name} is missing); give another file")
        keep_settings(kept, settings, path)
        self._continue(path)
        if self.is_csv and self.file.tell() == 0:
            self.file.write(self.header())

    def _continue(self, path: Path) -> None:
        """Notes the images that the file names, cuts off an incomplete last line and goes to the end."""
        self.file.seek(0)
        line, end, number = b"", 0, 0
        for piece in self.file:
            line += piece
            if not line.endswith(b"\n") or (self.is_csv and line.count(b'"') % 2):  # CSV quotes line ends
                continue
            number += 1
            try:
                name = next(csv.reader([os.fsdecode(line)]))[0] if self.is_csv else json.loads(line)["image"]
                if not (self.is_csv and number == 1):
                    self.names.add(name)
            except (ValueError, LookupError, TypeError, csv.Error):
                raise UserError(f"--output {path}: line {number} is not this command's; give another file") from None
            end += len(line)
            line = b""
        self.file.truncate(end)
        self.file.seek(end)


class Sidecars:
    """A .txt with a caption a line for each image: beside it, or in `folder` where the image is in the named folder.

    An existing .txt stays as it is, whoever wrote it. `.captions.json`, in `folder` or in each named folder, keeps the
    settings; UserError where they differ.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.paths, self.folders = Names(), Names()

    @naming_errors()
    def needs(self, image: NamedImage) -> bool:
        path = self.path(image)
        folder = self.folder or Path(image.folder or path.parent)
        if self.folders.add(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            keep_settings(folder / ".captions.json", self.settings, folder)
        exists = path.is_file() and path.stat().st_size > 0  # a power cut leaves empty files
        return self.paths.add(str(path)) and not exists  # a.jpg and a.png have the same path

    def path(self, image: NamedImage) -> Path:
        if is_address(image.name):
            if self.folder is None:
                raise UserError(f"{image.name}: nothing lies beside an address; give --sidecar FOLDER")
            return (self.folder / cache_name(image.name)).with_suffix(".txt")
        if self.folder is None:
            return Path(image.name).with_suffix(".txt")
        return (self.folder / os.path.relpath(image.name, image.folder or Path(image.name).parent)).with_suffix(".txt")

    @naming_errors()
    def write(self, captions: Iterable[tuple[NamedImage, list[Caption]]]) -> None:
        for image, found in captions:
            path = self.path(image)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, "".join(f"{caption.text}\n" for caption in found))


CaptionOutput = CaptionLines | Sidecars


def keep_settings(path: Path, settings: Mapping[str, Any], output: Path) -> None:
    """Writes `path` or, where it exists, compares: UserError unless it holds the same. Raises OSError."""
    if not path.exists():
        replace_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: does not hold the settings of captions ({error})") from error
    names = sorted(name for name in kept.keys() | settings.keys() if kept.get(name) != settings.get(name))
    if names:
        changed = "; ".join(f"{name} {kept.get(name)!r}, now {settings.get(name)!r}" for name in names)
        raise UserError(f"{output} holds captions with other settings ({changed}); give another output")
