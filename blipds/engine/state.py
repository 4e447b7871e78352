"""What a run goes on from, by parameter: fp32 weight, both Adam moments, the step; under every ZeRO stage.

DeepSpeed's optimizers step `masters`: flat fp32 tensors that hold stretches of many parameters, cut and ordered as the
stage and the number of ranks ask for. Here each of them is described as pieces of named parameters, so that what one
arrangement wrote any other can read. Settings of the parameter groups are never read: they come from the config.

On disk, `adam_<rank>.safetensors` of every rank holds the moments of its pieces, `exp_avg:<parameter>:<first element>`
and `exp_avg_sq:...`; the weights are those of `model.safetensors`, which evaluation and export read too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from blipds import distributed
from blipds.engine.files import FileRecord, host_copies, write_tensors
from blipds.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """`numel` elements of the flattened parameter `name`, from `start` on; in its master they begin at `offset`."""

    name: str
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Master:
    """A tensor that the inner optimizer steps, and what it holds; `group` is its ZeRO-3 sub-group."""

    tensor: Tensor
    pieces: list[Piece]
    group: int = 0


class TrainingState:
    """The optimizer's state of a DeepSpeed engine, as pieces of parameters. Every rank makes one."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer  # DeepSpeed's wrapper, or in ZeRO-0 fp32 the Adam itself
        self.inner = engine.basic_optimizer
        self.parameters = dict(engine.module.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.wrapper = type(self.optimizer).__name__
        self.masters = self.find_masters()

    # --- where DeepSpeed keeps it (0.19)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds everything (ZeRO-0)."""
        return self.wrapper not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")

    def find_masters(self) -> list[Master]:
        optimizer = self.optimizer
        if self.wrapper == "DeepSpeedZeroOptimizer":  # stages 1 and 2
            return self.linked(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)
        if self.wrapper == "BF16_Optimizer":  # stage 1 in bf16 with fp32 gradients
            return self.linked(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition)
        if self.wrapper == "DeepSpeedZeroOptimizer_Stage3":
            return self.sharded()
        if self.wrapper == "FP16_Optimizer":  # stage 0 in bf16 or fp16
            return [
                Master(flat, self.in_a_row(group))
                for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
            ]
        pairs: list[tuple[nn.Parameter, Tensor]]
        if self.wrapper == "FP16_UnfusedOptimizer":  # the same with torch's Adam
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            pairs = [pair for low, high in groups for pair in zip(low, high, strict=True)]
        else:
            pairs = [(parameter, parameter) for group in optimizer.param_groups for parameter in group["params"]]
        return [Master(tensor, self.in_a_row([parameter])) for parameter, tensor in pairs]

    def in_a_row(self, parameters: list[nn.Parameter]) -> list[Piece]:
        pieces, offset = [], 0
        for parameter in parameters:
            pieces.append(Piece(self.names[id(parameter)], 0, offset, parameter.numel()))
            offset += parameter.numel()
        return pieces

    def linked(self, groups: list[list[nn.Parameter]], flats: list[Tensor]) -> list[Master]:
        """DeepSpeed has noted on each parameter which stretch of it this rank holds, and where."""
        masters = []
        for group, flat in zip(groups, flats, strict=True):
            pieces = []
            for parameter in group:
                mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    pieces.append(Piece(self.names[id(parameter)], low.start, high.start, high.numel))
            masters.append(Master(flat, pieces))
        return masters

    def sharded(self) -> list[Master]:
        """ZeRO-3: of each parameter every rank holds as many elements, the last ones padding."""
        optimizer, masters = self.optimizer, []
        groups = zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        for number, (parameters, flat) in enumerate(groups):
            pieces = []
            for parameter in parameters:
                _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = share * optimizer._get_param_partition_rank(parameter)
                numel = min(share, parameter.ds_numel - start)
                if numel > 0:
                    pieces.append(Piece(self.names[id(parameter)], start, offset, numel))
            masters.append(Master(flat, pieces, number))
        return masters

    def whole_masters(self) -> dict[str, Tensor]:
        """{name: fp32 weight} where every rank holds everything, else nothing."""
        if not self.replicated:
            return {}
        found = {}
        for master in self.masters:
            for piece in master.pieces:
                flat = master.tensor.detach().view(-1).narrow(0, piece.offset, piece.numel)
                found[piece.name] = flat.view(self.parameters[piece.name].shape)
        return found

    @contextmanager
    def at_hand(self, master: Master, writing: bool) -> Iterator[None]:
        """Brings a master and its moments in from NVMe where they are there; with `writing` back, too."""
        if not (self.wrapper.endswith("Stage3") and self.optimizer._swappable_optimizer_subgroup(master.group)):
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
        shapes = {
            f"{moment}:{piece.name}:{piece.start}": (piece.numel,)
            for master in self.masters
            for piece in self.own_pieces(master)
            for moment in MOMENTS
        }
        path, moments = folder / file_of(distributed.rank()), self.own_moments()
        return partial(write_tensors, path, shapes, host_copies(moments) if copy else moments, {"format": "adam"})

    def own_moments(self) -> Iterator[Tensor]:
        for master in self.masters:
            with self.at_hand(master, writing=False):
                state = self.adam_of(master).state[master.tensor]
                for piece in self.own_pieces(master):
                    for moment in MOMENTS:
                        if moment in state:
                            yield state[moment].view(-1).narrow(0, piece.offset, piece.numel)
                        else:  # saved before the first step
                            yield torch.zeros(piece.numel)

    def read(self, folder: Path, weights: Path, counters: Mapping[str, Any], same_precision: bool) -> None:
        """Fills the masters and their moments from a checkpoint of any shape, by memory map. Collective."""
        moments, step = StoredMoments(folder), int(counters["adam_step"])
        with safe_open(weights, framework="pt") as whole, torch.no_grad():
            for master in self.masters:
                with self.at_hand(master, writing=True):
                    state = self.fresh_state(self.adam_of(master), master.tensor, step)
                    for piece in master.pieces:
                        into = master.tensor.view(-1).narrow(0, piece.offset, piece.numel)
                        into.copy_(whole.get_tensor(piece.name).view(-1)[piece.start : piece.start + piece.numel])
                        for moment in MOMENTS:
                            moments.copy(moment, piece, state[moment].view(-1).narrow(0, piece.offset, piece.numel))
        self.refresh_model()
        wind_adam(self.inner, step)
        if same_precision and self.scaler is not None:
            for key, value in counters["loss_scale"].items():
                setattr(self.scaler, key, value)

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
        if self.wrapper in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
            optimizer.update_lp_params()
        elif self.wrapper == "DeepSpeedZeroOptimizer_Stage3":
            optimizer.checkpoint_event_prologue()  # partitions what is gathered
            for master in self.masters:
                with self.at_hand(master, writing=False):
                    optimizer._reassign_or_swap_out_partitioned_parameters(master.group)
            optimizer.checkpoint_event_epilogue()  # gathers what stays gathered
        elif self.wrapper == "FP16_Optimizer":
            for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
                for parameter, piece in zip(group, self.in_a_row(group), strict=True):
                    parameter.data.copy_(flat.data.narrow(0, piece.offset, piece.numel).view_as(parameter))
        elif self.wrapper == "FP16_UnfusedOptimizer":
            for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for parameter, master_weight in zip(low, high, strict=True):
                    parameter.data.copy_(master_weight.data)


def file_of(rank: int) -> str:
    return f"adam_{rank:05d}.safetensors"


class StoredMoments:
    """The moments of a checkpoint, whoever wrote them."""

    def __init__(self, folder: Path) -> None:
        self.stretches: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}  # -> (start, file, key)
        for path in sorted(folder.glob(file_of(0).replace("00000", "*"))):
            file = safe_open(path, framework="pt")
            for key in list(file.keys()):
                moment, name, start = key.split(":")
                self.stretches.setdefault((moment, name), []).append((int(start), file, key))

    def copy(self, moment: str, piece: Piece, into: Tensor) -> None:
        """Fills `into` with the piece's elements."""
        missing, end = piece.numel, piece.start + piece.numel
        for start, file, key in self.stretches.get((moment, piece.name), []):
            stored = file.get_tensor(key)  # memory-mapped: what is not copied is not read
            first, last = max(start, piece.start), min(start + stored.numel(), end)
            if first < last:
                into[first - piece.start : last - piece.start].copy_(stored[first - start : last - start])
                missing -= last - first
        if missing > 0:
            raise UserError(
                f"the checkpoint lacks {missing} elements of {moment} of {piece.name}: is it of this model?"
            )


