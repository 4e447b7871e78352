"""What a run goes on from, by parameter: fp32 weight, both Adam moments, the step; under every ZeRO stage.

DeepSpeed's optimizers step `masters`: flat fp32 tensors that hold stretches of many parameters, cut and ordered as the
stage and the number of ranks ask for. Here each of them is described as pieces of named parameters, so that what one
arrangement wrote any other can read. Settings of the parameter groups are never read: they come from the config.

On disk, `adam_<rank>.safetensors` of every rank holds the moments of its pieces, `exp_avg:<parameter>:<first element>`
and `exp_avg_sq:...`; the weights are those of `model.safetensors`, which evaluation and export read too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, product
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from blipds import distributed
from blipds.engine.files import FileRecord, host_copies, write_tensors
from blipds.errors import UserError
from blipds.models.parameters import Write

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
STAGE_3 = "DeepSpeedZeroOptimizer_Stage3"

READ_VERSION = "0.19.8"  # of DeepSpeed: the one whose private fields are read here
# By the name of the wrapper around the inner optimizer, and of that one itself. A wrapper's first two fields are groups
# of the model's parameters, and the masters that belong to them.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": ("bit16_groups", "single_partition_of_fp32_groups", "update_lp_params"),  # stages 1 and 2
    "BF16_Optimizer": ("bf16_groups", "fp32_groups_flat_partition", "update_lp_params"),  # stage 1, fp32 gradients
    STAGE_3: (
        *("fp16_groups", "fp32_partitioned_groups_flat", "grad_position", "get_param_id"),
        *("_get_param_partition_rank", "_swappable_optimizer_subgroup", "_release_swap_buffers"),
        *("_optimizer_states_and_gradient_swap_in", "_optimizer_states_and_gradient_swap_out"),
        *("_reassign_or_swap_out_partitioned_parameters", "checkpoint_event_prologue", "checkpoint_event_epilogue"),
    ),
    "FP16_Optimizer": ("fp16_groups", "fp32_groups_flat"),  # stage 0 in bf16 or fp16
    "FP16_UnfusedOptimizer": ("fp16_groups", "fp32_groups"),  # the same with torch's Adam
    "DeepSpeedCPUAdam": ("ds_opt_adam", "opt_id"),
    "FusedAdam": ("multi_tensor_adam", "_dummy_overflow_buf", "adam_w_mode"),
    **dict.fromkeys(("AdamW", "Adam"), ("param_groups",)),  # torch's
}
# What DeepSpeed notes on each parameter.
PARAMETER_FIELDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("DeepSpeedZeroOptimizer", "BF16_Optimizer"), ("_hp_mapping",)),
    STAGE_3: ("ds_id", "ds_numel", "ds_shape"),
}


def check_fields(optimizer: Any, inner: Any, parameters: list[nn.Parameter]) -> None:
    """UserError where the installed DeepSpeed lacks a private field that is read here; it names both versions."""
    kinds = [(type(found).__name__, found) for found in (optimizer, inner)]
    problems = [f"{kind} is unknown" for kind, _ in kinds if kind not in FIELDS]
    lacking = [(kind, field) for kind, found in kinds for field in FIELDS.get(kind, ()) if not hasattr(found, field)]
    for field in PARAMETER_FIELDS.get(type(optimizer).__name__, ()):
        lacking += [("a parameter", field)] if not all(hasattr(parameter, field) for parameter in parameters) else []
    problems += [f"{what} has no {field}" for what, field in lacking]
    if problems:
        from deepspeed import __version__

        raise UserError(
            f"deepspeed {__version__} is installed, and blipds knows the optimizers of {READ_VERSION} "
            f"({'; '.join(problems)}): pip install deepspeed=={READ_VERSION}"
        )


@dataclass(frozen=True)
class Piece:
    """`numel` elements of the flattened parameter `name`, from `start` on; in its master they begin at `offset`."""

    name: str
    start: int
    offset: int
    numel: int

    def of(self, master: Tensor) -> Tensor:
        """Its elements in a flat tensor that is laid out as the master."""
        return master.narrow(0, self.offset, self.numel)


@dataclass(frozen=True)
class Master:
    """A tensor that the inner optimizer steps, and what it holds; `group` is its ZeRO-3 sub-group."""

    tensor: Tensor
    pieces: list[Piece]
    group: int

    @property
    def flat(self) -> Tensor:
        return self.tensor.detach().view(-1)


class TrainingState:
    """The optimizer's state of a DeepSpeed engine, as pieces of parameters. Every rank makes one."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer  # DeepSpeed's wrapper, or in ZeRO-0 fp32 the Adam itself
        self.inner = engine.basic_optimizer
        self.parameters = dict(engine.module.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.wrapper = type(self.optimizer).__name__
        check_fields(self.optimizer, self.inner, [p for p in self.parameters.values() if p.requires_grad])
        self.masters = self.find_masters()
        # In ZeRO-0 bf16 and fp16 DeepSpeed makes Adam's state by a step without gradients, which would count as one.
        self.inner.state.clear()

    # --- where DeepSpeed keeps it

    @property
    def replicated(self) -> bool:
        """Whether every rank holds everything (ZeRO-0)."""
        return self.wrapper not in PARAMETER_FIELDS

    def find_masters(self) -> list[Master]:
        groups: Iterable[Any]
        masters: Iterable[Tensor]
        if self.optimizer is self.inner:
            groups = masters = [parameter for group in self.inner.param_groups for parameter in group["params"]]
        else:
            groups, masters = (getattr(self.optimizer, field) for field in FIELDS[self.wrapper][:2])
        if self.wrapper == "FP16_UnfusedOptimizer":  # a master for each parameter
            groups, masters = chain.from_iterable(groups), chain.from_iterable(masters)
        pieces = self.fragments
        if self.wrapper == STAGE_3:
            pieces = self.equal_shares
        elif self.replicated:
            pieces = self.one_after_the_other
        return [
            Master(flat, pieces([group] if isinstance(group, nn.Parameter) else group), number)
            for number, (group, flat) in enumerate(zip(groups, masters, strict=True))
        ]

    def one_after_the_other(self, parameters: list[nn.Parameter]) -> list[Piece]:
        """ZeRO-0: all of every parameter."""
        offsets = accumulate((parameter.numel() for parameter in parameters), initial=0)
        return [Piece(self.names[id(p)], 0, offset, p.numel()) for p, offset in zip(parameters, offsets, strict=False)]

    def fragments(self, parameters: list[nn.Parameter]) -> list[Piece]:
        """ZeRO-1 and 2: DeepSpeed has noted on each parameter which stretch of it this rank holds, and where."""
        pieces = []
        for parameter in parameters:
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(self.names[id(parameter)], low.start, high.start, high.numel))
        return pieces

    def equal_shares(self, parameters: list[nn.Parameter]) -> list[Piece]:
        """ZeRO-3: of each parameter every rank holds as many elements, the last ones padding."""
        optimizer, pieces = self.optimizer, []
        for parameter in parameters:
            _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = share * optimizer._get_param_partition_rank(parameter)
            numel = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if numel > 0:
                pieces.append(Piece(self.names[id(parameter)], start, offset, numel))
        return pieces

    def whole_weights(self) -> dict[str, Tensor]:
        """{name: fp32 weight} where every rank holds everything, else nothing."""
        held = [(piece, master) for master in self.masters for piece in master.pieces if self.replicated]
        return {piece.name: piece.of(master.flat).view_as(self.parameters[piece.name]) for piece, master in held}

    def on_nvme(self, master: Master) -> bool:
        return self.wrapper == STAGE_3 and self.optimizer._swappable_optimizer_subgroup(master.group)

    @contextmanager
    def swapped_in(self, master: Master, writing: bool) -> Iterator[None]:
        """Reads a master and its moments from NVMe where they are there; with `writing` writes them back, too."""
        if not self.on_nvme(master):
            yield
            return
        self.optimizer._optimizer_states_and_gradient_swap_in(master.group)
        yield
        if writing:
            self.optimizer._optimizer_states_and_gradient_swap_out(master.group)
        else:
            self.optimizer._release_swap_buffers(master.group)

    def adam_of(self, master: Master) -> torch.optim.Optimizer:
        """The Adam that steps it: where only a part is offloaded (`ratio`), DeepSpeed steps the rest with another."""
        devices = getattr(self.optimizer, "subgroup_to_device", {})
        return self.inner if devices.get(master.group, "cpu") == "cpu" else self.optimizer.backup_optimizer

    # --- what is in it

    @property
    def step(self) -> int:
        """Steps that Adam took; skipped ones do not count. All parameters take the same."""
        steps = [int(state["step"]) for state in self.inner.state.values() if "step" in state]
        return max(steps, default=0)  # FusedAdam counts on the last parameter of a group only

    @property
    def scaler(self) -> Any:
        """What holds fp16's loss scale."""
        return getattr(self.optimizer, "loss_scaler", None) or getattr(self.optimizer, "loss_scale_config", None)

    def counters(self) -> dict[str, Any]:
        """The numbers beside the tensors, alike on every rank."""
        scale = {key: getattr(self.scaler, key) for key in SCALER_STATE if hasattr(self.scaler, key)}
        return {"adam_step": self.step, "loss_scale": scale}

    def own_pieces(self, master: Master) -> Iterator[Piece]:
        """The pieces that this rank writes. Where all ranks hold everything, each writes its share."""
        if not self.replicated:
            yield from master.pieces
            return
        rank, ranks = distributed.rank(), distributed.world_size()
        for piece in master.pieces:
            first, last = piece.numel * rank // ranks, piece.numel * (rank + 1) // ranks
            if first < last:
                yield Piece(piece.name, piece.start + first, piece.offset + first, last - first)

    # --- to disk and back

    def writer(self, folder: Path, copy: bool) -> Callable[[], FileRecord]:
        """A function that writes this rank's moments, once, and may raise OSError.

        With `copy` it holds a copy of them on the host, and may be called while training goes on; else one piece at a
        time is in memory.
        """
        pieces = [piece for master in self.masters for piece in self.own_pieces(master)]
        shapes = {f"{moment}:{piece.name}:{piece.start}": (piece.numel,) for piece in pieces for moment in MOMENTS}
        path, moments = folder / f"adam_{distributed.rank():05d}.safetensors", self.own_moments()
        return partial(write_tensors, path, shapes, host_copies(moments) if copy else moments, {"format": "adam"})

    def own_moments(self) -> Iterator[Tensor]:
        for master in self.masters:
            with self.swapped_in(master, writing=False):
                state = self.adam_of(master).state[master.tensor]
                for piece, moment in product(self.own_pieces(master), MOMENTS):
                    # zeros where it is saved before the first step
                    yield piece.of(state[moment].view(-1)) if moment in state else torch.zeros(piece.numel)

    def read(self, folder: Path, counters: Mapping[str, Any], same_precision: bool) -> None:
        """Fills the moments from a checkpoint of any shape, by memory map; the masters are there. Collective."""
        stored, step = stored_moments(folder), int(counters["adam_step"])
        for master in self.masters:
            with self.swapped_in(master, writing=True):
                state = self.fresh_state(self.adam_of(master), master.tensor, step)
                for piece, moment in product(master.pieces, MOMENTS):
                    copy_piece(stored, moment, piece, piece.of(state[moment].view(-1)))
        advance_adam(self.inner, step)
        if same_precision and self.scaler is not None:
            for key, value in counters["loss_scale"].items():
                setattr(self.scaler, key, value)

    @contextmanager
    def filling(self) -> Iterator[Write]:
        """Gives a `write(name, tensor)` for the masters; the model takes them over, rounded, at the end. Collective.

        Masters on NVMe are written there at the end: until then this rank's share is on the host, 4 bytes an element.
        """
        targets = []
        for master in self.masters:
            with self.swapped_in(master, writing=False):
                targets.append(master.flat.clone() if self.on_nvme(master) else master.flat)
        places: dict[str, list[tuple[Piece, Tensor]]] = {}
        for master, target in zip(self.masters, targets, strict=True):
            for piece in master.pieces:
                places.setdefault(piece.name, []).append((piece, piece.of(target)))

        def write(name: str, tensor: Tensor) -> None:
            for piece, target in places.get(name, []):
                stretch = tensor.view(-1)[piece.start : piece.start + piece.numel]
                target[: len(stretch)].copy_(stretch)

        yield write
        for master, target in zip(self.masters, targets, strict=True):
            if self.on_nvme(master):
                with self.swapped_in(master, writing=True):
                    master.flat.copy_(target)
        self.refresh_model()

    def fresh_state(self, adam: torch.optim.Optimizer, tensor: Tensor, step: int) -> dict[str, Any]:
        """Adam's state of a master; optimizers make theirs in the first step only."""
        state = adam.state[tensor]
        if isinstance(adam, torch.optim.Adam):  # AdamW is one; it keeps the step in a tensor
            fused = adam.param_groups[0].get("fused")
            state["step"] = torch.tensor(float(step), device=tensor.device if fused else "cpu")
        else:
            state["step"] = step
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(tensor)
        return state

    def refresh_model(self) -> None:
        """Takes the masters over into the weights that the model computes with. Collective."""
        optimizer = self.optimizer
        if self.replicated:
            for name, weight in self.whole_weights().items():
                self.parameters[name].data.copy_(weight)
        elif self.wrapper != STAGE_3:
            optimizer.update_lp_params()
        else:
            optimizer.checkpoint_event_prologue()  # partitions what is gathered
            for master in self.masters:
                with self.swapped_in(master, writing=False):
                    optimizer._reassign_or_swap_out_partitioned_parameters(master.group)
            optimizer.checkpoint_event_epilogue()  # gathers what stays gathered


