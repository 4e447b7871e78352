"""Checkpoints in: tensors as a file or folder stores them, their names in a model, and the strict load.

What an arch's files look like is its `CheckpointFormat`. No engine here: `load_into` takes the shapes of a model's
parameters and a function that writes one of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.checkpoint_files import (
    MemoryReader,
    PickleReader,
    Reader,
    SafetensorsReader,
    json_object,
    listed,
    open_reader,
    unwrapped,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class StoredTensors:
    """An opened file or folder: its tensors under the names that it gives them, and the config beside them.

    config: the transformers config.json, or the config that the file carries, or {}. location: where the user said it
    is. readers: name -> what reads it. cache_root: where files beside it would be downloaded to.
    """

    path: Path
    config: dict[str, Any]
    readers: Mapping[str, tuple[Reader, str]]
    location: str = ""
    cache_root: Path = Path()

    def __post_init__(self) -> None:
        self.location = self.location or str(self.path)

    @property
    def first(self) -> Reader | None:
        return next((reader for reader, _ in self.readers.values()), None)

    @property
    def is_pickle(self) -> bool:
        return isinstance(self.first, PickleReader)

    @property
    def is_own(self) -> bool:
        """Whether this project wrote it (`save_own`)."""
        return isinstance(self.first, SafetensorsReader) and self.first.metadata.get("format") == "blipds"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: reader.shape(stored) for name, (reader, stored) in self.readers.items()}


def open_stored(path: Path, location: str = "") -> StoredTensors:
    """Opens a file or folder. UserError for whatever cannot be used."""
    path = Path(path)
    try:
        readers, config = _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    return StoredTensors(path, config, unwrapped(readers), location)


def stored_in_memory(name: str, tensors: Mapping[str, Tensor]) -> StoredTensors:
    """Tensors that something else has read already (timm its own weights); `name` for messages."""
    reader = MemoryReader(Path(name), tensors)
    return StoredTensors(reader.path, {}, {stored: (reader, stored) for stored in reader.names})


def _open_file(path: Path) -> tuple[dict[str, Reader], dict[str, Any]]:
    reader = open_reader(path)
    config = _config_in(reader)
    if not reader.names:
        raise UserError(f"{path}: holds no tensors")
    return dict.fromkeys(reader.names, reader), config


def _config_in(reader: Reader) -> dict[str, Any]:
    if isinstance(reader, PickleReader):
        return reader.config
    return json_object(reader.path, reader.metadata.get("config", "{}"), "the config in its metadata")


def _open_folder(folder: Path) -> tuple[dict[str, Reader], dict[str, Any]]:
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = json_object(folder / "config.json", (folder / "config.json").read_bytes(), "it")
    indices = [folder / f"{name}.index.json" for name in ("model.safetensors", "pytorch_model.bin")]
    index = next((path for path in indices if path.is_file()), None)
    if (folder / "model.safetensors").is_file():
        reader = open_reader(folder / "model.safetensors")
        readers = dict.fromkeys(reader.names, reader)
    elif (folder / "pytorch_model.bin").is_file():
        reader = open_reader(folder / "pytorch_model.bin")
        readers = dict.fromkeys(reader.names, reader)
    elif index is not None:
        readers = _shards(folder, index)
    else:
        raise UserError(
            f"{folder}: no model.safetensors, model.safetensors.index.json or pytorch_model.bin in this folder"
        )
    if not readers:
        raise UserError(f"{folder}: holds no tensors")
    return readers, config or _config_in(next(iter(readers.values())))


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


class CheckpointFormat:
    """How files name and lay out an arch's weights. This one: under the names that the model has."""

    tied: Mapping[str, str] = {}  # the name on the left holds what the name on the right does; files may have either

    def kind(self, stored: StoredTensors) -> str:
        """What wrote it, in a word for messages. UserError for what this arch cannot read."""
        return "blipds"

    def joined(self, kind: str, readers: Mapping[str, tuple[Reader, str]]) -> Mapping[str, tuple[Reader, str]]:
        """The stored tensors as this arch has them, where files split a parameter into several."""
        return readers

    def our_name(self, kind: str, name: str) -> str | None:
        """The model's name; None: left aside. What no rule knows stays, so that the load lists it as unexpected."""
        return name

    def part(self, kind: str) -> str:
        """What the names of the model's part begin with that such a file holds; "" for the whole."""
        return ""

    def part_key(self, kind: str) -> str:
        """The key of the run config that names such a file."""
        raise AssertionError(f"{kind} is no part")

    def optional(self, kind: str, wanted: Sequence[str], given: Sequence[str]) -> tuple[list[str], list[str]]:
        """Patterns of names that the file may lack, and of names that the model may lack."""
        return [], []

    def misfit(self, kind: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """Why a tensor of one shape cannot fill a parameter of another; "" where it can."""
        return "" if stored == wanted else f"{stored} in the file, {wanted} in the model"

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, str]:
        """A tensor of another shape as the parameter takes it (fewer rows fill the first), and a line about it."""
        raise AssertionError(f"{name}: misfit() allows a shape that fitted() does not know")


