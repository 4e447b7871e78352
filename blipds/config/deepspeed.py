"""The DeepSpeed JSON: read strictly, every "auto" resolved, every contradiction named.

DeepSpeed lets unknown top-level keys and unknown keys of several sections pass silently, so this file checks the JSON
first, by the table in ds_schema.py. Neither deepspeed nor torch is imported here.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, TypeAlias

from blipds.config.deepspeed_schema import NOT_HERE, SCHEMA, ZERO, Json, Kind, Schema, Section
from blipds.errors import UserError, nearest

Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]

# ---- Reading --------------------------------------------------------------------------------------------------------


def load_ds_config(path: str | Path) -> Section:
    """Read and check a DeepSpeed JSON; "auto" stays. UserError in one line for whatever is wrong with the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the DeepSpeed JSON: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot read the DeepSpeed JSON: it is not UTF-8 text") from None

    def unique(pairs: list[tuple[str, Json]]) -> Section:
        section = dict(pairs)
        if len(section) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: key '{twice}' stands twice in one object; keep one")
        return section

    def not_a_number(name: str) -> Json:
        raise UserError(f"{path}: {name} is not valid in JSON")

    try:
        ds = json.loads(text, object_pairs_hook=unique, parse_constant=not_a_number)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(ds, dict):
        raise UserError(f"{path}: must be a JSON object, {{...}}")
    return check_keys(ds, str(path))


def check_keys(ds: Section, source: str) -> Section:
    """Check every key and type against the table; returns a copy with whole floats (5e8) made integers."""
    return _check_section(ds, SCHEMA, "", source)


def _check_section(section: Section, schema: Schema, prefix: str, source: str) -> Section:
    checked: Section = {}
    for key, value in section.items():
        path = prefix + key
        if path in NOT_HERE:
            raise UserError(f"{source}: {path} does not belong here: {NOT_HERE[path]}")
        if key not in schema:
            raise UserError(f"{source}: unknown key '{path}'; {nearest(key, schema)}")
        kind = schema[key]
        if isinstance(kind, Kind):
            checked[key] = _check_value(value, kind, path, source)
        elif isinstance(value, dict):
            checked[key] = _check_section(value, kind, path + ".", source)
        elif value is not None:  # null is a section left out
            raise UserError(
                f"{source}: {path} is {json.dumps(value)}, must be a section with {', '.join(sorted(kind))}"
            )
    return checked


def _check_value(value: Json, kind: Kind, path: str, source: str) -> Json:
    if not kind.accepts(value):
        raise UserError(f"{source}: {path} is {json.dumps(value)}, must be {kind.says}")
    return int(value) if kind.whole and isinstance(value, float) else value


# ---- Resolving ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunValues:
    """What the run config decides and DeepSpeed must agree with; the names in comments are the run config's."""

    micro_batch_size: int  # run.batch_size_train
    gradient_accumulation_steps: int  # run.accum_grad_iters
    learning_rate: float  # run.init_lr
    betas: tuple[float, float]  # 0.9 and run.beta2
    weight_decay: float  # run.weight_decay
    max_grad_norm: float | None = None  # run.max_grad_norm; None: no clipping
    compile: bool = False  # run.compile
    activation_checkpointing: bool = False  # model.vit_grad_ckpt or model.text_grad_ckpt


def resolve_ds_config(
    ds: Section,
    run: RunValues,
    *,
    world_size: int,
    default_precision: Precision,
    hidden_size: int,
    source: str,
    local_world_size: int | None = None,
    device_type: str = "cuda",
) -> Section:
    """A new dict without "auto", ready for `deepspeed.initialize`; UserError where it contradicts the run config.

    `default_precision` is what "auto" in bf16.enabled and fp16.enabled stands for on this device (`device_type`: "cuda"
    or "cpu"), `hidden_size` the widest hidden size of the model, `source` the file that errors name, `local_world_size`
    the ranks on each machine (None: all of them on one).
    """
    resolved = copy.deepcopy(ds)
    _resolve_run_values(resolved, run, world_size, source)
    _resolve_optimizer(resolved)
    _resolve_precision(resolved, default_precision)
    _resolve_sizes(resolved, hidden_size)
    if _get(resolved, "zero_optimization.zero_hpz_partition_size") == "auto":
        _put(resolved, "zero_optimization.zero_hpz_partition_size", local_world_size or world_size)
    faults = (
        _zero_faults(resolved, world_size),
        _compiling_faults(resolved, run.compile, world_size),
        _offload_faults(resolved),
        _precision_faults(resolved),
        _checkpointing_faults(resolved, run.activation_checkpointing, device_type),
        _other_faults(resolved, device_type),
    )
    for fault in chain.from_iterable(faults):
        raise UserError(f"{source}: {fault}")
    return resolved


