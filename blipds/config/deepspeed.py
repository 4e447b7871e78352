"""The DeepSpeed JSON: read strictly, every "auto" resolved, every contradiction named.

DeepSpeed lets unknown top-level keys and unknown keys of several sections pass silently, so this file checks the JSON
first, by the table in deepspeed_schema.py. Neither deepspeed nor torch is imported here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from blipds.config.deepspeed_schema import NOT_HERE, SCHEMA, ZERO, Json, Kind, Schema, Section
from blipds.config.sections import Config, RunConfig
from blipds.errors import UserError, nearest
from blipds.files.paths import find_config

Precision: TypeAlias = Literal["bf16", "fp16", "fp32"]

# ---- Reading --------------------------------------------------------------------------------------------------------


def load_ds_config(path: str | Path) -> Section:
    """Read and check a DeepSpeed JSON, or a packaged one by its name; "auto" stays. UserError for whatever is wrong."""
    path = find_config(Path(path), "ds_configs", ".json", "DeepSpeed JSON")
    try:
        text = path.read_text(encoding="utf-8")
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
        kind, text = schema[key], json.dumps(value)
        if isinstance(kind, Kind):
            if not kind.accepts(value):
                raise UserError(f"{source}: {path} is {text}, must be {kind.says}")
            checked[key] = int(value) if kind.whole and isinstance(value, float) else value
        elif isinstance(value, dict):
            checked[key] = _check_section(value, kind, path + ".", source)
        elif value is not None:  # null is a section left out
            raise UserError(f"{source}: {path} is {text}, must be a section with {', '.join(sorted(kind))}")
    return checked


# ---- Resolving ------------------------------------------------------------------------------------------------------


def resolve_ds_config(
    ds: Section,
    config: Config,
    *,
    world_size: int,
    default_precision: Precision,
    source: str,
    local_world_size: int | None = None,
    device_type: str = "cuda",
) -> Section:
    """A new dict without "auto", ready for `deepspeed.initialize`; UserError where it contradicts the run config.

    `default_precision` is what "auto" in bf16.enabled and fp16.enabled stands for on this device (`device_type`: "cuda"
    or "cpu"), `source` the file that errors name, `local_world_size` the ranks on each machine (None: all of them on
    one).
    """
    resolved, hidden_size = _with_run_values(ds, config.run, world_size, source), config.model.hidden_size
    # AdamW unless said; adam_w_mode is written out, since DeepSpeed's "Adam" is AdamW unless it says false
    for path, default in (("optimizer.type", "AdamW"), ("optimizer.params.adam_w_mode", True)):
        resolved = with_setting(resolved, path, setting(resolved, path, default))
    named = any(setting(ds, f"{name}.enabled") is True for name in ("bf16", "fp16", "torch_autocast"))
    # sizes in elements, as transformers' Trainer fills them in (transformers/integrations/deepspeed.py)
    autos: dict[str, Json] = {
        **{f"{name}.enabled": name == default_precision and not named for name in ("bf16", "fp16")},
        "optimizer.params.eps": 1e-8,
        "zero_optimization.reduce_bucket_size": hidden_size * hidden_size,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_optimization.zero_hpz_partition_size": local_world_size or world_size,
    }
    for path, value in autos.items():
        if setting(resolved, path) == "auto":
            resolved = with_setting(resolved, path, value)
    # bf16's 8 bits lose a micro-batch's small gradients in the sum of many; stage 0 has no other sum
    sums_bf16 = config.run.accum_grad_iters > 1 and precision(resolved) == "bf16" and zero_stage(resolved) > 0
    if sums_bf16 and setting(resolved, "data_types.grad_accum_dtype") is None:
        resolved = with_setting(resolved, "data_types.grad_accum_dtype", "fp32")
    for fault in _faults(resolved, config, world_size, device_type):
        raise UserError(f"{source}: {fault}")
    return resolved


def setting(ds: Section, path: str, default: Json = None) -> Json:
    """The value at a dotted path, or `default`."""
    node: Json = ds
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return default
        node = node[key]
    return node


def with_setting(ds: Section, path: str, value: Json) -> Section:
    """The same config with another value at a dotted path; sections on the way are made where there are none."""
    key, _, rest = path.partition(".")
    inner = ds.get(key)
    return ds | {key: with_setting(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def precision(ds: Section) -> Precision:
    """The type of the parameters under a resolved config (torch_autocast keeps them in fp32)."""
    if setting(ds, "bf16.enabled") is True:
        return "bf16"
    return "fp16" if setting(ds, "fp16.enabled") is True else "fp32"


def zero_stage(ds: Section) -> int:
    """The ZeRO stage, 0 to 3; 0 where the JSON names none, as in DeepSpeed."""
    stage = setting(ds, "zero_optimization.stage")
    return stage if isinstance(stage, int) else 0


def offloads_optimizer(ds: Section) -> bool:
    """Whether the optimizer runs on the CPU, which takes DeepSpeed's CPU Adam."""
    return setting(ds, "zero_optimization.offload_optimizer.device", "none") != "none"


