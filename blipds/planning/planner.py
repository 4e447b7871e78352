"""Will it fit: what a training step needs of GPU memory, host memory, NVMe and network, before anything is built.

Model states follow from the parameters' sizes, by what DeepSpeed 0.19 allocates (runtime/zero/stage_1_and_2.py,
stage3.py). Activations come from the model's own forward and backward on torch's meta device, where tensors have a size
and no memory. Needs neither deepspeed nor a GPU. All sizes are bytes unless said; GB is 10^9.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, product
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from blipds.config.deepspeed import Section, precision, setting, zero_stage
from blipds.config.sections import Config
from blipds.data.caption_rows import caption_rows
from blipds.data.tokenizer import caption_tokenizer
from blipds.engine import DTYPES, checkpointed, parameter_groups
from blipds.models import build_trained

GB = 1e9
# What no tensor shows, as an H200 had it (tests/benchmarks/README.md): the CUDA context, NCCL and cuBLAS's workspace;
# and for each byte of activations 0.034 that CUDA's kernels keep beyond what the meta device shows, and 0.03 that lie
# idle in the allocator's blocks.
RESERVED = 1.4 * GB
SLACK = 0.07
CAPTIONS_PER_IMAGE = 5  # what `captions_per_image: all` is in COCO and Flickr


# ---- Model states ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterSizes:
    """Numbers of elements: trainable parameters by group, as the optimizer has them, and frozen ones."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config) -> "ParameterSizes":
        with torch.device("meta"):
            model = build_trained(config.model, checkpointed)
        groups = parameter_groups(model, config.run.weight_decay, config.run.weight_decay_on)
        frozen = tuple(p.numel() for p in model.parameters() if not p.requires_grad)
        return cls(tuple(tuple(p.numel() for p in group["params"]) for group in groups), frozen)

    @property
    def tensors(self) -> tuple[int, ...]:
        return (*chain(*self.groups), *self.frozen)

    @property
    def trainable(self) -> int:
        return sum(map(sum, self.groups))

    @property
    def largest_group(self) -> int:
        return max(map(sum, self.groups))

    @property
    def total(self) -> int:
        return sum(self.tensors)


@dataclass(frozen=True)
class ModelStates:
    """Everything but activations, on the rank that holds the most.

    `buffers` (communication, gathered parameters) exist in forward and backward, `update` only while the optimizer
    works, when the activations are gone. `host` and `nvme` are those of one rank too.
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


def model_states(sizes: ParameterSizes, ds: Section, ranks: int, accumulation: int = 1) -> ModelStates:
    """Bytes on one rank under a resolved DeepSpeed config."""
    if zero_stage(ds) == 0:
        return _stage_0(sizes, ds)
    return _stage_3(sizes, ds, ranks) if zero_stage(ds) == 3 else _stages_1_2(sizes, ds, ranks, accumulation)


def _width(ds: Section) -> int:
    """Bytes of a parameter."""
    return 4 if precision(ds) == "fp32" else 2


def _gradient_width(ds: Section) -> int:
    return 4 if (setting(ds, "data_types.grad_accum_dtype") or precision(ds)) == "fp32" else 2


def _number(ds: Section, key: str, default: int) -> int:
    """A number of zero_optimization; `default` is DeepSpeed's own."""
    value = setting(ds, f"zero_optimization.{key}")
    return value if isinstance(value, int) else default


def _offload_device(ds: Section, what: str) -> str:
    return str(setting(ds, f"zero_optimization.offload_{what}.device", "none"))


def _stage_0(sizes: ParameterSizes, ds: Section) -> ModelStates:
    """Adam's two moments in fp32. Below fp32 also a master copy, and at the update fp32 gradients and a flat copy."""
    n, width = sizes.trainable, _width(ds)
    optimizer, update = (8 * n, 0) if width == 4 else (12 * n, 8 * sizes.largest_group)
    return ModelStates(sizes.total * width, n * width, optimizer, 0, update)


def _stages_1_2(sizes: ParameterSizes, ds: Section, ranks: int, accumulation: int) -> ModelStates:
    width, share = _width(ds), sizes.trainable / ranks
    sums = 4 * share if _gradient_width(ds) > width else 0  # of gradients in fp32, beside parameters of less
    if sums and zero_stage(ds) == 1:
        sums = 4 * sizes.trainable  # reduced only at the end of the window
    parameters = sizes.total * width
    buckets = (2 if setting(ds, "zero_optimization.overlap_comm") else 1) * _number(ds, "reduce_bucket_size", 5 * 10**8)
    if _offload_device(ds, "optimizer") != "none":
        # fp32 master, moments and gradients, a copy to send, and room for the largest parameter on both sides
        largest = max(sizes.tensors) * width
        host = share * (16 + width) + largest
        return ModelStates(parameters, sums, 0, buckets * width + largest, 0, host)
    if sums and zero_stage(ds) == 1:  # BF16_Optimizer: no buckets, at the end of the window a flat copy of the sums
        return ModelStates(parameters, sums + sizes.trainable * width, 12 * share, 0, min(sums, 4 * 5 * 10**8))
    if sums:
        return ModelStates(parameters, sums, 12 * share, buckets * width, 0)
    gradients = _partitioned_gradients(sizes, ranks) * _gradient_width(ds)
    if accumulation > 1 and zero_stage(ds) == 1:
        gradients = sizes.trainable * _gradient_width(ds)  # reduced only at the end of the window
    # the update flattens a group's gradients, and casts them
    update = sizes.largest_group / ranks * (4 if width == 4 else 4 + width)
    return ModelStates(parameters, gradients, 12 * share, buckets * width, update)