def precision(ds: Section) -> Precision:
    """The type of the parameters under a resolved config (torch_autocast keeps them in fp32)."""
    if _get(ds, "bf16.enabled") is True:
        return "bf16"
    return "fp16" if _get(ds, "fp16.enabled") is True else "fp32"


def zero_stage(ds: Section) -> int:
    """The ZeRO stage, 0 to 3; 0 where the JSON names none, as in DeepSpeed."""
    stage = _get(ds, "zero_optimization.stage")
    return stage if isinstance(stage, int) else 0


def offloads_optimizer(ds: Section) -> bool:
    """Whether the optimizer runs on the CPU, which takes DeepSpeed's CPU Adam."""
    return _get(ds, "zero_optimization.offload_optimizer.device", "none") != "none"


def offload_folders(ds: Section) -> set[str]:
    """The folders that NVMe offload writes to; none without it."""
    sections = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
    return {str(_get(ds, f"{name}.nvme_path")) for name in sections if _get(ds, f"{name}.device") == "nvme"}


def with_offload_folder(ds: Section, name: str) -> Section:
    """The same config with a folder of its own, `name`, below each folder that NVMe offload writes to."""
    changed = copy.deepcopy(ds)
    for section in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        if _get(ds, f"{section}.device") == "nvme":
            _put(changed, f"{section}.nvme_path", f"{_get(ds, f'{section}.nvme_path')}/{name}")
    return changed


def checkpoints_on_host(ds: Section) -> bool:
    """Whether checkpointed activations wait for the backward pass in the host's memory."""
    return _get(ds, "activation_checkpointing.cpu_checkpointing") is True


def setting(ds: Section, path: str, default: Json = None) -> Json:
    """The value at a dotted path of a config, or `default`."""
    return _get(ds, path, default)


def uses_torch_adam(ds: Section) -> bool:
    return _get(ds, "optimizer.params.torch_adam") is True


def with_torch_adam(ds: Section) -> Section:
    """The same config with torch's fused AdamW in place of DeepSpeed's own."""
    changed = copy.deepcopy(ds)
    _put(changed, "optimizer.params.torch_adam", True)
    return changed


def _resolve_run_values(ds: Section, run: RunValues, world_size: int, source: str) -> None:
    """Fill in what the run config owns; a key left out counts as "auto" (DeepSpeed would clip at 1.0)."""
    batch = f"run.batch_size_train {run.micro_batch_size} x run.accum_grad_iters {run.gradient_accumulation_steps}"
    global_batch_size = run.micro_batch_size * run.gradient_accumulation_steps * world_size
    owned: dict[str, tuple[Json, str]] = {
        "train_micro_batch_size_per_gpu": (run.micro_batch_size, "run.batch_size_train"),
        "gradient_accumulation_steps": (run.gradient_accumulation_steps, "run.accum_grad_iters"),
        "train_batch_size": (global_batch_size, f"{batch} x {world_size} ranks"),
        "gradient_clipping": (run.max_grad_norm or 0.0, "run.max_grad_norm (0: no clipping)"),
        "optimizer.params.lr": (run.learning_rate, "run.init_lr"),
        "optimizer.params.betas": (list(run.betas), "(0.9, run.beta2)"),
        "optimizer.params.weight_decay": (run.weight_decay, "run.weight_decay"),
    }
    for path, (value, owner) in owned.items():
        given = _get(ds, path, "auto")
        if given not in ("auto", value):
            raise UserError(
                f"{source}: {path} is {json.dumps(given)} but {owner} is {json.dumps(value)}; "
                f'say "auto" in the JSON: the run config owns it'
            )
        _put(ds, path, value)


def _resolve_optimizer(ds: Section) -> None:
    """AdamW unless said; adam_w_mode is written out, since DeepSpeed's "Adam" is AdamW unless it says false."""
    _put(ds, "optimizer.type", _get(ds, "optimizer.type", "AdamW"))
    _put(ds, "optimizer.params.adam_w_mode", _get(ds, "optimizer.params.adam_w_mode", True))
    if _get(ds, "optimizer.params.eps", "auto") == "auto":
        _put(ds, "optimizer.params.eps", 1e-8)


