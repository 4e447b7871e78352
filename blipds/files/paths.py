"""Paths as a person gives them, and links that also work where the file system has none (SMB, exFAT, Colab's drive)."""

import os
from pathlib import Path

from blipds.errors import UserError

LONGEST_NAME = 256


def user_path(location: str | os.PathLike[str]) -> Path:
    """With the home directory for a leading `~`. UserError where there is none, as in docker --user."""
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        hint = "set HOME, or give a path without ~ (for ~/.cache/blipds: env.cache_root)"
        raise UserError(f"{location}: no home directory is known; {hint}") from error


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
