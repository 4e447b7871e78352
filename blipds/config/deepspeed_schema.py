"""The keys of a DeepSpeed JSON that have a place here, and what each may hold: a table, and nothing else.

`tests/config/test_deepspeed.py` holds it against DeepSpeed's own models. A key with two spellings has the `stage3_*`
one only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Section: TypeAlias = dict[str, Json]


# ---- What a key may hold --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What a key may hold; `says` completes the sentence "must be ...", `whole` turns 5e8 into 500000000."""

    says: str
    accepts: Callable[[Json], bool]
    whole: bool = False

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(
            f"{self.says} or {other.says}",
            lambda value: self.accepts(value) or other.accepts(value),
            self.whole or other.whole,
        )


def _number(says: str, lowest: float, highest: float = float("inf"), whole: bool = False) -> Kind:
    def accepts(value: Json) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return lowest <= value <= highest and (not whole or float(value).is_integer())

    return Kind(says, accepts, whole)


def _choice(*names: str | int) -> Kind:
    says = "one of " + ", ".join(json.dumps(name) for name in names)
    return Kind(says, lambda value: not isinstance(value, bool) and value in names, whole=isinstance(names[0], int))


def _only(allowed: bool | None, why: str) -> Kind:
    """A key that may stand there, as people's files have it, but has one value here."""
    return Kind(f"{json.dumps(allowed)}: {why}", lambda value: value is allowed or value is None)


OWNED = Kind('"auto"', lambda value: True)  # by the run config, which every other value is held against
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind("a list of strings", lambda value: isinstance(value, list) and all(map(TEXT.accepts, value)))
NULL = Kind("null", lambda value: value is None)
AUTO = Kind('"auto"', lambda value: value == "auto")
SCALE = _number("a number of at least 0", 0)
FRACTION = _number("a number from 0 to 1", 0, 1)
WHOLE = _number("a whole number of at least -1", -1, whole=True)
SIZE = _number("a whole number of at least 0", 0, whole=True)
COUNT = _number("a whole number of at least 1", 1, whole=True)
DTYPE = _choice("fp32", "fp16", "bf16")
FP32_MASTERS = _only(False, "blipds keeps the optimizer's weights and moments in fp32")
DATA_PARALLEL = "it is about activations split over model-parallel ranks, and blipds trains data-parallel"
OWN_CHECKPOINTING = "it belongs to DeepSpeed's own checkpoint function, and blipds uses torch's"

Schema: TypeAlias = Mapping[str, Union[Kind, "Schema"]]


def _each(kind: Kind, keys: str) -> dict[str, Kind]:
    return dict.fromkeys(keys.split(), kind)


# ---- The keys -------------------------------------------------------------------------------------------------------

OFFLOAD: Schema = {
    "device": _choice("none", "cpu", "nvme"),
    "nvme_path": TEXT | NULL,
    "pin_memory": BOOL,
    "buffer_count": SIZE,
}

ZERO: Schema = {
    "stage": _choice(0, 1, 2, 3),
    # gradients
    "overlap_comm": BOOL | NULL,
    "reduce_bucket_size": COUNT | AUTO,
    **_each(BOOL, "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce"),
    **_each(BOOL, "round_robin_gradients ignore_unused_parameters"),
    # the updated weights of stages 1 and 2
    "allgather_bucket_size": SIZE,
    **_each(BOOL, "allgather_partitions parameter_alignment load_from_fp32_weights"),
    # stage 3
    **_each(SIZE | AUTO, "stage3_prefetch_bucket_size stage3_param_persistence_threshold"),
    **_each(SIZE, "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance"),
    **_each(BOOL, "stage3_gather_16bit_weights_on_model_save stage3_use_all_reduce_for_fetch_params"),
    **_each(BOOL, "stage3_allgather_sequential memory_efficient_linear override_module_apply"),
    "stage3_module_granularity_threshold": WHOLE,
    "sub_group_size": SIZE,
    "leaf_module": _each(TEXTS, "classes names name_suffixes"),
    # ZeRO++
    "zero_hpz_partition_size": SIZE | AUTO,
    **_each(BOOL, "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients"),
    # ZeRO-Offload and ZeRO-Infinity
    "offload_param": {**OFFLOAD, **_each(SIZE, "buffer_size max_in_cpu")},
    "offload_optimizer": {**OFFLOAD, **_each(BOOL, "pipeline_read pipeline_write fast_init"), "ratio": FRACTION},
    # debugging
    **_each(BOOL, "log_trace_cache_warnings enable_sanity_checks"),
}