def _partitioned_gradients(sizes: ParameterSizes, ranks: int) -> int:
    """Elements on the fullest rank: a parameter on the border of two ranks has its whole gradient on both."""
    totals = [0] * ranks
    for group in sizes.groups:
        share, start = -(-sum(group) // ranks), 0
        for numel in group:
            for rank in range(start // share, min((start + numel - 1) // share, ranks - 1) + 1):
                totals[rank] += numel
            start += numel
    return max(totals)


def _stage_3(sizes: ParameterSizes, ds: Section, ranks: int) -> ModelStates:
    width, share = _width(ds), sizes.trainable / ranks
    parameters, gradients, optimizer = sizes.total * width / ranks, share * _gradient_width(ds), 12 * share
    threshold = _number(ds, "stage3_param_persistence_threshold", 10**5)
    persistent = sum(numel for numel in sizes.tensors if numel <= threshold) * width
    gathered = min(sizes.total, _number(ds, "stage3_max_live_parameters", 10**9)) * width
    buffers = _number(ds, "reduce_bucket_size", 5 * 10**8) * width + max(gathered - persistent, 0)
    update = min(sizes.largest_group / ranks, _number(ds, "sub_group_size", 10**9)) * 4
    host = nvme = 0.0
    if (device := _offload_device(ds, "optimizer")) != "none":
        if device == "cpu":
            host = optimizer + gradients + share * 4  # with the gradients in fp32
        else:
            host = gradients + _number(ds, "offload_optimizer.buffer_count", 4) * update
            nvme = 16 * share
        optimizer = gradients = update = 0
    if (device := _offload_device(ds, "param")) != "none":
        if device == "cpu":
            host += parameters
        else:
            buffer_size = _number(ds, "offload_param.buffer_size", 10**8)
            host += _number(ds, "offload_param.buffer_count", 5) * buffer_size * width
            nvme += parameters
        parameters = 0
    return ModelStates(parameters + persistent, gradients, optimizer, buffers, update, host, nvme)


# ---- Network --------------------------------------------------------------------------------------------------------


def network(sizes: ParameterSizes, ds: Section, ranks: int, accumulation: int, recomputes: bool = False) -> float:
    """Bytes that one rank sends in an optimizer step (ZeRO paper, arXiv 1910.02054, section 7).

    An all-gather or a reduce-scatter of n elements sends n (ranks - 1) / ranks, an all-reduce twice that. At stages 1
    and 2 DeepSpeed 0.19 all-reduces unless `use_multi_rank_bucket_allreduce` is false.
    """
    parameters, gradients, stage = sizes.total * _width(ds), sizes.trainable * _width(ds), zero_stage(ds)
    if stage == 0:
        sent = 2 * gradients
    elif stage == 3:  # gathered for forward and backward, and again where activations are recomputed
        sent = accumulation * (gradients + (3 if recomputes else 2) * parameters)
    else:
        all_reduces = setting(ds, "zero_optimization.use_multi_rank_bucket_allreduce", True) is not False
        reductions = (2 if all_reduces else 1) * (accumulation if stage == 2 else 1)
        sent = (reductions + 1) * gradients
    return sent * (ranks - 1) / ranks


# ---- Activations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A micro-batch: images, captions per image, tokens per caption, and how many of these are the prompt's."""

    images: int
    captions: int
    tokens: int
    prompt_tokens: int

    @classmethod
    def of(cls, config: Config) -> "Shape":
        """The largest that the run config allows: every caption as long as `model.max_txt_len`."""
        given = [dataset.captions_per_image for dataset in config.datasets.values()]
        captions = max(CAPTIONS_PER_IMAGE if isinstance(count, str) else count for count in given)
        tokenizer = caption_tokenizer(config.model)
        return cls(config.run.batch_size_train, captions, tokenizer.max_txt_len, len(tokenizer.prompt_ids))

    def inputs(self, image_size: int, dtype: torch.dtype, device: str = "meta") -> dict[str, Tensor]:
        """Arguments of a captioner's `forward`; the values mean nothing."""
        caption = [0] * self.tokens
        rows = caption_rows([[caption] * self.captions] * self.images, caption[: self.prompt_tokens], pad_token_id=0)
        pixels = torch.zeros(self.images, 3, image_size, image_size, dtype=dtype, device=device)
        return {"pixel_values": pixels, **rows.to(torch.device(device))}


def activations(config: Config, shape: Shape, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, and the most at any moment of the two, on a GPU."""

    def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _CudaKernels()))

    with torch.device("meta"):
        model = build_trained(config.model, recomputed).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # a gradient goes into DeepSpeed's buffers as soon as it is there: from then on it is a model state
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs = shape.inputs(config.model.image_size, dtype)
    with _LiveStorages([*model.parameters(), *inputs.values()]) as live:
        with _CudaKernels():
            loss = model(**inputs)
        kept = live.bytes
        loss.backward()
    return kept, live.peak


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, views once; `known` ones do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def release(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.bytes -= size


class _CudaKernels(TorchFunctionMode):
    """Runs CUDA's attention and dropout, where the meta device would take kernels that keep other tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            # keeps no matrix of scores (arXiv 2205.14135, section 3.1); neither do CUDA's kernels for masks
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        if func is F.dropout and kwargs["training"] and kwargs["p"] > 0:
            return torch.ops.aten.native_dropout(*args, kwargs["p"], True)[0]  # keeps one byte per element
        return func(*args, **kwargs)


# ---- Forecast -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """`gpu_memory` of one GPU; `host_memory` of one node, infinite where it is not known."""

    gpus_per_node: int
    nodes: int
    gpu_memory: float
    host_memory: float = math.inf

    @property
    def ranks(self) -> int:
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True)
class Forecast:
    """What one step needs on each GPU and each node. `activations` at their peak."""

    cluster: Cluster
    states: ModelStates
    network: float
    activations: float

    @property
    def allowance(self) -> float:
        """What no tensor shows, while activations are at their peak."""
        return RESERVED + SLACK * self.activations

    @property
    def training(self) -> float:
        """On a GPU in forward and backward. A little too much: gradients grow while activations go."""
        return self.allowance + self.states.held + self.states.buffers + self.activations

    @property
    def updating(self) -> float:
        """On a GPU while the optimizer works."""
        return RESERVED + self.states.held + self.states.update

    @property
    def gpu(self) -> float:
        return max(self.training, self.updating)

    @property
    def host(self) -> float:
        """On a node, for model states; the loader's workers come on top."""
        return self.states.host * self.cluster.gpus_per_node

    @property
    def nvme(self) -> float:
        return self.states.nvme * self.cluster.gpus_per_node

    @property
    def fits(self) -> bool:
        return self.gpu <= self.cluster.gpu_memory and self.host <= self.cluster.host_memory

    def verdict(self) -> str:
        """One line."""
        needs = f"{self.gpu / GB:.1f} of {self.cluster.gpu_memory / GB:.1f} GB on each GPU"
        if self.cluster.host_memory < math.inf:
            needs += f", {self.host / GB:.1f} of {self.cluster.host_memory / GB:.1f} GB on each host"
        return f"{'fits' if self.fits else 'does not fit'}: {needs}"


def forecast(config: Config, ds: Section, cluster: Cluster) -> Forecast:
    """For a run config and a resolved DeepSpeed config. A few seconds."""
    _, peak = activations(config, Shape.of(config), DTYPES[precision(ds)])
    return _forecast(config, ParameterSizes.of(config), ds, cluster, peak)


def _forecast(config: Config, sizes: ParameterSizes, ds: Section, cluster: Cluster, peak: float) -> Forecast:
    ranks, accumulation = cluster.ranks, config.run.accum_grad_iters
    sent = network(sizes, ds, ranks, accumulation, config.model.recomputes)
    return Forecast(cluster, model_states(sizes, ds, ranks, accumulation), sent, peak)


def recommend(
    config: Config, candidates: dict[str, Section], cluster: Cluster
) -> tuple[str, dict[str, Any], Forecast] | None:
    """The fastest of the resolved DeepSpeed configs that fits, with options for the run config; None: none fits.

    Fast is, in this order: nothing offloaded before the CPU before NVMe; four images at a time, or the whole window
    where it is smaller; nothing recomputed; few bytes on the network; a large micro-batch. Micro-batches divide
    `batch_size_train` x `accum_grad_iters`, so that the global batch stays.
    """
    sizes, shape = ParameterSizes.of(config), Shape.of(config)
    window = config.run.batch_size_train * config.run.accum_grad_iters
    micro_batches = [size for size in range(1, window + 1) if window % size == 0]
    choices = []
    for (level, keys), micro in product(enumerate(config.model.CHECKPOINTING), micro_batches):
        run = {"batch_size_train": micro, "accum_grad_iters": window // micro}
        changed = replace(config, run=replace(config.run, **run), model=replace(config.model, **keys))
        options = {f"run.{key}": run[key] for key in run} | {f"model.{key}": keys[key] for key in keys}
        measure = cache(partial(activations, changed, replace(shape, images=micro)))  # a second or so for each dtype
        for name, ds in candidates.items():
            found = _forecast(changed, sizes, ds, cluster, peak=0)
            offload = max(("none", "cpu", "nvme").index(_offload_device(ds, what)) for what in ("optimizer", "param"))
            slowness = (offload, micro < min(4, window), level, found.network, -micro, name)
            choices.append((slowness, found, options, measure))
    for (*_, name), found, options, measure in sorted(choices, key=itemgetter(0)):
        if found.fits:
            found = replace(found, activations=measure(DTYPES[precision(candidates[name])])[1])
        if found.fits:
            return name, options, found
    return None
