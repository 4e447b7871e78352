"""Paths as a person gives them, and links that also work where the file system has none (SMB, exFAT, Colab's drive)."""

import os
from pathlib import Path

from blipds.errors import UserError, nearest

LONGEST_NAME = 256


def user_path(location: str | os.PathLike[str]) -> Path:
    """With the home directory for a leading `~`. UserError where there is none, as in docker --user."""
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        hint = "set HOME, or give a path without ~ (for ~/.cache/blipds: env.cache_root)"
        raise UserError(f"{location}: no home directory is known; {hint}") from error


def packaged(folder: str) -> Path:
    """`run_configs` or `ds_configs`: in the package where pip installed it, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return package / folder if (package / folder).is_dir() else package.parent / folder


def find_config(path: Path, folder: str, suffix: str, what: str = "config file") -> Path:
    """`path` if there is such a file, else the packaged one: "zero2", "zero2.json" or "ds_configs/zero2.json".

    UserError with the packaged names where it may mean one of them, but there is none; any other path comes back as it
    is, for its reader to find missing.
    """
    if path.is_file() or path.parent not in (Path(), Path(folder)):
        return path
    known = {other.stem: other for other in packaged(folder).glob(f"*{suffix}")}
    name = path.name.removesuffix(suffix)
    if name not in known and not path.exists():
        raise UserError(f"no such {what}: {path}; {nearest(name, known, 'packaged')}")
    return known.get(name, path)


def point(link: Path, name: str) -> None:
    """Makes `link` point to its neighbour `name`, atomically: by a symlink, else by a text file. Raises OSError."""
    partial = link.with_name(f"{link.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(name)
    except OSError:  # another reason (a full disk) keeps the text file from being written, too
        partial.write_text(name, encoding="utf-8")
    partial.replace(link)


def target(link: Path) -> Path | None:
    """The folder that `link` is or points to (see `point`), all links resolved; None where there is none."""
    try:
        found = link.resolve()
        if found.is_file() and found.stat().st_size < LONGEST_NAME:
            found = found.with_name(found.read_text("utf-8"))
        return found if found.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # no text, no name; a loop
        return None
