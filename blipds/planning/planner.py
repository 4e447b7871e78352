"""Will it fit: what a training step needs on a GPU, on the host, on NVMe and on the network, before anything is built.

Model states follow from sizes, by what DeepSpeed 0.19 allocates (runtime/zero/stage_1_and_2.py, stage3.py). Activations
come from running the model's own forward and backward on torch's meta device, where tensors have a size and no memory.
Needs neither deepspeed nor a GPU. All sizes are bytes unless said; GB is 10^9.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from blipds.config.deepspeed import Section, precision, setting, zero_stage
from blipds.config.run import Config
from blipds.data.caption_rows import caption_rows
from blipds.engine import DTYPES, checkpointed, parameter_groups
from blipds.models import build_model

GB = 1e9
# What no tensor shows: the CUDA context, NCCL's buffers, cuBLAS's workspace and what the allocator cannot use. A
# round allowance, not measured.
RESERVED = 1.5 * GB
CAPTIONS_OF_AN_IMAGE = 5  # what `captions_per_image: all` is in COCO and Flickr
DeviceType = Literal["cuda", "cpu"]


# ---- Sizes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements: `groups` of trainable parameters as the optimizer has them, and all `frozen` ones."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config) -> "Sizes":
        with torch.device("meta"):
            model = build_model(config.model, checkpointed)
        groups = parameter_groups(model, config.run.weight_decay, config.run.weight_decay_on)
        frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
        return cls(tuple(tuple(p.numel() for p in group["params"]) for group in groups), frozen)

    @property
    def trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def all(self) -> int:
        return self.trainable + sum(self.frozen)

    def every(self) -> Iterator[int]:
        for group in self.groups:
            yield from group
        yield from self.frozen


# ---- Model states ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class States:
    """What is there besides activations, on the rank that has most of it.

    `buffers` (communication, gathered parameters) exist in forward and backward, `update` only while the optimizer
    works, when activations are gone. `host` and `nvme` are one rank's too.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    update: float
    host: float = 0
    nvme: float = 0

    @property
    def held(self) -> float:
        """What DeepSpeed holds on the device from the end of a backward pass to the update."""
        return self.parameters + self.gradients + self.optimizer


def model_states(sizes: Sizes, ds: Section, ranks: int, accumulation: int = 1) -> States:
    """Bytes on one rank under a resolved DeepSpeed config."""
    if zero_stage(ds) == 0:
        return _stage_0(sizes, ds)
    return _stage_3(sizes, ds, ranks) if zero_stage(ds) == 3 else _stages_1_2(sizes, ds, ranks, accumulation)


def _width(ds: Section) -> int:
    """Bytes of a parameter."""
    return 4 if precision(ds) == "fp32" else 2


def _gradient_width(ds: Section) -> int:
    return {"fp32": 4, "bf16": 2, "fp16": 2}[str(setting(ds, "data_types.grad_accum_dtype") or precision(ds))]


def _number(ds: Section, key: str, default: int) -> int:
    """A number of zero_optimization; `default` is DeepSpeed's own."""
    value = setting(ds, f"zero_optimization.{key}")
    return value if isinstance(value, int) else default


def _offloaded(ds: Section, what: str) -> str:
    return str(setting(ds, f"zero_optimization.offload_{what}.device", "none"))


def _stage_0(sizes: Sizes, ds: Section) -> States:
    """Adam's two moments in fp32, and below fp32 a master copy; then the update makes fp32 gradients, and flattens."""
    n, width = sizes.trainable, _width(ds)
    half = width == 2
    return States(
        sizes.all * width, n * width, n * (12 if half else 8), 0, 8 * max(map(sum, sizes.groups)) if half else 0
    )


def _stages_1_2(sizes: Sizes, ds: Section, ranks: int, accumulation: int) -> States:
    width, share = _width(ds), sizes.trainable / ranks
    parameters = sizes.all * width
    buckets = (2 if setting(ds, "zero_optimization.overlap_comm") else 1) * _number(ds, "reduce_bucket_size", 5 * 10**8)
    if _offloaded(ds, "optimizer") != "none":
        # fp32 master, moments and gradients, a copy to send, and room for the largest parameter at either end
        largest = max(sizes.every()) * width
        host = share * (16 + width) + largest
        return States(parameters, 0, 0, buckets * width + largest, 0, host=host)
    gradients = _partition_gradients(sizes.groups, ranks) * _gradient_width(ds)
    if accumulation > 1 and zero_stage(ds) == 1:
        gradients = sizes.trainable * _gradient_width(ds)  # reduced only at the end of the window
    # the update flattens a group's gradients, and casts them
    update = max(map(sum, sizes.groups)) / ranks * (4 if width == 4 else 4 + width)
    return States(parameters, gradients, 12 * share, buckets * width, update)