def _resolve_precision(ds: Section, default: Precision) -> None:
    """Where it says "auto", on if `default` names it; off beside a precision that is switched on by name."""
    for name in ("bf16", "fp16"):
        if _get(ds, f"{name}.enabled") == "auto":
            others = ("fp16" if name == "bf16" else "bf16", "torch_autocast")
            chosen = any(_get(ds, f"{other}.enabled") is True for other in others)
            _put(ds, f"{name}.enabled", default == name and not chosen)


def _resolve_sizes(ds: Section, hidden_size: int) -> None:
    """The sizes that transformers' Trainer fills in (transformers/integrations/deepspeed.py), in elements."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if _get(ds, f"zero_optimization.{key}") == "auto":
            _put(ds, f"zero_optimization.{key}", size)


# ---- Combinations ---------------------------------------------------------------------------------------------------
# What DeepSpeed ignores silently or stops at with an assertion, a phrase each.

# What each of these keys says when it asks for nothing; anything else needs stage 3.
_STAGE_3_KEYS: Mapping[str, Json] = {
    **{key: False for key in ZERO if key.startswith(("stage3_", "zero_quantized_"))},
    "zero_hpz_partition_size": 1,
    "sub_group_size": None,
    "leaf_module": {},
    "offload_optimizer.ratio": 1,
    "offload_optimizer.super_offload": False,
}

_MODEL_PARALLEL_KEYS = ("partition_activations", "contiguous_memory_optimization", "number_checkpoints")
_DEEPSPEEDS_OWN_CHECKPOINTING_KEYS = ("synchronize_checkpoint_boundary", "profile")
_CUDA_KEYS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def _zero_faults(ds: Section, world_size: int) -> Iterator[str]:
    stage = zero_stage(ds)
    for key, nothing in _STAGE_3_KEYS.items():
        if stage < 3 and _get(ds, f"zero_optimization.{key}", nothing) != nothing:
            yield f"zero_optimization.{key} needs stage 3 (it is {stage}): remove it or raise the stage"
    group = _get(ds, "zero_optimization.zero_hpz_partition_size", 1)
    if isinstance(group, int) and group > 1 and world_size % group:
        yield f"zero_optimization.zero_hpz_partition_size {group} does not divide {world_size} ranks"
    scaled = _get(ds, "prescale_gradients") is True or _get(ds, "gradient_predivide_factor", 1) != 1
    if scaled and stage >= 2 and _get(ds, "zero_optimization.reduce_scatter", True) is True:
        yield (
            f"prescale_gradients and gradient_predivide_factor do not work at stage {stage} with "
            f'zero_optimization.reduce_scatter: remove them or say "reduce_scatter": false'
        )


def _compiling_faults(ds: Section, compiled: bool, world_size: int) -> Iterator[str]:
    """Gradients of different parameters would be added up (seen with DeepSpeed 0.19).

    Ranks whose captions differ in length compile layers that bring their gradients in different orders. Stage 3 sorts
    them before it adds them up, stages 0 and 1 without overlap take them by parameter.
    """
    stage, overlap = zero_stage(ds), _get(ds, "zero_optimization.overlap_comm") is True
    if compiled and world_size > 1 and (stage == 2 or (stage == 1 and overlap)):
        yield (
            f"stage {stage}{' with overlap_comm' if stage == 1 else ''} adds up the gradients of {world_size} ranks in "
            "the order in which they come, which run.compile makes another on each: take stage 0 or 3, or 1 with "
            "zero_optimization.overlap_comm false"
        )


def _offload_faults(ds: Section) -> Iterator[str]:
    stage = zero_stage(ds)
    optimizer = _get(ds, "zero_optimization.offload_optimizer.device", "none")
    param = _get(ds, "zero_optimization.offload_param.device", "none")
    if optimizer != "none" and stage < 1:
        yield "zero_optimization.offload_optimizer needs stage 1 or more: stage 0 keeps the optimizer on the GPU"
    if optimizer == "nvme" and stage < 3:
        yield 'zero_optimization.offload_optimizer.device "nvme" needs stage 3: below, DeepSpeed silently uses the CPU'
    if param != "none" and stage < 3:
        yield f"zero_optimization.offload_param needs stage 3 (it is {stage}): below, parameters stay on the GPU"
    for name, device in (("offload_optimizer", optimizer), ("offload_param", param)):
        if device == "nvme" and not _get(ds, f"zero_optimization.{name}.nvme_path"):
            yield f'zero_optimization.{name}.device "nvme" needs nvme_path, a folder on the NVMe disk'


def _precision_faults(ds: Section) -> Iterator[str]:
    stage, held = zero_stage(ds), precision(ds)
    if held == "bf16" and _get(ds, "fp16.enabled") is True:
        yield "bf16.enabled and fp16.enabled are both true; keep one"
    if _get(ds, "torch_autocast.enabled") is True and not _get(ds, "torch_autocast.dtype"):
        yield 'torch_autocast.enabled needs torch_autocast.dtype, such as "bfloat16"'
    param_dtype = _get(ds, "data_types.param_dtype")
    if param_dtype not in (None, held):
        yield f'data_types.param_dtype is "{param_dtype}" but bf16.enabled and fp16.enabled make it "{held}"'
    accumulated = _get(ds, "data_types.grad_accum_dtype") or held
    if stage == 0 and accumulated != held:
        yield f'data_types.grad_accum_dtype "{accumulated}" with {held} parameters needs stage 1 or more'
    low_states = _get(ds, "bf16.bf16_optimizer_states") is True
    if low_states and not _get(ds, "bf16.bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads"
    offload = _get(ds, "zero_optimization.offload_optimizer.device", "none") != "none"
    for path in ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads"):
        if _get(ds, path) is True and stage == 0:
            yield f"{path} needs stage 1 or more"
        if _get(ds, path) is True and not (offload or (low_states and path.startswith("bf16"))):
            yield f"{path} needs zero_optimization.offload_optimizer: only the CPU's Adam keeps fp32 moments beside it"


def _checkpointing_faults(ds: Section, checkpointed: bool, device_type: str) -> Iterator[str]:
    """DeepSpeed applies nothing of this section by itself; of its keys, `checkpoints_on_host` is ours to apply."""
    section = "activation_checkpointing"
    for key in _MODEL_PARALLEL_KEYS:
        if _get(ds, f"{section}.{key}") not in (None, False):
            yield (
                f"{section}.{key} is about activations split over model-parallel ranks, and blipds trains "
                f"data-parallel: remove it; model.vit_grad_ckpt and model.text_grad_ckpt switch checkpointing on"
            )
    for key in _DEEPSPEEDS_OWN_CHECKPOINTING_KEYS:
        if _get(ds, f"{section}.{key}") is True:
            yield f"{section}.{key} belongs to DeepSpeed's own checkpoint function; blipds uses torch's: remove it"
    if checkpoints_on_host(ds):
        if device_type == "cpu":
            yield f"{section}.cpu_checkpointing moves activations off the GPU, and there is none here: remove it"
        if not checkpointed:
            yield (
                f"{section}.cpu_checkpointing says where checkpoints are kept, but the run config makes none: "
                f"set model.vit_grad_ckpt or model.text_grad_ckpt, or remove it"
            )


def _other_faults(ds: Section, device_type: str) -> Iterator[str]:
    params = "optimizer.params"
    if _get(ds, "optimizer.type") == "AdamW" and _get(ds, f"{params}.adam_w_mode") is False:
        yield f'{params}.adam_w_mode false is ignored by type "AdamW"; for decay as an L2 penalty say type "Adam"'
    if _get(ds, f"{params}.torch_adam") is True and _get(ds, f"{params}.bias_correction") is not None:
        yield f"{params}.bias_correction does not go with torch_adam, which always corrects; remove one"
    for key in _CUDA_KEYS:
        if device_type == "cpu" and _get(ds, f"zero_optimization.{key}") is True:
            yield f"zero_optimization.{key}: DeepSpeed's quantizer is a CUDA kernel, and this is a CPU: set it to false"


def _get(ds: Section, path: str, default: Json = None) -> Json:
    """The value at a dotted path, or `default`."""
    node: Json = ds
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def _put(ds: Section, path: str, value: Json) -> None:
    """Set the value at a dotted path, making the sections on the way."""
    *names, key = path.split(".")
    for name in names:
        section = ds.setdefault(name, {})
        assert isinstance(section, dict), f"{path}: check_keys() comes first"
        ds = section
    ds[key] = value
