"""Archives of strangers, unpacked: never outside of their folder, all of it or nothing."""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from blipds.errors import CONTROL, UserError

CHUNK = 1 << 20
MOST_MEMBERS = 5_000_000
# What reading a damaged archive may raise, in zipfile, tarfile and the decompressors below them.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


class BadArchive(UserError):
    """What is wrong lies in the archive: another try with the same file ends the same way."""


Member = tuple[PurePosixPath, int, Callable[[], IO[bytes]]]  # name, bytes, a reader


def unpack(
    archive: Path,
    target: Path,
    source: str = "",
    *,
    max_bytes: int,
    wanted: Callable[[str], bool] = lambda name: True,
    progress: bool = True,
) -> int:
    """Files below the folder `source` of a zip or tar go below `target`; returns how many.

    They are unpacked beside it first, into `.<target>.unpacking`, and moved when all are there: at once where there is
    no `target` yet, else one by one, and what is there already stays. What an unpacking that was killed left behind is
    removed. Nothing is unpacked of an archive with a name that leads outside, a link, a device, or with more than
    `max_bytes` in it: BadArchive for these, for damage, and where nothing is `wanted`. UserError for a full disk.
    """
    staging = target.with_name(f".{target.name}.unpacking")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            count = _extract(archive, staging, source, max_bytes, wanted, progress)
            _place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or target}: cannot be written ({error.strerror or error})") from error
    return count


def _extract(
    archive: Path, staging: Path, source: str, max_bytes: int, wanted: Callable[[str], bool], progress: bool
) -> int:
    count = unpacked = 0
    try:
        with tqdm(unit="B", unit_scale=True, desc=f"unpack {archive.name}", disable=None if progress else True) as bar:
            for name, size, opened in _members(archive):
                if (inner := _inside(name, source)) is None or not wanted(inner):
                    continue
                unpacked += size
                if unpacked > max_bytes or count >= MOST_MEMBERS:
                    raise BadArchive(f"{archive}: more than {max_bytes:,} bytes or {MOST_MEMBERS:,} files are in it")
                path = staging / inner
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened() as packed, path.open("xb") as file:
                    written = 0
                    while chunk := packed.read(CHUNK):
                        written += len(chunk)
                        if written > size:
                            raise BadArchive(f"{archive}: {name} is longer than it says")
                        file.write(chunk)
                        bar.update(len(chunk))
                if written < size:
                    raise BadArchive(f"{archive}: is damaged ({name} ends after {written} of {size} bytes)")
                count += 1
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise BadArchive(f"{archive}: has {Path(error.filename).name} twice") from error
    except UserError:
        raise
    except DAMAGE as error:
        raise BadArchive(f"{archive}: is damaged ({' '.join(str(error).split()) or type(error).__name__})") from error
    if not count:
        raise BadArchive(f"{archive}: not what was expected, {source or 'a file'} is not in it")
    return count


def _members(archive: Path) -> Iterator[Member]:
    """The files of an archive. BadArchive for a name or kind that is not safe, of a zip before the first file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
            names = [_safe(archive, info.filename) for info in infos]
            for info in infos:
                kind = info.external_attr >> 28  # of a mode as Unix writes it; 0 where another system packed
                if kind not in (0, 0o10):
                    raise BadArchive(f"{archive}: {info.filename} is a link or a device; nothing was unpacked")
            for name, info in zip(names, infos, strict=True):
                yield name, info.file_size, lambda info=info: file.open(info)  # type: ignore[misc]
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                name = _safe(archive, member.name)
                if member.isdir():
                    continue
                if not member.isreg():
                    raise BadArchive(f"{archive}: {member.name} is a link or a device; nothing was unpacked")
                yield name, member.size, lambda member=member: tar.extractfile(member)  # type: ignore[misc]
    else:
        raise BadArchive(f"{archive}: neither a zip nor a tar file, or only a part of one")


def _safe(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name.split("/")[0] or CONTROL.search(name):
        raise BadArchive(f"{archive}: {name!r} leads outside of the folder; nothing was unpacked")
    return path


def _inside(name: PurePosixPath, source: str) -> str | None:
    """The name below `source`; None for another place, and for what hides (__MACOSX, .DS_Store)."""
    if source and not name.is_relative_to(source):
        return None
    inner = name.relative_to(source) if source else name
    hidden = any(part.startswith((".", "__MACOSX")) for part in inner.parts)
    return None if hidden or not inner.parts else str(inner)


def _place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    for path in sorted(staging.rglob("*")):
        place = target / path.relative_to(staging)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        elif not place.exists():
            path.replace(place)