def checkpoints_on_host(ds: Section) -> bool:
    """Whether checkpointed activations wait for the backward pass in the host's memory."""
    return setting(ds, "activation_checkpointing.cpu_checkpointing") is True


def uses_torch_adam(ds: Section) -> bool:
    """Whether torch's fused AdamW takes the place of DeepSpeed's own."""
    return setting(ds, "optimizer.params.torch_adam") is True


def offload_folders(ds: Section) -> set[str]:
    """The folders that NVMe offload writes to; none without it."""
    return {str(setting(ds, f"{section}.nvme_path")) for section in _nvme_sections(ds)}


def with_offload_folder(ds: Section, name: str) -> Section:
    """The same config with a folder of its own, `name`, below each folder that NVMe offload writes to."""
    for section in _nvme_sections(ds):
        ds = with_setting(ds, f"{section}.nvme_path", f"{setting(ds, f'{section}.nvme_path')}/{name}")
    return ds


def _nvme_sections(ds: Section) -> list[str]:
    sections = ("zero_optimization.offload_optimizer", "zero_optimization.offload_param")
    return [section for section in sections if setting(ds, f"{section}.device") == "nvme"]


def _with_run_values(ds: Section, run: RunConfig, world_size: int, source: str) -> Section:
    """Fill in what the run config owns; a key left out counts as "auto" (DeepSpeed would clip at 1.0)."""
    batch = f"run.batch_size_train {run.batch_size_train} x run.accum_grad_iters {run.accum_grad_iters}"
    global_batch_size = run.batch_size_train * run.accum_grad_iters * world_size
    owned: dict[str, tuple[Json, str]] = {
        "train_micro_batch_size_per_gpu": (run.batch_size_train, "run.batch_size_train"),
        "gradient_accumulation_steps": (run.accum_grad_iters, "run.accum_grad_iters"),
        "train_batch_size": (global_batch_size, f"{batch} x {world_size} ranks"),
        "gradient_clipping": (run.max_grad_norm or 0.0, "run.max_grad_norm (0: no clipping)"),
        "optimizer.params.lr": (run.init_lr, "run.init_lr"),
        "optimizer.params.betas": ([0.9, run.beta2], "(0.9, run.beta2)"),
        "optimizer.params.weight_decay": (run.weight_decay, "run.weight_decay"),
    }
    for path, (value, owner) in owned.items():
        given = setting(ds, path, "auto")
        if given not in ("auto", value):
            raise UserError(
                f"{source}: {path} is {json.dumps(given)} but {owner} is {json.dumps(value)}; "
                f'say "auto" in the JSON: the run config owns it'
            )
        ds = with_setting(ds, path, value)
    return ds


# ---- Combinations ---------------------------------------------------------------------------------------------------

# What each of these keys says when it asks for nothing; anything else needs stage 3.
_STAGE_3_KEYS: Mapping[str, Json] = {
    **{key: False for key in ZERO if key.startswith(("stage3_", "zero_quantized_"))},
    "zero_hpz_partition_size": 1,
    "sub_group_size": None,
    "leaf_module": {},
    "offload_optimizer.ratio": 1,
}


