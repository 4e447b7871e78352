"""WebDataset's tar shards, indexed once, so that their images shuffle, split and resume exactly as files do.

A shard holds for each sample a key: `000123.jpg` beside `000123.txt` (a caption a line) or `000123.json`. Nothing is
ever extracted. Source of the layout: https://github.com/webdataset/webdataset
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from blipds.data.sources import is_hidden, is_image
from blipds.errors import CONTROL, UserError

KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and extension: at the first dot of the file name, as WebDataset
SIDECAR_BYTES = 1 << 20  # a longer text is no caption
INDEX_VERSION = 1


@dataclass
class Sample:
    """What belongs to one key; `image` is None until its member is met."""

    key: str
    image: str | None = None
    offset: int = 0
    size: int = 0
    text: str | None = None
    json: Any = None


@dataclass
class ShardIndex:
    """`notices` say what was left aside, a line each."""

    samples: list[Sample]
    notices: list[str] = field(default_factory=list)


def shard_index(shard: Path, cache: Path | None) -> ShardIndex:
    """The samples of a shard, in its order. Kept in the folder `cache`, and made anew once the shard has changed.

    Raises UserError where the shard is damaged.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"shard {shard}: {error.strerror}") from error
    stamp = [INDEX_VERSION, status.st_size, status.st_mtime_ns]
    if cache is None:
        return index_members(shard)
    name = hashlib.blake2b(os.path.realpath(shard).encode(errors="replace"), digest_size=8).hexdigest()
    kept = cache / f"{shard.stem}-{name}.json"
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
        if content["stamp"] == stamp:
            return ShardIndex([Sample(**sample) for sample in content["samples"]], content["notices"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or damaged
    index = index_members(shard)
    keep(kept, json.dumps({"stamp": stamp, **asdict(index)}))
    return index


def keep(path: Path, text: str) -> None:
    """Ranks may write at the same time: each its own file, and the last one stays. Without room it is made anew."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)


def index_members(shard: Path) -> ShardIndex:
    index = ShardIndex([])
    samples: dict[str, Sample] = {}
    left_out: dict[str, list[str]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # uncompressed: the members of a compressed one have no place
            for member in members_of(tar):
                if reason := why_left_out(member):
                    left_out.setdefault(reason, []).append(member.name)
                elif (found := KEY.fullmatch(member.name)) and not is_hidden(member.name):
                    sample = samples.setdefault(found[1], Sample(found[1]))
                    if reason := take_member(tar, member, found[2].lower(), sample):
                        left_out.setdefault(reason, []).append(member.name)
            check_end(shard, tar)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UserError(f"shard {shard} is damaged or no tar file: {' '.join(str(error).split())}") from error
    index.samples = [sample for sample in samples.values() if sample.image is not None]
    for reason, names in left_out.items():
        index.notices.append(f"{shard}: {len(names)} members left out, {reason}; the first is {names[0]!r}")
    if lonely := len(samples) - len(index.samples):
        index.notices.append(f"{shard}: {lonely} keys have no image")
    return index


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All but folders, none of them kept: tarfile itself would remember every one."""
    end = 0
    while (member := tar.next()) is not None:
        if member.offset < end:  # a size below 0 sends tarfile round in circles (CVE-2025-8194)
            raise tarfile.ReadError(f"member {member.name!r} overlaps the one before")
        end = member.offset_data + max(member.size, 0)
        tar.members.clear()  # type: ignore[attr-defined]
        if not member.isdir():
            yield member


def why_left_out(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if not member.isreg() or member.issparse():
        return "links and special files"
    if path.is_absolute() or ".." in path.parts or CONTROL.search(member.name):
        return "names that lead out of the archive or hold control characters"
    return None


def take_member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, sample: Sample) -> str | None:
    """Notes a member in its sample; why not, where it cannot be."""
    if is_image(member.name):
        if sample.image is not None:
            return "a second image under one key"
        sample.image, sample.offset, sample.size = member.name, member.offset_data, member.size
    elif extension in ("txt", "json"):
        if member.size > SIDECAR_BYTES:
            return f"texts longer than {SIDECAR_BYTES} bytes"
        file = tar.extractfile(member)
        assert file is not None
        try:
            text = file.read().decode("utf-8-sig")
            if extension == "txt":
                sample.text = text
            else:
                sample.json = json.loads(text)
        except (ValueError, RecursionError):
            return "texts that are no UTF-8 or no JSON"
    return None


def check_end(shard: Path, tar: tarfile.TarFile) -> None:
    """tarfile stops without a word at a damaged header, and at the end of the first of two joined archives."""
    with shard.open("rb") as file:
        file.seek(tar.offset)
        if file.read(1 << 20).strip(b"\0"):
            raise tarfile.ReadError(f"something that is no member at byte {tar.offset}")
