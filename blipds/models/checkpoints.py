"""Checkpoints in: what kind a file is, its tensors under our names, and the strict load that checks before it writes.

No engine here: `load_into` takes the shapes of a model's parameters and a function that writes one of them.
The other direction is `hf_export.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blipds.errors import UserError
from blipds.models.blip import names as names_of
from blipds.models.blip.text_decoder import TextConfig
from blipds.models.checkpoint_files import (
    MemoryReader,
    PickleReader,
    Reader,
    SafetensorsReader,
    json_object,
    listed,
    open_reader,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
POS_EMBED = "visual_encoder.pos_embed"
# What is left of a checkpoint of parts: the rest of the model is not asked of it.
PART_PREFIX = {"timm": "visual_encoder.", "bert": "text_decoder."}
# BERT has no rows for [DEC] and [ENC], the last two of BLIP's vocabulary.
VOCABULARY = (
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.bias",
    *names_of.TIED,
)
EXTRA_TOKENS = 2
TEXT_POSITIONS = "text_decoder.bert.embeddings.position_embeddings.weight"


class Checkpoint:
    """An opened checkpoint: tensors under our names, read when they are asked for.

    kind: 'blip' | 'transformers' | 'blipds' | 'timm' | 'bert'. config: the transformers config.json, or the config
    that the file carries, or {}. left_aside: names in the file that the captioner does not use.
    """

    def __init__(self, path: Path, kind: str, config: dict[str, Any], readers: Mapping[str, Reader]) -> None:
        self.path, self.kind, self.config = path, kind, config
        self.left_aside: list[str] = []
        self._readers: dict[str, tuple[Reader, str]] = {}
        for name, reader in readers.items():
            ours = _our_name(kind, name)
            if ours is None:
                self.left_aside.append(name)
            elif ours in self._readers:
                raise UserError(f"{path}: {listed([name, self._readers[ours][1]])} are the same parameter of the model")
            else:
                self._readers[ours] = (reader, name)

    def names(self) -> list[str]:
        return list(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        reader, stored = self._readers[name]
        return reader.shape(stored)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored (a memory map where the format allows one). UserError where it cannot be read."""
        reader, stored = self._readers[name]
        return reader.tensor(stored)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.tensor(name)) for name in self._readers)

    def __contains__(self, name: str) -> bool:
        return name in self._readers


def _our_name(kind: str, name: str) -> str | None:
    """None: left aside. A name that no rule knows is kept, so that the strict load lists it as unexpected."""
    if names_of.matches(name, names_of.BUFFERS):
        return None
    if kind == "transformers":
        return names_of.from_transformers_name(name) or name
    if kind == "timm":
        return None if names_of.matches(name, names_of.VIT_ONLY) else "visual_encoder." + name
    if kind == "bert":
        return None if names_of.matches(name, names_of.BERT_ONLY) else names_of.from_bert_name(name)
    return None if names_of.matches(name, names_of.PRETRAINING_ONLY) else name


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file or folder and recognises its kind from the content. UserError for whatever cannot be used."""
    path = Path(path)
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def checkpoint_of(name: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint of tensors that something else has read already (timm its own weights); `name` for messages."""
    reader = MemoryReader(Path(name), tensors)
    return Checkpoint(reader.path, _kind(reader.path, reader), {}, dict.fromkeys(reader.names, reader))


def _open_file(path: Path) -> Checkpoint:
    reader = open_reader(path)
    kind = _kind(path, reader)
    if isinstance(reader, PickleReader):
        config = reader.config
    else:
        config = json_object(path, reader.metadata.get("config", "{}"), "the config in its metadata")
    return Checkpoint(path, kind, config, dict.fromkeys(reader.names, reader))


def _open_folder(folder: Path) -> Checkpoint:
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        text = (folder / "config.json").read_bytes()
        config = json_object(folder / "config.json", text, "it")
        model_type = config.get("model_type")
        if model_type not in ("blip", "bert", None):
            raise UserError(f"{folder}: config.json says model_type '{model_type}'; 'blip' or 'bert' can be read")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        reader = open_reader(folder / "model.safetensors")
        readers = dict.fromkeys(reader.names, reader)
    elif index.is_file():
        readers = _shards(folder, index)
    elif (folder / "pytorch_model.bin").is_file():
        reader = open_reader(folder / "pytorch_model.bin")
        readers = dict.fromkeys(reader.names, reader)
    else:
        raise UserError(
            f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin in this folder"
        )
    if not readers:
        raise UserError(f"{folder}: holds no tensors")
    first = next(iter(readers.values()))
    kind = _kind(folder, first, list(readers))
    if not config and isinstance(first, SafetensorsReader):
        config = json_object(first.path, first.metadata.get("config", "{}"), "the config in its metadata")
    return Checkpoint(folder, kind, config, readers)


