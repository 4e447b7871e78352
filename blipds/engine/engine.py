"""BLIP in a DeepSpeed engine: what the loop needs of DeepSpeed, and nothing else of it."""

import gc
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blipds import distributed
from blipds.config.deepspeed import Section, offload_folders, uses_torch_adam, zero_stage
from blipds.engine.diagnosis import first_non_finite
from blipds.engine.gradient_order import keep_gradients_in_order
from blipds.engine.multi_tensor import use_multi_tensor_calls
from blipds.engine.state import TrainingState
from blipds.models.parameters import Write, whole_shape
from blipds.models.protocol import CaptioningModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Runs `function` and keeps only its inputs; its activations are computed again in the backward pass.

    torch's non-reentrant checkpoint, which works under ZeRO 0 to 3 and replays dropout with the same random numbers.
    """
    return checkpoint(function, *inputs, use_reentrant=False)


def checkpointed_on_host(function: Callable[..., Any], *inputs: Any) -> Any:
    """As `checkpointed`, and the inputs wait for the backward pass in the host's pinned memory.

    DeepSpeed's `cpu_checkpointing`, which DeepSpeed itself leaves to the model. It costs a copy of the inputs over PCIe
    there and one back.
    """
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return checkpointed(function, *inputs)


def default_precision(device: torch.device) -> Literal["bf16", "fp16", "fp32"]:
    """What "auto" in the DeepSpeed JSON means: bf16 where the device does it well, fp16 on older GPUs, else fp32."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "bf16"  # a plan for GPUs that are elsewhere
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # bf16 without matrix instructions for it is slower than fp32 on a CPU
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def flash_in_training(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's flash attention is the faster one.

    On CPUs it is 2 to 5 times slower than plain products in the bf16 backward pass of sequences below about 200 tokens
    (seen with torch 2.14 on AMX); in the forward pass alone it is twice as fast.
    """
    return device_type != "cpu" or dtype != torch.bfloat16


def parameter_groups(
    model: nn.Module, weight_decay: float, weight_decay_on: str, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters, a group for each distinct pair of weight decay and lr_scale.

    Weight decay is on tensors of two or more dimensions (LAVIS: "matrices"), or on "all". `lr_scales`: parameter name
    -> factor on the learning rate (models/lr_scales.py); `Engine.step` applies it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if weight_decay_on == "all" or len(whole_shape(parameter)) >= 2 else 0.0
            groups.setdefault((decay, 1.0 if lr_scales is None else lr_scales[name]), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (-item[0][0], -item[0][1]))
    return [{"params": group, "weight_decay": decay, "lr_scale": scale} for (decay, scale), group in ordered]


def join_deepspeed() -> None:
    """Has DeepSpeed communicate over the process group that is there; more calls do nothing more. Collective.

    Its CPU all-reduce leaves buffers (69 MB a rank) in /dev/shm for ever. Once every rank has mapped them their names
    are taken away, so that they go with the last rank, however it ends.
    """
    from deepspeed import init_distributed

    with redirect_stdout(io.StringIO()):  # it prints one line a rank for each op
        init_distributed(verbose=False)
    distributed.barrier()
    names = f"deepspeed_allreduce_buffer_{os.getuid()}_*_{os.environ['MASTER_PORT']}_{distributed.rank()}"
    for path in Path("/dev/shm").glob(names):
        path.unlink()


@contextmanager
def partitioned_init(config: Section) -> Iterator[None]:
    """Shares the parameters of every module built inside out among the ranks, once its `__init__` is done. Collective.

    `config` is a resolved DeepSpeed config: it says the precision and where the parts are kept (device, host, NVMe). No
    rank ever holds more than its share and one whole parameter. Below stage 3 nothing happens. Code inside that looks
    at values of a finished module finds empty tensors, so random weights come afterwards (`Engine.filling`).
    """
    if zero_stage(config) < 3:
        yield
        return
    from deepspeed.runtime.zero import Init

    join_deepspeed()  # otherwise Init takes this rank for the only one
    with Init(config_dict_or_path=config):
        yield


class Engine:
    """Owns the model once it is built. `config` is a resolved DeepSpeed config (blipds.config.deepspeed).

    What NVMe offload writes is the engine's own: `close` removes the folders. `tf32`: training in fp32 may use TF32.
    `compiled`: layers are, and may bring their gradients in another order on each rank.
    Building it is collective, and so is every method that says so.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Section,
        groups: list[dict[str, Any]],
        precision: str,
        tf32: bool = False,
        compiled: bool = False,
    ) -> None:
        import deepspeed

        self.flash_in_training = flash_in_training(distributed.device_type(), DTYPES[precision])
        torch.backends.cuda.enable_flash_sdp(self.flash_in_training)
        self.tf32 = tf32
        distributed.allow_tf32(tf32)
        self.stage = zero_stage(config)
        self.precision = precision
        self.dtype = DTYPES[precision]
        self.offload_folders = offload_folders(config)
        # Without ZeRO in fp32 DeepSpeed neither measures gradients nor looks whether they are finite: done here, and
        # clipping with it.
        self.checks_gradients = self.stage == 0 and precision == "fp32"
        self.max_grad_norm: Any = config.get("gradient_clipping", 0.0)
        if self.checks_gradients:
            config = {**config, "gradient_clipping": 0.0}
        if uses_torch_adam(config):
            groups = [{**group, "fused": True} for group in groups]
        join_deepspeed()
        with redirect_stdout(io.StringIO()):  # it prints one line a rank for each op
            self._deepspeed, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
        use_multi_tensor_calls(self._deepspeed.optimizer)
        if compiled:
            keep_gradients_in_order(self._deepspeed.optimizer, model)
        self.state = TrainingState(self._deepspeed)
        if hasattr(self.state.scaler, "raise_error_at_min_scale"):  # fp16: run.max_bad_steps ends the run instead
            self.state.scaler.raise_error_at_min_scale = False
        self.frozen: dict[str, Tensor] = {}  # rank 0: fp32 numbers that the model's precision cannot hold, on the host
        self._dropped = False

    @property
    def device(self) -> torch.device:
        return self._deepspeed.device

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The model's summed loss of one micro-batch. Collective under ZeRO-3."""
        return self._deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, as it is, to the window's; DeepSpeed averages over ranks. Collective."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, measure: bool) -> float | None:
        """Ends a micro-batch; at the end of its window updates the weights, or leaves all as it is. Collective.

        It leaves it where a gradient is not finite (`skipped`). Returns the norm of the gradients, before clipping,
        where `measure` asks for it.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        norm: Any = None
        if self.checks_gradients and self._deepspeed.is_gradient_accumulation_boundary():
            norm = self.clip_or_drop()  # one device sync a step, as DeepSpeed's own look elsewhere
        self._deepspeed.step()
        if measure and norm is None:
            norm = self._deepspeed.get_global_grad_norm()
        return float(norm) if measure and norm is not None else None

    def clip_or_drop(self) -> Tensor:
        """The norm of the gradients; where it is not finite they are dropped, and Adam passes over their weights."""
        with_gradient = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in with_gradient)  # type: ignore[misc]
        self._dropped = not bool(torch.isfinite(norm))
        if self._dropped:
            for parameter in with_gradient:
                parameter.grad = None
        elif self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(with_gradient, self.max_grad_norm, norm)
        return norm

    @property
    def skipped(self) -> bool:
        """After the last micro-batch of a window: whether the weights stayed as they were. The same on every rank."""
        return self._dropped or not self._deepspeed.was_step_applied()

    def find_non_finite(self, losses: Iterable[Tensor]) -> str | None:
        """Where numbers stop being finite: in a weight, or on the way to `losses` and back. Collective.

        The losses are computed while they are iterated over. The engine cannot train any more afterwards.
        """
        bad = [name for name, weight in self.weights() if not bool(torch.isfinite(weight).all())]
        with first_non_finite(self.model) as found:
            for loss in losses:
                self.backward(loss)
        return f"the weights {bad[0]}" if bad else next(iter(found), None)

    @property
    def model(self) -> CaptioningModel:
        """The bare model, for names and shapes; under ZeRO-3 its weights are there only inside `evaluating()`."""
        return self._deepspeed.module

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of fp16."""
        return float(self.state.scaler.cur_scale) if self.precision == "fp16" else None

    @property
    def skipped_steps(self) -> int:
        """Steps that fp16 skipped because a gradient overflowed."""
        return self._deepspeed.skipped_steps

    def train(self) -> None:
        self._deepspeed.train()

    @contextmanager
    def evaluating(self, gather: bool = True) -> Iterator[CaptioningModel]:
        """The model in evaluation mode. Collective.

        Under ZeRO-3 its weights are gathered once for all that happens inside, so that ranks may do different amounts
        of work; without `gather` they stay partitioned, and ranks must call the same modules the same number of times.
        """
        self._deepspeed.eval()
        torch.backends.cuda.enable_flash_sdp(True)
        distributed.allow_tf32(False)
        try:
            from deepspeed.runtime.zero import unwrap_model_for_generation

            whole = unwrap_model_for_generation(self._deepspeed) if self.stage == 3 and gather else nullcontext()
            with whole, torch.no_grad():
                yield self.model
        finally:
            torch.backends.cuda.enable_flash_sdp(self.flash_in_training)
            distributed.allow_tf32(self.tf32)
            self._deepspeed.train()

    @contextmanager
    def filling(self) -> Iterator[Write]:
        """Gives a `write(name, tensor)` that puts rank 0's tensor into a parameter, or into its first rows, unrounded.

        What learns goes into the optimizer's fp32 copies. What is frozen goes into the model, and where its precision
        rounds it rank 0 keeps the fp32 tensor on the host: 4 bytes a frozen weight, on one machine, for `weights`.
        Collective, as each `write` is: all ranks give tensors of the same shapes in the same order.
        """
        with torch.no_grad(), self.state.filling() as write_masters:

            def write(name: str, tensor: Tensor) -> None:
                parameter = self.model.get_parameter(name)
                name = self.state.names[id(parameter)]  # the first of tied ones
                tensor = tensor.to(self.device, torch.float32, copy=True).contiguous()
                if distributed.world_size() > 1:
                    torch.distributed.broadcast(tensor, src=0)
                if parameter.requires_grad:
                    write_masters(name, tensor)
                else:
                    self.write_frozen(name, parameter, tensor)

            yield write

    def write_frozen(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Collective."""
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(parameter, modifier_rank=0):  # does nothing below stage 3
            if self.stage == 3 and not distributed.is_main():
                return
            whole = self.frozen.pop(name, parameter.detach().to("cpu", torch.float32, copy=True))
            whole.view(-1)[: tensor.numel()].copy_(tensor.view(-1))
            parameter.copy_(whole)
            kept = distributed.is_main() and not self.model.is_elsewhere(name)
            if kept and not torch.equal(parameter.float().cpu(), whole):
                self.frozen[name] = whole

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, weight in fp32), one after the other: never rounded where it was filled in fp32.

        Those that a file elsewhere holds (`CaptioningModel.is_elsewhere`) are left out.

        Collective: every rank must exhaust it, and gets every weight; the frozen ones, other ranks than 0 as the model
        has them. They are where the optimizer has them, until the next: who keeps one copies it.
        """
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        held = self.state.whole_weights()  # ZeRO-0: every rank has them all
        for name in self.weight_shapes():
            parameter = self.model.get_parameter(name)
            weight = held.get(name)
            if weight is None and parameter.requires_grad:
                weight = safe_get_full_fp32_param(parameter)
            if weight is None:
                with GatheredParameters(parameter):
                    weight = parameter.detach().float().clone()
                weight = self.frozen.get(name, weight)
            yield name, weight.detach().float()

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `weights` yields, in its order."""
        parameters = self.model.named_parameters()
        return {name: tuple(whole_shape(p)) for name, p in parameters if not self.model.is_elsewhere(name)}

    @property
    def checkpoint_bytes(self) -> int:
        """What the files of all ranks together take: 4 bytes a weight, 8 for the moments of one that learns."""
        sizes = {name: prod(shape) for name, shape in self.weight_shapes().items()}
        return sum(size * (12 if self.model.get_parameter(name).requires_grad else 4) for name, size in sizes.items())

    def peak_memory(self) -> int:
        """The device's peak memory in bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def close(self) -> None:
        """Frees model, optimizer and buffers, which DeepSpeed's `destroy` keeps; the engine is gone. Collective."""
        state, parameters = self.state, list(self.model.parameters())
        self._deepspeed.destroy()
        del self._deepspeed, self.state
        # parameters and the hooks on them hold the optimizer, which holds them, where Python's collector does not look
        for parameter in parameters:
            parameter.grad, parameter.data = None, parameter.data.new_empty(0)
            vars(parameter).clear()
        state.inner.state.clear()
        state.inner.param_groups.clear()
        if state.optimizer is not state.inner:
            vars(state.optimizer).clear()
        self.frozen.clear()
        del state, parameters
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.backends.cuda.enable_flash_sdp(True)
        distributed.allow_tf32(False)
        distributed.barrier()
        if distributed.local_rank() == 0:
            for folder in self.offload_folders:
                shutil.rmtree(folder, ignore_errors=True)
