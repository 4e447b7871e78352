"""The folder of an export: complete, or not there."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blipds.errors import UserError


@contextmanager
def new_folder(folder: Path, overwrite: bool, model_type: str) -> Iterator[Path]:
    """A folder to write to that takes the name `folder` at the end.

    UserError where `folder` exists and is not empty; with `overwrite` an earlier export is replaced, and only what is
    one (its config.json says `model_type`).
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not overwrite:
            raise UserError(
                f"{folder}: exists already; choose another output, or replace an earlier export with --force"
            )
        try:
            is_export = json.loads((folder / "config.json").read_text("utf-8")).get("model_type") == model_type
        except (OSError, ValueError, AttributeError):
            is_export = False
        if not is_export:
            raise UserError(
                f"{folder}: not an earlier export (no config.json of a {model_type}); it is not overwritten"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's folders are closed to others
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors closes its files to others, too
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