def _shards(folder: Path, index: Path) -> dict[str, Reader]:
    weight_map = json_object(index, index.read_bytes(), "it").get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: has no 'weight_map'")
    opened: dict[str, Reader] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UserError(f"{index}: '{listed([name])}' points to {shard!r}, which is not a file name in this folder")
        if shard not in opened:
            opened[shard] = open_reader(folder / shard)
        if name not in opened[shard].names:
            raise UserError(f"{folder / shard}: lacks '{listed([name])}', which {index.name} says is in it")
    return {name: opened[shard] for name, shard in weight_map.items()}


def _kind(path: Path, reader: Reader, names: list[str] | None = None) -> str:
    names = reader.names if names is None else names
    if isinstance(reader, SafetensorsReader) and reader.metadata.get("format") == "blipds":
        return "blipds"
    if any(name.startswith("vision_model.") for name in names):
        return "transformers"
    if any(name.startswith(("visual_encoder.", "text_decoder.")) for name in names):
        return "blip" if isinstance(reader, PickleReader) else "blipds"
    if "patch_embed.proj.weight" in names:
        return "timm"
    if any(name.removeprefix("bert.") == "embeddings.word_embeddings.weight" for name in names):
        return "bert"
    raise UserError(
        f"{path}: not a checkpoint of BLIP, LAVIS, transformers' BLIP, blipds, a timm ViT or a BERT; "
        f"its names begin with {listed(names, 3) or 'nothing'}"
    )


@dataclass
class LoadReport:
    """What `load_into` did: names written, and what was left out on either side."""

    kind: str
    written: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # of the model, allowed: they keep their values
    unexpected: list[str] = field(default_factory=list)  # in the file, allowed: not used
    left_aside: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_into(
    model_shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    write: Callable[[str, Tensor], None],
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    leave_out: tuple[str, ...] | list[str] = (),
    num_prefix_positions: int = 1,
) -> LoadReport:
    """Loads a checkpoint strictly: every name, shape, dtype and value is checked before the first `write`.

    model_shapes: name -> shape of each parameter (of tied ones, either name or both). write(name, tensor): copies into
    the parameter; a tensor with fewer rows is for the parameter's first rows (only a BERT's vocabulary has fewer: [DEC]
    and [ENC] keep the model's values). allow_*: fnmatch patterns of names that the file or the model may lack.
    num_prefix_positions: how many positions of `pos_embed` come before the grid (timm: 0 with `no_embed_class`, else
    `num_prefix_tokens`). A timm ViT is asked for `visual_encoder.*` only, a BERT for what it has of `text_decoder.*`
    (never cross-attention). Reads the file twice. UserError lists all that does not fit.
    """
    part = PART_PREFIX.get(checkpoint.kind, "")
    wanted = {
        name: tuple(shape)
        for name, shape in model_shapes.items()
        if name.startswith(part) and not names_of.matches(name, leave_out)
    }
    sources, tie_names = _resolve_ties(wanted, checkpoint)
    report = LoadReport(checkpoint.kind, left_aside=list(checkpoint.left_aside))
    may_miss, may_exceed = list(allow_missing), [*allow_unexpected, *leave_out]
    if checkpoint.kind == "bert":
        ours, theirs = _text_layers(wanted), _text_layers(checkpoint.names())
        may_miss += ["*.crossattention.*", *sorted(ours - theirs)]
        may_exceed += sorted(theirs - ours)
        if not any(name.startswith("text_decoder.cls.") for name in checkpoint.names()):
            may_miss.append("text_decoder.cls.*")

    problems: list[str] = []
    absent = [name for name in wanted if name not in sources]
    report.missing = [name for name in absent if names_of.matches(name, may_miss)]
    if lacking := sorted(set(absent) - set(report.missing)):
        problems.append(f"missing {listed(lacking)}")
    extra = [name for name in checkpoint.names() if name not in wanted and name not in tie_names]
    report.unexpected = [name for name in extra if names_of.matches(name, may_exceed)]
    if strange := sorted(set(extra) - set(report.unexpected)):
        problems.append(f"unexpected {listed(strange)}")
    misfits = []
    for name, source in sources.items():
        if why := _misfit(name, checkpoint.shape(source), wanted[name], checkpoint.kind, num_prefix_positions):
            misfits.append(f"{name} ({why})")
    if misfits:
        problems.append(f"of another shape: {listed(misfits)}")
    if problems:
        raise UserError(
            f"{checkpoint.path} ({checkpoint.kind}) does not fit the model: {'; '.join(problems)}. "
            "Check the model's geometry, or allow names by pattern if this is what you want"
        )
    for source in dict.fromkeys(sources.values()):
        _check_values(checkpoint, source)
    for tied, owner in names_of.TIED.items():
        if (
            tied in tie_names
            and owner in tie_names
            and not torch.equal(checkpoint.tensor(tied), checkpoint.tensor(owner))
        ):
            raise UserError(f"{checkpoint.path}: '{tied}' and '{owner}' differ, but the model has one tensor for both")

    for name, source in sources.items():
        tensor = checkpoint.tensor(source)
        if name == POS_EMBED and tuple(tensor.shape) != wanted[name]:
            report.notes.append(f"pos_embed interpolated from {tuple(tensor.shape)} to {wanted[name]}")
            tensor = interpolate_pos_embed(tensor, wanted[name][1], num_prefix_positions)
        elif tuple(tensor.shape) != wanted[name]:
            tensor = tensor[: wanted[name][0]]
            kept = wanted[name][0] - len(tensor)
            report.notes.append(f"{name}: {len(tensor)} rows" + (f", {kept} keep the model's values" if kept else ""))
        write(name, tensor)
        report.written.append(name)
    return report


