"""What people keep captions in, told apart by its content: `read_layout` gives the entries of any of them.

run_configs/README.md, "Your own captions", has an example of each.
"""

import ast
import csv
import functools
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from blipds.data.shards import TEXTS, ShardSample, shard_index
from blipds.data.sources import ImageFile, ImageFolder, ImageSource, files_in, is_image, passed_over, unread_suffix
from blipds.errors import UserError

KINDS = (
    "COCO's JSON, Karpathy's dataset_*.json, a JSON list of {image, caption}, JSON Lines, a CSV or TSV with column "
    "names, Flickr's token file, a folder of images with .txt beside them, a folder with metadata.jsonl or "
    "metadata.csv, WebDataset's tar shards"
)
IMAGE_KEYS = ("image", "file_name", "filename", "image_name", "image_path")
ID_KEYS = ("image_id", "img_id")
CAPTION_KEYS = ("caption", "text", "comment", "sentence")  # each also with an s and a number: captions, caption_2
METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = {  # and the other names they go by: in the literature (restval), and on the Hugging Face hub
    "train": ("training", "restval"),
    "val": ("valid", "validation", "dev"),
    "test": ("testing", "eval", "evaluation"),
}
CANONICAL = {name: split for split, names in SPLITS.items() for name in (split, *names)}
# COCO_val2014_000000391895, val2017/000000001000; twelve digits below another folder may be anybody's
COCO_NUMBER = re.compile(r"(?:^|_|(?:^|/)(?:train|val|test)20\d\d/)(\d{12})$")
YEAR = re.compile(r"_?20\d\d$")  # of COCO's folders
TOKEN_LINE = re.compile(r"([^\t#]+)#\d+\t(.*)")
LIKE_A_LIST = re.compile(r"""\[\s*['"].*['"]\s*,?\s*\]\s*""", re.DOTALL)
TEXT = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LIST_OF_TEXTS = re.compile(rf"\[\s*{TEXT}(?:\s*,\s*{TEXT})*\s*,?\s*\]\s*", re.DOTALL)
DELIMITERS = "\t|,;"

Row = tuple[str, Any]  # where it is in its file ("line 3"), and an object: image, captions, id, split by name


@dataclass(frozen=True)
class Entry:
    """An image with captions of it; several entries may be about one image. `place` is for messages.

    `split` is None where the layout does not say: such an entry is in whatever split its file was given for.
    """

    source: ImageSource
    image_id: str | int
    captions: list[str]
    place: str
    split: str | None = None


def canonical_split(name: str) -> str:
    """train for train2017, training, ...; a name of the user's own as it is."""
    return CANONICAL.get(YEAR.sub("", name.strip().lower()), name)