class Checkpoint:
    """Stored tensors under the model's names, read when they are asked for.

    left_aside: names in the file that the captioner does not use.
    """

    def __init__(self, stored: StoredTensors, layout: CheckpointFormat) -> None:
        self.path, self.config, self.location = stored.path, stored.config, stored.location
        self.layout = layout
        self.kind = layout.kind(stored)
        self.left_aside: list[str] = []
        self._readers: dict[str, tuple[Reader, str]] = {}
        for name, place in layout.joined(self.kind, stored.readers).items():
            ours = layout.our_name(self.kind, name)
            if ours is None:
                self.left_aside.append(name)
            elif ours in self._readers:
                both = listed([name, self._readers[ours][1]])
                raise UserError(f"{self.path}: {both} are the same parameter of the model")
            else:
                self._readers[ours] = place

    @property
    def is_part(self) -> bool:
        return self.layout.part(self.kind) != ""

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
    leave_out: Sequence[str] = (),
) -> LoadReport:
    """Loads a checkpoint strictly: every name, shape, dtype and value is checked before the first `write`.

    model_shapes: name -> shape of each parameter (of tied ones, either name or both). write(name, tensor): copies into
    the parameter; a tensor with fewer rows is for the parameter's first rows. leave_out: fnmatch patterns of names that
    are not asked for. A file of one part (`CheckpointFormat.part`) is asked for that part only. Reads the file twice.
    UserError lists all that does not fit.
    """
    layout, kind = checkpoint.layout, checkpoint.kind
    wanted = {
        name: tuple(shape)
        for name, shape in model_shapes.items()
        if name.startswith(layout.part(kind)) and not matches(name, leave_out)
    }
    sources, tie_names = _resolve_ties(wanted, checkpoint)
    report = LoadReport(kind, left_aside=list(checkpoint.left_aside))
    may_miss, may_exceed = layout.optional(kind, list(wanted), checkpoint.names())

    problems: list[str] = []
    absent = [name for name in wanted if name not in sources]
    report.missing = [name for name in absent if matches(name, may_miss)]
    if lacking := sorted(set(absent) - set(report.missing)):
        problems.append(f"missing {listed(lacking)}")
    extra = [name for name in checkpoint.names() if name not in wanted and name not in tie_names]
    report.unexpected = [name for name in extra if matches(name, [*may_exceed, *leave_out])]
    if strange := sorted(set(extra) - set(report.unexpected)):
        problems.append(f"unexpected {listed(strange)}")
    misfits = [
        f"{name} ({why})"
        for name, source in sources.items()
        if (why := layout.misfit(kind, name, checkpoint.shape(source), wanted[name]))
    ]
    if misfits:
        problems.append(f"of another shape: {listed(misfits)}")
    if problems:
        raise UserError(
            f"{checkpoint.path} ({kind}) does not fit the model: {'; '.join(problems)}. Check the model's geometry"
        )
    for source in dict.fromkeys(sources.values()):
        _check_values(checkpoint, source)
    for tied, owner in layout.tied.items():
        both = tied in tie_names and owner in tie_names
        if both and not torch.equal(checkpoint.tensor(tied), checkpoint.tensor(owner)):
            raise UserError(f"{checkpoint.path}: '{tied}' and '{owner}' differ, but the model has one tensor for both")

    for name, source in sources.items():
        tensor = checkpoint.tensor(source)
        if tuple(tensor.shape) != wanted[name]:
            tensor, note = layout.fitted(kind, name, tensor, wanted[name])
            report.notes.append(note)
        write(name, tensor)
        report.written.append(name)
    return report


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _resolve_ties(wanted: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[dict[str, str], set[str]]:
    """Model name -> the checkpoint's name that holds its values, and the tied names that the checkpoint has."""
    sources = {name: name for name in wanted if name in checkpoint}
    present: set[str] = set()
    for tied, owner in checkpoint.layout.tied.items():
        present |= {name for name in (tied, owner) if name in checkpoint}
        for name, other in ((tied, owner), (owner, tied)):
            if name in wanted and name not in checkpoint and other in checkpoint:
                sources[name] = other
        if tied not in wanted and owner not in wanted:
            present -= {tied, owner}
    return sources, present


def _check_values(checkpoint: Checkpoint, name: str) -> None:
    tensor = checkpoint.tensor(name)
    if tensor.dtype not in FLOATS:
        raise UserError(f"{checkpoint.path}: '{name}' is {tensor.dtype}, weights are {', '.join(map(str, FLOATS))}")
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"{checkpoint.path}: '{name}' holds NaN or infinite values; the file is damaged or the run diverged"
        )