def _resolve_ties(wanted: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, str], set[str]]:
    """Model name -> the checkpoint's name that holds its values, and the tied names that the checkpoint has."""
    sources = {name: name for name in wanted if name in checkpoint}
    present: set[str] = set()
    for tied, owner in names_of.TIED.items():
        present |= {name for name in (tied, owner) if name in checkpoint}
        for name, other in ((tied, owner), (owner, tied)):
            if name in wanted and name not in checkpoint and other in checkpoint:
                sources[name] = other
        if tied not in wanted and owner not in wanted:
            present -= {tied, owner}
    return sources, present


def _text_layers(names: Iterable[str]) -> set[str]:
    """One pattern a layer: decoder and BERT may differ in depth, but a layer comes whole or not at all."""
    found = (re.match(r"text_decoder\.bert\.encoder\.layer\.\d+\.", name) for name in names)
    return {match[0] + "*" for match in found if match}


def text_layer_differences(config: Mapping[str, Any], text: TextConfig) -> list[str]:
    """Why a BERT of this config.json has layers that would not compute in our decoder what they do in it."""
    ours = {
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "hidden_act": "gelu",
    }
    return [
        f"{key} is {config[key]} in the file, {value} in the decoder"
        for key, value in ours.items()
        if config.get(key, value) != value
    ]


def _misfit(name: str, stored: tuple[int, ...], wanted: tuple[int, ...], kind: str, prefix: int) -> str:
    if stored == wanted:
        return ""
    if name == POS_EMBED and len(stored) == len(wanted) == 3 and (stored[0], stored[2]) == (wanted[0], wanted[2]):
        for length in (stored[1] - prefix, wanted[1] - prefix):
            if length < 1 or isqrt(length) ** 2 != length:
                return f"{stored} in the file, {wanted} in the model: {length} grid positions are not a square"
        return ""
    rows_to_add = wanted[0] - stored[0] if stored and wanted and stored[1:] == wanted[1:] else 0
    if kind == "bert" and name in VOCABULARY and rows_to_add == EXTRA_TOKENS:
        return ""
    if kind == "bert" and name == TEXT_POSITIONS and stored[1:] == wanted[1:]:
        return ""
    return f"{stored} in the file, {wanted} in the model"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _check_values(checkpoint: Checkpoint, name: str) -> None:
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in FLOATS:
        raise UserError(f"{checkpoint.path}: '{name}' is {tensor.dtype}, weights are {', '.join(map(str, FLOATS))}")
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{checkpoint.path}: '{name}' holds NaN or infinite values; the file is damaged or the run diverged"
        )


def interpolate_pos_embed(pos_embed: Tensor, positions: int, num_prefix_positions: int = 1) -> Tensor:
    """Position embeddings (1, P + g*g, C) for another square grid: (1, positions, C), the first P kept.

    Bicubic without antialiasing, as the original (BLIP models/vit.py, interpolate_pos_embed); in float32.
    """
    prefix, grid = pos_embed[:, :num_prefix_positions], pos_embed[:, num_prefix_positions:]
    old, new = isqrt(grid.shape[1]), isqrt(positions - num_prefix_positions)
    grid = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([prefix, grid.to(pos_embed.dtype)], dim=1)