SCHEMA: Schema = {
    **_each(OWNED, "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"),
    "optimizer": {
        "type": _choice("AdamW", "Adam"),
        "params": {
            **_each(OWNED, "lr betas weight_decay"),
            "eps": SCALE | AUTO,
            **_each(BOOL, "torch_adam adam_w_mode bias_correction"),
        },
    },
    # memory
    "zero_optimization": ZERO,
    **_each(BOOL, "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"),
    "aio": {
        **_each(COUNT, "block_size queue_depth intra_op_parallelism"),
        **_each(BOOL, "single_submit overlap_events use_gds"),
    },
    "activation_checkpointing": {
        "cpu_checkpointing": BOOL,
        "number_checkpoints": _only(None, DATA_PARALLEL),
        **_each(_only(False, DATA_PARALLEL), "partition_activations contiguous_memory_optimization"),
        **_each(_only(False, OWN_CHECKPOINTING), "synchronize_checkpoint_boundary profile"),
    },
    # precision
    "bf16": {
        "enabled": BOOL | AUTO,
        "immediate_grad_update": BOOL,
        "check_grad_overflow": _only(True, "blipds skips every step whose gradients are not finite"),
        **_each(FP32_MASTERS, "bf16_master_weights_and_grads bf16_optimizer_states"),
    },
    "fp16": {
        "enabled": BOOL | AUTO,
        "loss_scale": SCALE,
        "initial_scale_power": SIZE,
        **_each(COUNT, "loss_scale_window hysteresis min_loss_scale"),
        "consecutive_hysteresis": BOOL,
        "fp16_master_weights_and_grads": FP32_MASTERS,
    },
    "torch_autocast": {
        "enabled": BOOL,
        "dtype": _choice("bfloat16", "float16", "bf16", "fp16"),
        "lower_precision_safe_modules": TEXTS,
    },
    "data_types": {"grad_accum_dtype": DTYPE | NULL},
    # communication
    "communication_data_type": DTYPE | NULL,
    "prescale_gradients": BOOL,
    "gradient_predivide_factor": SCALE,
    # what DeepSpeed prints and measures
    "steps_per_print": COUNT | NULL,
    "log_level": _choice("debug", "info", "warning", "error", "critical") | NULL,
    **_each(BOOL, "wall_clock_breakdown memory_breakdown dump_state"),
    "timers": {"throughput": _each(BOOL, "enabled synchronized")},
    "comms_logger": {"prof_ops": TEXTS, **_each(BOOL, "enabled prof_all verbose debug")},
    "flops_profiler": {
        "output_file": TEXT | NULL,
        "recompute_fwd_factor": SCALE,
        "module_depth": WHOLE,
        **_each(COUNT, "profile_step top_modules"),
        **_each(BOOL, "enabled detailed"),
    },
    "disable_python_gc": BOOL,
}

# Keys that DeepSpeed knows and that do not belong here, by dotted path under the reason or the replacement.
_NOT_HERE: Mapping[str, str] = {
    "the run config owns the schedule: run.lr_sched, run.init_lr, run.min_lr, run.warmup_steps": "scheduler",
    "the run config owns clipping: run.max_grad_norm": "optimizer.params.max_grad_norm",
    "the run config owns accumulation: run.accum_grad_iters": "managed_gradient_accumulation",
    "the run config owns batch sizes": "autotuning elasticity",
    "run.trackers chooses TensorBoard, wandb and mlflow": "tensorboard wandb csv_monitor comet "
    "zero_optimization.compute_grad_norm",
    "blipds loads the data itself: run and datasets in the run config": "data_efficiency dataloader_drop_last "
    "curriculum_learning",
    "blipds saves and resumes by itself, see --resume": "checkpoint datastates_ckpt nebula "
    "zero_optimization.elastic_checkpoint",
    "blipds trains data-parallel, ZeRO alone splits the model": "pipeline tensor_parallel expert_parallel "
    "use_data_before_expert_parallelism sequence_parallel_size seq_parallel_communication_data_type "
    "zero_optimization.pipeline_loading_checkpoint",
    "blipds averages over the labelled tokens of the global batch, which needs the mean": "gradient_allreduce_op",
    "bf16.enabled and fp16.enabled decide, and blipds casts the images": "fp16.auto_cast data_types.param_dtype "
    "data_types.buffer_dtype",
    "blipds keeps every step exact, and reads the optimizer's state to save it": "zero_optimization.zenflow "
    "zero_optimization.offload_optimizer.super_offload zero_optimization.offload_optimizer.cpuadam_cores_perc",
    'it is the old name of "bf16"': "bfloat16",
    'say "offload_optimizer": {"device": "cpu"}': "zero_optimization.cpu_offload",
    'say "offload_param": {"device": "cpu"}': "zero_optimization.cpu_offload_param",
    'say "pin_memory" in offload_optimizer or offload_param': "zero_optimization.cpu_offload_use_pin_memory",
    "say stage3_gather_16bit_weights_on_model_save": "zero_optimization.stage3_gather_fp16_weights_on_model_save",
    "use bf16, fp16 or torch_autocast": "amp",
    "blipds makes no use of it": "compile hybrid_engine weight_quantization vocabulary_size disable_allgather "
    "compression_training quantize_training eigenvalue sparse_attention sparse_gradients graph_harvesting "
    "progressive_layer_drop data_types.keep_in_fp32_modules optimizer.legacy_fusion "
    "zero_optimization.save_muon_momentum_buffer_in_memory zero_optimization.legacy_stage1 "
    "zero_optimization.mics_shard_size zero_optimization.mics_hierarchical_params_gather "
    "zero_optimization.zeropp_loco_param",
}
NOT_HERE: Mapping[str, str] = {path: why for why, paths in _NOT_HERE.items() for path in paths.split()}
