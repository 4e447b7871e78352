"""WebDataset's tar shards, indexed once, so that their images shuffle, split and resume exactly as files do.

A shard holds for each sample a key: `000123.jpg` beside `000123.txt` (a caption a line) or `000123.json`. Nothing is
ever extracted. Source of the layout: https://github.com/webdataset/webdataset. A key ends at the first dot there; here
an image that has captions under its whole name (`2.edit.png` beside `2.edit.txt`) is a sample of its own, too.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from blipds.data.sources import is_hidden, is_image, unread_suffix
from blipds.errors import CONTROL, UserError
from blipds.files.replacing import replace_text

KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*")  # up to the first dot of the file name, as WebDataset
TEXTS = (".txt", ".caption")  # a caption a line; the first goes before the other
SIDECAR_BYTES = 1 << 20  # a longer text is no caption
INDEX_VERSION = 2

LeftOut = Callable[[str, str], None]  # is told why a member is left out, and its name


@dataclass
class ShardSample:
    """The image and the captions of one name; `image` is the name of its member, "" where there is none."""

    image: str = ""
    offset: int = 0
    size: int = 0
    text: str | None = None
    json: Any = None


def shard_index(shard: Path, cache: Path | None) -> tuple[list[ShardSample], list[str]]:
    """The samples of a shard, in its order, and what was left out, a line each. Kept in the folder `cache`, and made
    anew once the shard has changed. Raises UserError where the shard is damaged.
    """
    if cache is None:
        return index_members(shard)
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"shard {shard}: {error.strerror}") from error
    stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    name = hashlib.blake2b(os.path.realpath(shard).encode(errors="replace"), digest_size=8).hexdigest()
    kept = cache / f"{shard.stem}-{name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["stamp"] == stamp:
            return [ShardSample(**sample) for sample in content["samples"]], content["notices"]
    samples, notices = index_members(shard)
    with suppress(OSError):  # without room it is made anew
        cache.mkdir(parents=True, exist_ok=True)
        content = {"stamp": stamp, "samples": [asdict(sample) for sample in samples], "notices": notices}
        replace_text(kept, json.dumps(content))
    return samples, notices


def index_members(shard: Path) -> tuple[list[ShardSample], list[str]]:
    keys: dict[str, dict[str, ShardSample]] = {}
    left_out: dict[str, list[str]] = {}

    def note(reason: str, name: str) -> None:
        left_out.setdefault(reason, []).append(name)

    # uncompressed: the members of a compressed one have no place
    with open_tar(f"shard {shard}", name=shard, mode="r:") as tar:
        for key, member in keyed_members(tar, note):
            take_member(tar, member, keys.setdefault(key, {}), note)
    found = [samples_of(key, names, note) for key, names in keys.items()]
    notices = [
        f"{shard}: {len(names)} members left out, {reason}; the first is {names[0]!r}"
        for reason, names in left_out.items()
    ]
    if lonely := found.count([]):
        notices.append(f"{shard}: {lonely} keys have no image")
    return [sample for samples in found for sample in samples], notices


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from error


@contextmanager
def open_tar(place: str, **source: Any) -> Iterator[tarfile.TarFile]:
    """`tarfile.open(**source)`; several archives one after the other, as `cat` joins them, are read as one.

    Raises UserError, in which `place` names it, where it is damaged.
    """
    try:
        with tarfile.open(**source, tarinfo=StrictTarInfo, ignore_zeros=True) as tar:
            yield tar
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"{place} is damaged or no tar file: {' '.join(str(error).split())}") from error


def keyed_members(tar: tarfile.TarFile, left_out: LeftOut) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """(key, member) of the files that may be read, none of them kept: tarfile itself would remember every one."""
    end = 0
    while (member := tar.next()) is not None:
        if member.offset < end:  # a size below 0 sends tarfile round in circles (CVE-2025-8194)
            raise tarfile.ReadError(f"member {member.name!r} overlaps the one before")
        end = member.offset_data + max(member.size, 0)
        tar.members.clear()  # type: ignore[attr-defined]
        path = PurePosixPath(member.name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            left_out("links and special files", member.name)
        elif path.is_absolute() or ".." in path.parts or CONTROL.search(member.name):
            left_out("names that lead out of the archive or hold control characters", member.name)
        elif (found := KEY.fullmatch(member.name)) and not is_hidden(member.name):
            yield found[1], member


def take_member(
    tar: tarfile.TarFile, member: tarfile.TarInfo, names: dict[str, ShardSample], left_out: LeftOut
) -> None:
    """Notes a member in the sample of its name; `names` are those of its key."""
    name, extension = os.path.splitext(member.name)  # noqa: PTH122
    extension = extension.lower()
    if is_image(member.name):
        sample = names.setdefault(name, ShardSample())
        if sample.image:
            left_out("a second image under one key", member.name)
        else:
            sample.image, sample.offset, sample.size = member.name, member.offset_data, member.size
    elif extension in TEXTS or extension == ".json":
        if member.size > SIDECAR_BYTES:
            left_out(f"texts longer than {SIDECAR_BYTES} bytes", member.name)
            return
        file = tar.extractfile(member)
        assert file is not None
        sample = names.setdefault(name, ShardSample())
        try:
            text = file.read().decode("utf-8-sig")
            if extension == ".json":
                sample.json = json.loads(text)
            elif extension == TEXTS[0] or sample.text is None:
                sample.text = text
        except (ValueError, RecursionError):
            left_out("texts that are no UTF-8 or no JSON", member.name)
    elif suffix := unread_suffix(member.name):
        left_out(f"images of a format that is not read ({suffix})", member.name)


def samples_of(key: str, names: dict[str, ShardSample], left_out: LeftOut) -> list[ShardSample]:
    """The samples of a key that have an image: its own, and those with captions under their whole name.

    An image without such captions has those of `<image>.txt`, else the key's, which only one image can have.
    """
    whole = names.get(key, ShardSample())
    free = not whole.image
    samples = []
    for name, sample in names.items():
        if not sample.image:
            continue
        if sample.text is None and sample.json is None:
            other = names.get(sample.image, whole)
            if other is whole and name != key and not free:
                left_out("a second image under one key", sample.image)
                continue
            free = False
            sample.text, sample.json = other.text, other.json
        samples.append(sample)
    return samples
