"""Checkpoints in: the names of stored tensors in a model, and the strict load.

What an arch's files look like is its `CheckpointFormat`. No engine here: `load_into` takes the shapes of a model's
parameters and a function that writes one of them.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.checkpoint_files import StoredTensors, listed
from blipds.models.parameters import Write

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class CheckpointFormat:
    """How files name and lay out an arch's weights. This one: under the names that the model has."""

    # A file may have the name on the left, that on the right (the model's), or both, with equal values.
    tied: Mapping[str, str] = {}
    # Kinds that hold one part of the model: what the part's names begin with, and the run config's key for such a file.
    parts: Mapping[str, tuple[str, str]] = {}

    def kind(self, stored: StoredTensors) -> str:
        """What wrote it, in a word for messages. UserError for what this arch cannot read."""
        return "blipds"

    def our_name(self, kind: str, name: str) -> str | None:
        """The model's name; None: left aside. What no rule knows stays, so that the load lists it as unexpected."""
        return name

    def optional(self, kind: str, wanted: Collection[str], given: Collection[str]) -> tuple[list[str], list[str]]:
        """Patterns of names that the file may lack, and of names that the model may lack."""
        return [], []

    def transformers_name(self, name: str) -> str | None:
        """What transformers calls a parameter or a module; None: it has no such model."""
        return None

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor | None, str]:
        """A tensor of another shape as the parameter takes it (fewer rows fill the first), and a line about it.

        None, and the reason, where it cannot fill the parameter.
        """
        return None, f"{tuple(tensor.shape)} in the file, {wanted} in the model"


class Checkpoint:
    """Stored tensors under the model's names.

    left_aside: names in the file that the captioner does not use. part: what the names of the part begin with that the
    file holds, "" for the whole; part_key: the key of the run config that names it.
    """

    def __init__(self, stored: StoredTensors, layout: CheckpointFormat) -> None:
        self.path, self.config, self.location = stored.path, stored.config, stored.location
        self.layout = layout
        self.kind = layout.kind(stored)
        self.part, self.part_key = layout.parts.get(self.kind, ("", ""))
        self.left_aside: list[str] = []
        self.stored = stored.tensors
        self.stored_names: dict[str, list[str]] = {}
        for name in stored.tensors:
            ours = layout.our_name(self.kind, name)
            if ours is None:
                self.left_aside.append(name)
            else:
                self.stored_names.setdefault(layout.tied.get(ours, ours), []).append(name)
        self.tensors = {ours: self.stored[names[0]] for ours, names in self.stored_names.items()}

    def check_values(self, name: str) -> None:
        """UserError where a tensor holds no weights, or the file has another under a second name. Reads it whole."""
        tensor, (first, *others) = self.tensors[name], self.stored_names[name]
        if tensor.dtype not in FLOATS:
            raise UserError(f"{self.path}: '{name}' is {tensor.dtype}, weights are {', '.join(map(str, FLOATS))}")
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{self.path}: '{name}' holds NaN or infinite values; the file is damaged or the run diverged"
            )
        for other in others:
            if self.stored[other].dtype != tensor.dtype or not torch.equal(self.stored[other], tensor):
                raise UserError(f"{self.path}: '{other}' and '{first}' differ, but the model has one tensor for both")


@dataclass
class LoadReport:
    """What `load_into` did: names written, and what was left out on either side."""

    written: list[str]
    missing: list[str]  # of the model, allowed: they keep their values
    unexpected: list[str]  # in the file, allowed: not used
    notes: list[str] = field(default_factory=list)


def load_into(
    model_shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, write: Write, *, leave_out: Sequence[str] = ()
) -> LoadReport:
    """Loads a checkpoint strictly: every name, shape, dtype and value is checked before the first `write`.

    model_shapes: name -> shape of each parameter (of tied ones once). write(name, tensor): copies into the parameter; a
    tensor with fewer rows is for the parameter's first rows. leave_out: fnmatch patterns of names that are not asked
    for. A file of one part (`CheckpointFormat.parts`) is asked for that part only. Reads the file twice. UserError
    lists all that does not fit.
    """
    layout, kind, tensors = checkpoint.layout, checkpoint.kind, checkpoint.tensors
    wanted = {
        name: tuple(shape)
        for name, shape in model_shapes.items()
        if name.startswith(checkpoint.part) and not matches(name, leave_out)
    }
    may_miss, may_exceed = layout.optional(kind, wanted, tensors)
    absent, extra = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    report = LoadReport(
        written=[name for name in wanted if name in tensors],
        missing=[name for name in wanted if name in absent and matches(name, may_miss)],
        unexpected=[name for name in tensors if name in extra and matches(name, [*may_exceed, *leave_out])],
    )
    fitting: dict[str, Tensor] = {}
    misfits = []
    for name in report.written:
        if tuple(tensors[name].shape) == wanted[name]:
            fitting[name] = tensors[name]
            continue
        fitted, note = layout.fitted(kind, name, tensors[name], wanted[name])
        if fitted is None:
            misfits.append(f"{name} ({note})")
        else:
            fitting[name] = fitted
            report.notes.append(note)
    problems = {
        "missing": sorted(absent.difference(report.missing)),
        "unexpected": sorted(extra.difference(report.unexpected)),
        "of another shape:": misfits,
    }
    if any(problems.values()):
        lines = "; ".join(f"{what} {listed(names)}" for what, names in problems.items() if names)
        raise UserError(f"{checkpoint.path} ({kind}) does not fit the model: {lines}. Check the model's geometry")
    for name in report.written:
        checkpoint.check_values(name)
    for name, tensor in fitting.items():
        write(name, tensor)
    return report


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Tells weights apart by the first 16,384 numbers of each tensor: 15 MB of the 5 GB of OPT-2.7B."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        begin = tensors[name].flatten()[: 1 << 14].contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode() + bytes(begin.numpy()))
    return digest.hexdigest()


def lasting(location: str) -> str:
    """A location as a checkpoint names it: runs resume wherever they are started."""
    path = Path(location)
    return str(path.resolve()) if path.exists() else location


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