def wind_adam(adam: Any, step: int) -> None:
    """Brings DeepSpeed's Adam on CPUs to where it stood after `step` steps.

    It keeps running products of the betas (cpu_adam.h, IncrementStep) and, started in the middle, computes them as
    powers, a rounding away: winding it through all steps with one zero makes a resumed run equal to the bit. It costs
    some microseconds a step. On GPUs there is nothing to wind.
    """
    zeros = [torch.zeros(1) for _ in range(4)]  # gradient, parameter, exp_avg, exp_avg_sq
    beta1, beta2 = adam.param_groups[0]["betas"]
    kind = type(adam).__name__
    if kind == "DeepSpeedCPUAdam":
        gradient, parameter, *moments = zeros
        for number in range(1, step + 1):
            adam.ds_opt_adam.adam_update(
                adam.opt_id, number, 0.0, beta1, beta2, 1e-8, 0.0, True, parameter, gradient, *moments
            )
    elif kind == "FusedAdam" and distributed.device_type() == "cpu":
        lists = [[tensor] for tensor in zeros]
        for number in range(1, step + 1):
            adam.multi_tensor_adam(
                1, adam._dummy_overflow_buf, lists, 0.0, beta1, beta2, 1e-8, number, adam.adam_w_mode, 1, 0.0
            )