def _partition_gradients(groups: Iterable[tuple[int, ...]], ranks: int) -> int:
    """Elements of the gradients that the fullest rank keeps: parameters on a border are whole on both sides of it."""
    totals = [0] * ranks
    for group in groups:
        share, start = -(-sum(group) // ranks), 0
        for numel in group:
            for rank in range(start // share, min((start + numel - 1) // share, ranks - 1) + 1):
                totals[rank] += numel
            start += numel
    return max(totals)


def _stage_3(sizes: Sizes, ds: Section, ranks: int) -> States:
    width, share = _width(ds), sizes.trainable / ranks
    parameters, gradients, optimizer = sizes.all * width / ranks, share * _gradient_width(ds), 12 * share
    persistent = sum(n for n in sizes.every() if n <= _number(ds, "stage3_param_persistence_threshold", 10**5)) * width
    gathered = min(sizes.all, _number(ds, "stage3_max_live_parameters", 10**9)) * width
    buffers = _number(ds, "reduce_bucket_size", 5 * 10**8) * width + max(gathered - persistent, 0)
    largest_group = min(max(map(sum, sizes.groups)) / ranks, _number(ds, "sub_group_size", 10**9))
    update = largest_group * 4
    host = nvme = 0.0
    optimizer_on, parameters_on = _offloaded(ds, "optimizer"), _offloaded(ds, "param")
    if optimizer_on != "none":
        update = 0
        host += optimizer + gradients + share * 4  # with the gradients in fp32
        optimizer = gradients = 0
    if optimizer_on == "nvme":
        count = setting(ds, "zero_optimization.offload_optimizer.buffer_count", 4)
        assert isinstance(count, int)
        nvme += 16 * share
        host = share * _gradient_width(ds) + count * largest_group * 4
    if parameters_on == "cpu":
        host, parameters = host + parameters, 0
    if parameters_on == "nvme":
        count = setting(ds, "zero_optimization.offload_param.buffer_count", 5)
        size = setting(ds, "zero_optimization.offload_param.buffer_size", 10**8)
        assert isinstance(count, int) and isinstance(size, int)
        host, nvme, parameters = host + count * size * width, nvme + parameters, 0
    return States(parameters + persistent, gradients, optimizer, buffers, update, host, nvme)


# ---- Network --------------------------------------------------------------------------------------------------------


def network(sizes: Sizes, ds: Section, ranks: int, accumulation: int, recomputes: bool = False) -> float:
    """Bytes that one rank sends in an optimizer step (ZeRO paper, arXiv 1910.02054, section 7).

    An all-gather or a reduce-scatter of n elements sends n (ranks - 1) / ranks, an all-reduce twice that. At stages 1
    and 2 DeepSpeed 0.19 all-reduces unless `use_multi_rank_bucket_allreduce` is false.
    """
    gathered, reduced = sizes.all * _width(ds), sizes.trainable * _width(ds)
    all_reduces = setting(ds, "zero_optimization.use_multi_rank_bucket_allreduce", True) is not False
    to_owners = (2 if all_reduces else 1) * reduced
    stage = zero_stage(ds)
    if stage == 0:
        sent = 2 * reduced
    elif stage < 3:
        sent = (accumulation if stage == 2 else 1) * to_owners + reduced
    else:  # gathered for forward and backward, and again where activations are computed again
        sent = accumulation * (reduced + (3 if recomputes else 2) * gathered)
    return sent * (ranks - 1) / ranks


# ---- Activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """`kept`: from the forward pass for the backward pass. `peak`: the most at any moment of the two."""

    kept: int
    peak: int


@dataclass(frozen=True)
class Shape:
    """A micro-batch: images, captions of each, tokens of a caption, and how many of them are the prompt's."""

    images: int
    captions: int
    tokens: int
    prompt_tokens: int

    @classmethod
    def of(cls, config: Config, prompt_tokens: int) -> "Shape":
        """The largest that the run config allows: every caption as long as `model.max_txt_len`."""
        given = [dataset.captions_per_image for dataset in config.datasets.values()]
        captions = max(CAPTIONS_OF_AN_IMAGE if isinstance(count, str) else count for count in given)
        return cls(config.run.batch_size_train, captions, config.model.max_txt_len, prompt_tokens)

    def inputs(self, image_size: int, dtype: torch.dtype, device: str = "meta") -> dict[str, Tensor]:
        """Arguments of `BlipCaption.forward`; the values mean nothing."""
        caption = [0] * self.tokens
        rows = caption_rows([[caption] * self.captions] * self.images, caption[: self.prompt_tokens], pad_token_id=0)
        pixels = torch.zeros(self.images, 3, image_size, image_size, dtype=dtype, device=device)
        return {"pixel_values": pixels, **rows.to(torch.device(device))}


def activations(config: Config, shape: Shape, dtype: torch.dtype, device_type: DeviceType) -> Activations:
    """Runs forward and backward of the model on the meta device, and counts what would be alive."""

    def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
        contexts = (nullcontext(), _Kernels(device_type, dtype))
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: contexts)

    with torch.device("meta"):
        model = build_model(config.model, recomputed).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # a gradient goes into DeepSpeed's buffers as soon as it is there: from then on it is a model state
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs = shape.inputs(config.model.image_size, dtype)
    with _Live([*model.parameters(), *inputs.values()]) as live:
        with _Kernels(device_type, dtype):
            loss = model(**inputs)
        kept = live.bytes
        loss.backward()
    return Activations(kept, live.peak)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, views counted once; `known` ones do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.bytes -= size


class _Kernels(TorchFunctionMode):
    """What the kernels of the real device keep, where those of the meta device keep something else."""

    def __init__(self, device_type: DeviceType, dtype: torch.dtype) -> None:
        super().__init__()
        self.device_type, self.dtype = device_type, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # On CPUs flash attention knows no dropout, and the engine switches it off in bf16
            dropout = kwargs.get("dropout_p", 0.0)
            if self.device_type == "cuda" or (dropout == 0.0 and self.dtype == torch.float32):
                return _FlashAttention.apply(*args)
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            return torch.ops.aten._scaled_dot_product_attention_math(*args, mask, dropout, causal)[0]
        if func is F.dropout and self.device_type == "cuda" and kwargs.get("training", False) and kwargs["p"] > 0:
            return _Dropout.apply(*args)
        return func(*args, **kwargs)


class _FlashAttention(torch.autograd.Function):
    """Keeps queries, keys, values, the result and a sum in fp32 for each query (arXiv 2205.14135, section 3.1)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows, heads, length, width = queries.shape
        mixed = queries.new_empty(rows, length, heads, width).transpose(1, 2)
        sums = queries.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, mixed, sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queries, keys, values, _, _ = ctx.saved_tensors
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


class _Dropout(torch.autograd.Function):
    """CUDA keeps a mask of one byte an element; CPUs one of the input's type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return torch.empty_like(gradients[0])


# ---- Forecast -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machines:
    """`gpus` on each of `nodes`; memory of a GPU, and of a node's host (None: not known)."""

    gpus: int
    nodes: int
    gpu_memory: float
    host_memory: float | None = None

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Forecast:
    """What one step needs on each GPU and each node."""

    machines: Machines
    states: States
    activations: Activations
    network: float

    @property
    def training(self) -> float:
        """On a GPU in forward and backward. A little too much: gradients grow while activations go."""
        return RESERVED + self.states.held + self.states.buffers + self.activations.peak

    @property
    def updating(self) -> float:
        """On a GPU while the optimizer works."""
        return RESERVED + self.states.held + self.states.update

    @property
    def gpu(self) -> float:
        return max(self.training, self.updating)

    @property
    def host(self) -> float:
        """Of a node, for model states; the loader's workers come on top."""
        return self.states.host * self.machines.gpus

    @property
    def nvme(self) -> float:
        return self.states.nvme * self.machines.gpus

    @property
    def fits(self) -> bool:
        host = self.machines.host_memory
        return self.gpu <= self.machines.gpu_memory and (host is None or self.host <= host)

    def verdict(self) -> str:
        """One line."""
        needs = f"{self.gpu / GB:.1f} of {self.machines.gpu_memory / GB:.1f} GB on each GPU"
        if self.machines.host_memory is not None:
            needs += f", {self.host / GB:.1f} of {self.machines.host_memory / GB:.1f} GB on each host"
        return f"{'fits' if self.fits else 'does not fit'}: {needs}"


def forecast(config: Config, ds: Section, machines: Machines, prompt_tokens: int) -> Forecast:
    """For a run config and a resolved DeepSpeed config. A few seconds."""
    sizes, accumulation = Sizes.of(config), config.run.accum_grad_iters
    recomputes = config.model.vit_grad_ckpt or config.model.text_grad_ckpt
    return Forecast(
        machines,
        model_states(sizes, ds, machines.ranks, accumulation),
        activations(config, Shape.of(config, prompt_tokens), DTYPES[precision(ds)], "cuda"),
        network(sizes, ds, machines.ranks, accumulation, recomputes),
    )


def memory_warning(config: Config, ds: Section, machines: Machines, prompt_tokens: int) -> str | None:
    """A line for the start of a run that will not fit, or nothing."""
    found = forecast(config, ds, machines, prompt_tokens)
    if found.fits:
        return None
    return f"warning: this {found.verdict()} (launch/plan.py --recommend finds settings that fit)"


# ---- Recommendation -------------------------------------------------------------------------------------------------

# Model options by the computation that they add, least first.
CHECKPOINTING: tuple[dict[str, bool | None], ...] = (
    {"vit_grad_ckpt": False, "vit_ckpt_layer": None, "text_grad_ckpt": False},
    {"vit_grad_ckpt": True, "vit_ckpt_layer": None, "text_grad_ckpt": False},
    {"vit_grad_ckpt": True, "vit_ckpt_layer": None, "text_grad_ckpt": True},
)


@dataclass(frozen=True)
class Recommendation:
    """`name` of the DeepSpeed config; `options` for the run config, which keep the global batch."""

    name: str
    options: dict[str, Any]
    forecast: Forecast


def with_checkpointing(config: Config, options: dict[str, bool | None]) -> Config:
    return replace(config, model=replace(config.model, **options))  # type: ignore[arg-type]


def recommend(
    config: Config, candidates: dict[str, Section], machines: Machines, prompt_tokens: int
) -> Recommendation | None:
    """The fastest of the resolved DeepSpeed configs that fits, and the largest micro-batch for it; None: none does.

    Fast is, in this order: nothing offloaded before the CPU before NVMe; four images at a time, or the whole window
    where it is smaller; nothing computed twice; few bytes on the network; a large micro-batch. Micro-batches divide
    `batch_size_train` x `accum_grad_iters`, so that the global batch stays.
    """
    window = config.run.batch_size_train * config.run.accum_grad_iters
    found: list[tuple[tuple[Any, ...], Recommendation]] = []
    for level, options in enumerate(CHECKPOINTING):
        checkpointing = with_checkpointing(config, options)
        needs: dict[tuple[int, str], Activations] = {}
        for name, ds in candidates.items():
            best = largest_micro_batch(checkpointing, ds, machines, prompt_tokens, window, needs)
            if best is None:
                continue
            micro, accumulation, fits = best
            chosen: dict[str, Any] = {"run.batch_size_train": micro, "run.accum_grad_iters": accumulation}
            chosen |= {f"model.{key}": value for key, value in options.items()}
            rank = (_offload_rank(ds), micro < min(4, window), level, fits.network, -micro, name)
            found.append((rank, Recommendation(name, chosen, fits)))
    return min(found, key=lambda item: item[0])[1] if found else None


def largest_micro_batch(
    config: Config,
    ds: Section,
    machines: Machines,
    prompt_tokens: int,
    window: int,
    known: dict[tuple[int, str], Activations],
) -> tuple[int, int, Forecast] | None:
    """(micro-batch, accumulation, forecast) of the largest divisor of `window` that fits; `known` is filled in."""
    sizes = Sizes.of(config)
    recomputes = config.model.vit_grad_ckpt or config.model.text_grad_ckpt
    for micro in sorted((n for n in range(1, window + 1) if window % n == 0), reverse=True):
        accumulation = window // micro
        states = model_states(sizes, ds, machines.ranks, accumulation)
        if Forecast(machines, states, Activations(0, 0), 0).fits:
            shape = replace(Shape.of(config, prompt_tokens), images=micro)
            if (key := (micro, precision(ds))) not in known:
                known[key] = activations(config, shape, DTYPES[precision(ds)], "cuda")
            sent = network(sizes, ds, machines.ranks, accumulation, recomputes)
            found = Forecast(machines, states, known[key], sent)
            if found.fits:
                return micro, accumulation, found
    return None


def _offload_rank(ds: Section) -> int:
    places = ("none", "cpu", "nvme")
    return max(places.index(_offloaded(ds, "optimizer")), places.index(_offloaded(ds, "param")))