def _faults(ds: Section, config: Config, world_size: int, device_type: str) -> Iterator[str]:
    """What DeepSpeed ignores silently or stops at with an assertion, a phrase each."""

    def zero(key: str, default: Json = None) -> Json:
        return setting(ds, f"zero_optimization.{key}", default)

    stage, group = zero_stage(ds), zero("zero_hpz_partition_size", 1)
    for key, nothing in _STAGE_3_KEYS.items():
        if stage < 3 and zero(key, nothing) != nothing:
            yield f"zero_optimization.{key} needs stage 3 (it is {stage}): remove it or raise the stage"
    if isinstance(group, int) and group > 1 and world_size % group:
        yield f"zero_optimization.zero_hpz_partition_size {group} does not divide {world_size} ranks"
    scaled = setting(ds, "prescale_gradients") is True or setting(ds, "gradient_predivide_factor", 1) != 1
    if scaled and stage >= 2 and zero("reduce_scatter", True) is True:
        yield (
            f"prescale_gradients and gradient_predivide_factor do not work at stage {stage} with "
            f'zero_optimization.reduce_scatter: remove them or say "reduce_scatter": false'
        )
    for key in ZERO:
        if key.startswith("zero_quantized_") and device_type == "cpu" and zero(key) is True:
            yield f"zero_optimization.{key}: DeepSpeed's quantizer is a CUDA kernel, and this is a CPU: set it to false"
    optimizer, param = (zero(f"{name}.device", "none") for name in ("offload_optimizer", "offload_param"))
    if optimizer != "none" and stage < 1:
        yield "zero_optimization.offload_optimizer needs stage 1 or more: stage 0 keeps the optimizer on the GPU"
    if optimizer == "nvme" and stage < 3:
        yield 'zero_optimization.offload_optimizer.device "nvme" needs stage 3: below, DeepSpeed silently uses the CPU'
    if param != "none" and stage < 3:
        yield f"zero_optimization.offload_param needs stage 3 (it is {stage}): below, parameters stay on the GPU"
    for section in _nvme_sections(ds):
        if not setting(ds, f"{section}.nvme_path"):
            yield f'{section}.device "nvme" needs nvme_path, a folder on the NVMe disk'

    held = precision(ds)
    if held == "bf16" and setting(ds, "fp16.enabled") is True:
        yield "bf16.enabled and fp16.enabled are both true; keep one"
    if setting(ds, "torch_autocast.enabled") is True and not setting(ds, "torch_autocast.dtype"):
        yield 'torch_autocast.enabled needs torch_autocast.dtype, such as "bfloat16"'
    accumulated = setting(ds, "data_types.grad_accum_dtype") or held
    if stage == 0 and accumulated != held:
        yield f'data_types.grad_accum_dtype "{accumulated}" with {held} parameters needs stage 1 or more'

    # DeepSpeed applies nothing of this section by itself: the engine does
    on_host = "activation_checkpointing.cpu_checkpointing"
    if checkpoints_on_host(ds) and device_type == "cpu":
        yield f"{on_host} moves activations off the GPU, and there is none here: remove it"
    if checkpoints_on_host(ds) and not config.model.recomputes:
        yield (
            f"{on_host} says where checkpoints are kept, but the run config makes none: switch them on in its "
            "model section (BLIP: model.vit_grad_ckpt, model.text_grad_ckpt), or remove it"
        )
    params = "optimizer.params"
    if setting(ds, "optimizer.type") == "AdamW" and setting(ds, f"{params}.adam_w_mode") is False:
        yield f'{params}.adam_w_mode false is ignored by type "AdamW"; for decay as an L2 penalty say type "Adam"'
    if setting(ds, f"{params}.torch_adam") is True and setting(ds, f"{params}.bias_correction") is not None:
        yield f"{params}.bias_correction does not go with torch_adam, which always corrects; remove one"