# (moment, parameter) -> (first element, stretch of it)
Stretches: TypeAlias = dict[tuple[str, str], list[tuple[int, Tensor]]]


def stored_moments(folder: Path) -> Stretches:
    """The moments of a checkpoint, whoever wrote it; memory-mapped."""
    stretches: Stretches = {}
    for path in sorted(folder.glob("adam_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                moment, name, start = key.split(":")
                stretches.setdefault((moment, name), []).append((int(start), file.get_tensor(key)))
    return stretches


def copy_piece(stored: Stretches, moment: str, piece: Piece, into: Tensor) -> None:
    """Fills `into` with the piece's elements of a moment."""
    missing, end = piece.numel, piece.start + piece.numel
    for start, stretch in stored.get((moment, piece.name), []):
        first, last = max(start, piece.start), min(start + stretch.numel(), end)
        if first < last:
            into[first - piece.start : last - piece.start].copy_(stretch[first - start : last - start])
            missing -= last - first
    if missing > 0:
        raise UserError(f"the checkpoint lacks {missing} elements of {moment} of {piece.name}: is it of this model?")


def advance_adam(adam: Any, step: int) -> None:
    """Brings DeepSpeed's Adam on CPUs to where it stood after `step` steps.

    It keeps running products of the betas (cpu_adam.h, IncrementStep) and, started in the middle, computes them as
    powers, a rounding away: taking all steps anew with one zero makes a resumed run equal to the bit. It costs
    some microseconds a step. On GPUs it keeps nothing.
    """
    gradient, parameter, *moments = zeros = [torch.zeros(1) for _ in range(4)]
    beta1, beta2 = adam.param_groups[0]["betas"]
    kind = type(adam).__name__
    for number in range(1, step + 1):
        if kind == "DeepSpeedCPUAdam":
            settings = (0.0, beta1, beta2, 1e-8, 0.0)  # rate, betas, eps, decay
            adam.ds_opt_adam.adam_update(adam.opt_id, number, *settings, True, parameter, gradient, *moments)
        elif kind == "FusedAdam" and distributed.device_type() == "cpu":
            lists, mode = [[tensor] for tensor in zeros], adam.adam_w_mode
            adam.multi_tensor_adam(1, adam._dummy_overflow_buf, lists, 0.0, beta1, beta2, 1e-8, number, mode, 1, 0.0)