def read_layout(
    path: Path, image_root: Path | None, notices: list[str], split: str | None = None, cache: Path | None = None
) -> tuple[str, Iterable[Entry]]:
    """Recognises what `path` is: its kind, and its entries, which are read as they are asked for.

    `image_root`: where the names in an annotation file start; None: the file's own folder. A folder and a shard bring
    their images along. `notices` is told what is left aside, a line each. `split`: the only one to look into, in a
    folder of splits; None: all. `cache`: the folder that keeps the indices of shards. Raises UserError, naming the file
    and the line or entry, for what it cannot make sense of.
    """
    if path.is_dir():
        return read_folder(path, notices, split, cache)
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        raise UserError(f"no such annotation file: {path} (relative paths start at env.cache_root)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"annotation file {path}: {error}") from error
    if head[257:262] == b"ustar" or (path.suffix == ".tar" and head):
        return "shards", shard_entries(path, None, cache, notices)
    if head[:2] == b"\x1f\x8b" or path.name.endswith((".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{path} is compressed: unpack it first (a shard must be plain tar to be read in any order)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unclear(path, f"it is no text in UTF-8: {error}") from error
    folder = ImageFolder(image_root if image_root is not None else path.parent)
    kind, rows = recognise(path, text)
    return kind, row_entries(rows, path, folder, notices)


def recognise(path: Path, text: str) -> tuple[str, Iterable[Row]]:
    """The kind of an annotation file, and its rows."""
    start = text.lstrip()
    if not start:
        raise unclear(path, "it is empty")
    if start[0] == "[":
        rows = parse(text, path)
        if not rows:
            raise unclear(path, "an empty list")
        return "list", ((f"entry {number}", row) for number, row in enumerate(rows))
    if start[0] == "{":
        first_line, _, rest = start.partition("\n")
        if rest.lstrip().startswith("{") and first_line.rstrip().endswith("}"):
            return "JSON Lines", ((place, parse(line, path, f", {place}")) for place, line in numbered_lines(text))
        content = parse(text, path)
        images = content.get("images")
        if isinstance(images, list) and images and isinstance(images[0], dict):
            return ("Karpathy", karpathy_rows(content)) if "sentences" in images[0] else ("COCO", coco_rows(content))
        if any(key in content for key in IMAGE_KEYS):  # a single line
            return "JSON Lines", [("line 1", content)]
        raise unclear(path, f"an object with {', '.join(map(repr, list(content)[:5])) or 'nothing in it'}")
    first = start.partition("\n")[0]
    if TOKEN_LINE.match(first):
        return "tokens", token_rows(text)
    for delimiter in DELIMITERS:
        cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
        named = any(cell.lower() in IMAGE_KEYS for cell in cells)
        if named or (len(cells) > 1 and is_image(cells[0])):
            return "table", table_rows(text, delimiter, None if named else ["image", "caption"])
    raise unclear(path, f"its first line {first[:60]!r} names no column {', '.join(IMAGE_KEYS)}")


def unclear(path: Path, reason: str) -> UserError:
    return UserError(f"annotation file {path}: cannot tell what it is ({reason}); what can be read: {KINDS}")


def parse(text: str, path: Path, place: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a whole number of more than 4,300 digits
        raise UserError(f"annotation file {path}{place}: {error}") from error


def numbered_lines(text: str) -> Iterator[tuple[str, str]]:
    """("line 3", its text) of all that are not blank."""
    return ((f"line {n}", line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())


# --- rows: objects of lists and JSON Lines, tables, COCO's and Karpathy's files --------------------------------------


def row_entries(rows: Iterable[Row], path: Path, folder: ImageFolder, notices: list[str]) -> Iterator[Entry]:
    try:
        for number, row in rows:
            place = f"{path}, {number}"
            name = None
            if isinstance(row, dict):
                name = next((row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "")), None)
            if not isinstance(name, str) or not name:
                raise expected("an object with 'image', a file name", row, number)
            named = f"{place} ({name})"
            yield Entry(folder(name), id_of(row, name, named), captions_of(row, named), place, split_of(row, named))
    except BadRow as error:
        raise UserError(f"{path}, {error}") from error
    notices += folder.notices()


class BadRow(UserError):
    """A row that does not fit its layout. The message begins with the place in the file."""


def expected(what: str, found: Any, place: str, hint: str = "") -> BadRow:
    return BadRow(f"{place}: expected {what}; got {str(found)[:80]}{hint}")


def split_of(row: dict[str, Any], place: str) -> str | None:
    split = row.get("split")
    if not isinstance(split, str | None):
        raise UserError(f"{place}: 'split' is {split!r}; expected the name of a split")
    return canonical_split(split) if split else None


def captions_of(row: dict[str, Any], place: str) -> list[str]:
    captions: list[str] = []
    for key in caption_keys(tuple(row)):
        value = row[key]
        if isinstance(value, str):
            captions += texts_in(value, f"{place}: '{key}'")
        elif isinstance(value, list) and all(isinstance(caption, str) for caption in value):
            captions += value
        elif value is not None:
            raise UserError(f"{place}: '{key}' is neither a text nor a list of texts")
    return captions


def texts_in(value: str, place: str) -> list[str]:
    """The texts of a list that was written as text, by JSON or, as pandas does, by Python; else the text itself."""
    if not value.startswith("[") or not LIKE_A_LIST.fullmatch(value):
        return [value]
    if LIST_OF_TEXTS.fullmatch(value):  # texts without a comma between them are one for literal_eval
        for parse_list in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError):
                return parse_list(value)
    raise UserError(f"{place} is a list written as text that cannot be read (JSON's and Python's can): {value[:80]}")


@functools.cache
def caption_keys(keys: tuple[str, ...]) -> list[str]:
    """Those that hold captions: caption, captions, caption_0, ...; only where there are none, text, and so on."""
    for name in CAPTION_KEYS:
        if found := [key for key in keys if re.fullmatch(rf"{name}s?[ _.]?\d*", key)]:
            return found
    return []


def id_of(row: dict[str, Any], name: str, place: str) -> str | int:
    image_id = whole(next((row[key] for key in ID_KEYS if row.get(key) not in (None, "")), None))
    if image_id is None:
        return default_id(name)
    if not isinstance(image_id, str | int):
        raise UserError(f"{place}: 'image_id' is {image_id!r}; expected a text or a whole number")
    return image_id


def whole(value: Any) -> Any:
    """7 for 7.0, as pandas writes a column of numbers with gaps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def default_id(name: str) -> str | int:
    """The number at the end of a COCO file name, else the name without its suffix."""
    stem = posixpath.splitext(posixpath.normpath(name))[0]
    number = COCO_NUMBER.search(stem)
    return int(number[1]) if number else stem


def token_rows(text: str) -> Iterator[Row]:
    for place, line in numbered_lines(text):
        found = TOKEN_LINE.fullmatch(line)
        if found is None:
            raise BadRow(f"{place}: expected name.jpg#0<TAB>caption; got {line[:80]!r}")
        yield place, {"image": found[1], "caption": found[2]}


def table_rows(text: str, delimiter: str, names: list[str] | None) -> Iterator[Row]:
    """Rows by column name. Quotes mean something only between commas and semicolons: elsewhere they are a caption's.

    In a row that is too long the delimiter belongs to the caption; one that is too short has no caption (Flickr30k's
    results.csv has one).
    """
    lines = io.StringIO(text, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for cells in reader:
            place = f"line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if names is None:
                names = [cell.strip().lower() for cell in cells]
                while not names[-1]:  # a spreadsheet's empty columns
                    names.pop()
                if twice := [name for name in (*IMAGE_KEYS, *ID_KEYS, "split") if names.count(name) > 1]:
                    raise BadRow(f"{place}: several columns {', '.join(twice)}")
                for i in range(len(names)):  # captions in columns of one name: caption, caption0, caption00
                    while names[i] in names[:i]:
                        names[i] += "0"
                continue
            row: dict[str, Any] = dict(zip(names, fit_cells(cells, names, delimiter, place), strict=True))
            for key in ID_KEYS:
                if number := re.fullmatch(r"(0|[1-9]\d{0,17})(\.0)?", row.get(key) or "", re.ASCII):
                    row[key] = int(number[1])
            yield place, row
    except csv.Error as error:
        raise BadRow(f"line {reader.line_num}: {error}") from error


def fit_cells(cells: list[str], names: list[str], delimiter: str, place: str) -> list[str]:
    """A cell for each column. UserError where it cannot be told which column a cell belongs to."""
    while len(cells) > len(names) and not cells[-1].strip():
        del cells[-1]
    extra = max(len(cells) - len(names), 0)
    captions = caption_keys(tuple(names))
    at = names.index(captions[0]) if captions else 0
    joined = [*cells[:at], delimiter.join(cells[at : at + extra + 1]), *cells[at + extra + 1 :]]
    fitted = [cell.strip() for cell in joined] + [""] * (len(names) - len(joined))
    named = any(is_image(cell) for cell, name in zip(fitted, names, strict=True) if name in IMAGE_KEYS)
    if extra and (len(captions) != 1 or (not named and any(map(is_image, cells)))):
        columns = ", ".join(names)
        raise BadRow(f"{place}: {len(cells)} cells for the {len(names)} columns {columns}: put captions in quotes")
    return fitted


def coco_rows(content: dict[str, Any]) -> Iterator[Row]:
    """Every image first, so that images keep their order; then the captions, in theirs. 7 and "7" are one id."""
    images: dict[str, dict[str, Any]] = {}
    for number, image in enumerate(content["images"]):
        place = f"image {number}"
        image_id, name = (whole(image.get("id")), image.get("file_name")) if isinstance(image, dict) else (None, None)
        if not isinstance(name, str) or not name or not isinstance(image_id, str | int):
            raise expected("an object with 'id' and 'file_name'", image, place)
        row = {"image": name, "image_id": image_id}
        if (other := images.setdefault(str(image_id), row)) is not row:
            raise BadRow(f"{place}: the id {image_id!r} is that of {other['image']} too")
        yield place, row
    annotations = content.get("annotations", [])
    if not isinstance(annotations, list):
        raise BadRow("'annotations' is no list")
    for number, annotation in enumerate(annotations):
        place = f"annotation {number}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            hint = " (captions_*.json is meant, not instances_*.json)" if "bbox" in annotation else ""
            raise expected("'image_id' and 'caption'", annotation, place, hint)
        found = images.get(str(whole(annotation.get("image_id"))))
        if found is None:
            raise BadRow(f"{place}: no image has the id {annotation.get('image_id')!r}")
        yield place, {**found, "caption": [annotation["caption"]]}


def karpathy_rows(content: dict[str, Any]) -> Iterator[Row]:
    """Image ids are COCO's where there are any; `imgid` is a mere position in the file."""
    for number, image in enumerate(content["images"]):
        try:
            name, captions = image["filename"], [sentence["raw"] for sentence in image["sentences"]]
            row = {"image_id": image.get("cocoid", default_id(name)), "caption": captions, "split": image["split"]}
            row["image"] = f"{image['filepath']}/{name}" if image.get("filepath") else name
        except (KeyError, TypeError, AttributeError):
            raise expected("'filename', 'split', 'sentences' with 'raw'", image, f"image {number}") from None
        yield f"image {number}", row


# --- folders and shards ----------------------------------------------------------------------------------------------


def read_folder(folder: Path, notices: list[str], split: str | None, cache: Path | None) -> tuple[str, Iterable[Entry]]:
    names = files_in(folder)
    metadata = [name for name in names if PurePosixPath(name).name in METADATA]  # it may name other splits
    splits = folder_splits(folder, [name for name in names if is_image(name) or name.endswith(".tar")])
    if split is not None and splits and not metadata:
        if split not in splits:
            raise UserError(f"{folder}: no split '{split}'; it has {', '.join(sorted(splits))}")
        names = [name for name in names if folder_split(name) in (None, split)]
    shards = [name for name in names if name.endswith(".tar")]
    images = [name for name in names if is_image(name)]
    unread = passed_over(Counter(suffix for name in names if (suffix := unread_suffix(name))))
    notices += unread
    if metadata:
        return "metadata folder", metadata_entries(folder, metadata, images, notices)
    if images and not shards:
        return "image folder", image_entries(folder, names, notices)
    if shards and not images:
        found = (shard_entries(folder / name, folder_split(name), cache, notices) for name in shards)
        return "shards", chain.from_iterable(found)
    files = [name for name in names if name.endswith((".json", ".jsonl", ".csv", ".tsv"))]
    reason = "a folder with images and tar files" if images else "a folder without images, metadata or tar files"
    held = [f"it holds {files[0]}: give that file"] if files else []
    raise unclear(folder, "; ".join([reason, *held, *unread]))


def folder_split(name: str) -> str | None:
    """The split that the first such folder on the path of a file is named as."""
    return next((split for part in name.split("/")[:-1] if (split := canonical_split(part)) in SPLITS), None)


def folder_splits(folder: Path, names: Iterable[str]) -> set[str]:
    """The splits that the folders of `names` are named as. UserError where only some are: of what split is the rest?"""
    split_of = {posixpath.dirname(name) or name: folder_split(name) for name in names}
    splits = {split for split in split_of.values() if split}
    if others := [place for place, split in split_of.items() if splits and not split]:
        raise UserError(
            f"{folder}: it has folders of the splits {', '.join(sorted(splits))}, and images that are in none of them "
            f"({', '.join(others[:5])}): move these, or give the folder of one split"
        )
    return splits


def image_entries(folder: Path, names: list[str], notices: list[str]) -> Iterator[Entry]:
    """The captions of a.jpg are in a.txt, else in a.jpg.txt, a.caption (kohya's tools write it) or a.jpg.caption."""
    source = ImageFolder(folder)
    images = [name for name in names if is_image(name)]
    others = {}
    for name in set(names).difference(images):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        others[stem + suffix.lower()] = name
    lonely = False
    for image in images:
        stem = os.path.splitext(image)[0]  # noqa: PTH122
        sidecar = next((s for suffix in TEXTS for s in (stem + suffix, image + suffix) if s in others), None)
        captions: list[str] = []
        if sidecar is None:
            lonely = True
        else:
            path = folder / others.pop(sidecar)
            try:
                captions = path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                notices.append(f"{path} cannot be read: {error}")
        yield Entry(source(image), default_id(image), captions, f"{folder / image}", folder_split(image))
    unread = Counter(os.path.splitext(name)[1] for name in others)  # noqa: PTH122
    if unread and (lonely or any(suffix in unread for suffix in TEXTS)):
        counts = ", ".join(f"{suffix or 'without a suffix'} ({count:,})" for suffix, count in sorted(unread.items()))
        notices.append(f"{folder}: other files, which are not read: {counts}; an image's captions are in one file")


def metadata_entries(folder: Path, files: list[str], images: list[str], notices: list[str]) -> Iterator[Entry]:
    """Names in a metadata file start at its own folder; ids at the top, so that they differ between the folders."""
    named = set()
    root = os.path.abspath(folder)  # noqa: PTH100
    for file in files:
        path = folder / file
        for entry in read_layout(path, None, notices)[1]:
            below = os.path.relpath(str(entry.source), root)
            named.add(below)
            yield replace(entry, split=entry.split or folder_split(below))
    if unnamed := [image for image in images if image not in named]:
        notices.append(f"{folder}: {len(unnamed)} images are in no metadata file; the first is {unnamed[0]}")


def shard_entries(shard: Path, split: str | None, cache: Path | None, notices: list[str]) -> Iterator[Entry]:
    samples, left_out = shard_index(shard, cache)
    notices += left_out
    for sample in samples:
        entry = sample_entry(sample, ImageFile(shard, sample.image, sample.offset, sample.size))
        yield replace(entry, split=entry.split or split)


def sample_entry(sample: ShardSample, source: ImageSource) -> Entry:
    """The captions of the .txt, a line each, before those of the .json, which often says the same again."""
    row = sample.json if isinstance(sample.json, dict) else {}
    place = str(source)
    captions = captions_of(row, place) if sample.text is None else sample.text.rstrip("\n").split("\n")
    return Entry(source, id_of(row, sample.image, place), captions, place, split_of(row, place))
