"""Archives from strangers, unpacked: never outside their folder, all of it or nothing."""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from blipds.errors import CONTROL, UserError

CHUNK = 1 << 20
MOST_MEMBERS = 5_000_000
# What reading a damaged archive may raise, in zipfile, tarfile and the decompressors below them.
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError)


class BadFile(UserError):
    """The file itself is wrong: another try with it ends the same way."""


Member = tuple[str, int, Callable[[], IO[bytes]]]  # name, bytes, a reader


def unpack(
    archive: Path,
    target: Path,
    source: str = "",
    *,
    max_bytes: int,
    wanted: Callable[[str], bool] = lambda name: True,
) -> None:
    """Puts the files below the folder `source` of a zip or tar below `target`.

    They are unpacked beside it first, into `.<target>.unpacking`, and moved when all are there: at once where there is
    no `target` yet, else one by one, and existing files stay. What a killed process left there is removed. Nothing is
    unpacked of an archive with a name that leads outside, a link, a device, or with more than `max_bytes` in it:
    BadFile for these, for damage, and where nothing is `wanted`. UserError for a full disk.
    """
    staging = target.with_name(f".{target.name}.unpacking")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _extract(archive, staging, source, max_bytes, wanted)
        _place(staging, target)
    except OSError as error:
        raise UserError(f"{error.filename or target}: cannot be written ({error.strerror or error})") from error
    except UserError:
        raise
    except DAMAGE as error:
        raise BadFile(f"{archive}: is damaged ({' '.join(str(error).split()) or type(error).__name__})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(archive: Path, staging: Path, source: str, max_bytes: int, wanted: Callable[[str], bool]) -> None:
    count = unpacked = 0
    with tqdm(unit="B", unit_scale=True, desc=f"unpack {archive.name}", disable=None, delay=1) as bar:
        for name, size, reader in _members(archive):
            if (inner := _inside(name, source)) is None or not wanted(inner):
                continue
            count, unpacked = count + 1, unpacked + size
            if unpacked > max_bytes or count > MOST_MEMBERS:
                raise BadFile(f"{archive}: more than {max_bytes:,} bytes or {MOST_MEMBERS:,} files are in it")
            path = staging / inner
            if path.exists():
                raise BadFile(f"{archive}: has {name} twice")
            path.parent.mkdir(parents=True, exist_ok=True)
            with reader() as packed, path.open("wb") as file:
                shutil.copyfileobj(packed, file, CHUNK)
            if path.stat().st_size != size:
                raise BadFile(f"{archive}: is damaged ({name} ends after {path.stat().st_size} of {size} bytes)")
            bar.update(size)
    if not count:
        raise BadFile(f"{archive}: not what was expected, {source or 'a file'} is not in it")


def _members(archive: Path) -> Iterator[Member]:
    """The files of an archive. BadFile for a name or kind that is not safe, in a zip before the first file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
            for info in infos:
                # external_attr: the mode as Unix writes it; 0 where another system packed
                _check_safe(archive, info.filename, info.external_attr >> 28 in (0, 0o10))
            for info in infos:
                yield info.filename, info.file_size, partial(file.open, info)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for member in tar:
                _check_safe(archive, member.name, member.isreg() or member.isdir())
                if not member.isdir():
                    yield member.name, member.size, partial(tar.extractfile, member)  # type: ignore[misc]
    else:
        raise BadFile(f"{archive}: neither a zip nor a tar file, or only a part of one")


def _check_safe(archive: Path, name: str, usual: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name.split("/")[0] or CONTROL.search(name):
        raise BadFile(f"{archive}: {name!r} leads outside of the folder; nothing was unpacked")
    if not usual:
        raise BadFile(f"{archive}: {name} is a link or a device; nothing was unpacked")


def _inside(name: str, source: str) -> str | None:
    """The name below `source`; None for another place, and for hidden files (__MACOSX, .DS_Store)."""
    if not PurePosixPath(name).is_relative_to(source):
        return None
    inner = PurePosixPath(name).relative_to(source)
    hidden = any(part.startswith((".", "__MACOSX")) for part in inner.parts)
    return None if hidden or not inner.parts else str(inner)


def _place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return

    def add(new: str, place: str) -> None:
        if not Path(place).exists():
            Path(new).replace(place)

    shutil.copytree(staging, target, copy_function=add, dirs_exist_ok=True)
