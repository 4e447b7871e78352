"""What exports of all archs share: files and folders that are complete or not there, and the card."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.protocol import Export


def check_file(path: Path, overwrite: bool) -> None:
    """UserError unless `path` is a .pth that may be written; its folder is made."""
    if path.is_dir() or path.suffix != ".pth":
        raise UserError(f"--output {path}: --format blip writes one file, FILE.pth")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another output, or replace it with --force")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_pth(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """A .pth as the original code and LAVIS write it: tensors of one storage stay so."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"model": dict(tensors), "config": dict(config), "epoch": 0}, temporary)
    temporary.replace(path)


@contextmanager
def new_folder(
    folder: Path, overwrite: bool, model_type: str, said_in: tuple[str, str] = ("config.json", "model_type")
) -> Iterator[Path]:
    """A folder to write to that takes the name `folder` at the end.

    UserError where `folder` exists and is not empty; with `overwrite` an earlier export is replaced, and only what is
    one: the file and key `said_in` say `model_type`.
    """
    file_name, key = said_in
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not overwrite:
            raise UserError(
                f"{folder}: exists already; choose another output, or replace an earlier export with --force"
            )
        try:
            is_export = json.loads((folder / file_name).read_text("utf-8")).get(key) == model_type
        except (OSError, ValueError, AttributeError):
            is_export = False
        if not is_export:
            raise UserError(
                f"{folder}: not an earlier export (no {file_name} of a {model_type}); it is not overwritten"
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


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first tensors that are not those of a model, with both shapes; "" where all names and shapes are equal."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (given, expected)]
    wrong = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    return ", ".join(f"{n} (is {shapes[0].get(n)}, should be {shapes[1].get(n)})" for n in wrong[:5])


def model_card(folder: Path, export: Export, family: str, usage: str) -> str:
    """README.md of an exported folder. `family`: "BLIP"; `usage`: Markdown, code first, with {name} for the folder."""
    name = export.hub_name or folder.name
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- image-captioning
- {family.lower()}
---
# {name}

A {family} image captioner, finetuned with blipds.

## Captioning with transformers

{usage.strip().replace("{name}", name)}

{export.card.strip()}
"""
