"""blipds/config/deepspeed.py: the table against DeepSpeed's own models, what it refuses, what "auto" becomes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blipds.config.deepspeed import (
    RunValues,
    check_keys,
    checkpoints_on_host,
    load_ds_config,
    offload_folders,
    precision,
    resolve_ds_config,
    with_offload_folder,
)
from blipds.config.deepspeed_schema import NOT_HERE, SCHEMA
from blipds.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
RUN = RunValues(
    micro_batch_size=16, gradient_accumulation_steps=2, learning_rate=1e-5, betas=(0.9, 0.999), weight_decay=0.05
)


def resolve(ds, run=RUN, world_size=8, default_precision="bf16", hidden_size=768, **machine):
    return resolve_ds_config(
        check_keys(ds, "my.json"),
        run,
        world_size=world_size,
        default_precision=default_precision,
        hidden_size=hidden_size,
        source="my.json",
        **machine,
    )


def error(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, text: str) -> Path:
    path = folder / "my.json"
    path.write_text(text)
    return path


# ---- The table and DeepSpeed ----------------------------------------------------------------------------------------


def names(model) -> set[str]:
    """The keys that one of DeepSpeed's pydantic models reads from JSON."""
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.fixture(scope="module")
def deepspeed_models():
    pytest.importorskip("deepspeed")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.leaf_module": DeepSpeedZeroLeafModuleConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def table(path: str) -> set[str]:
    section = SCHEMA
    for key in path.split("."):
        section = section[key]
    return set(section)


def test_sections_hold_exactly_the_keys_of_deepspeeds_models(deepspeed_models):
    """Every key of a model is in the table or named, with its reason, in NOT_HERE; the table invents none."""
    for path, model in deepspeed_models.items():
        refused = {key.removeprefix(path + ".") for key in NOT_HERE if key.startswith(path + ".")}
        assert table(path) <= names(model), path
        assert names(model) - table(path) <= refused, path


def test_the_other_keys_are_constants_that_deepspeed_reads():
    pytest.importorskip("deepspeed")
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    strings = {value for value in vars(constants).values() if isinstance(value, str)}
    elsewhere = {"zero_optimization", "activation_checkpointing", "aio", "comms_logger", "flops_profiler", "timers"}
    assert set(SCHEMA) - elsewhere <= strings
    assert table("aio") == set(AIO_DEFAULT_DICT)
    assert table("activation_checkpointing") == set(ACT_CHKPT_DEFAULT)
    assert table("flops_profiler") <= {value for value in vars(profiling).values() if isinstance(value, str)}
    for section in ("data_types", "torch_autocast"):
        assert table(section) <= strings, section
    assert {config.TORCH_ADAM_PARAM, config.ADAM_W_MODE} <= table("optimizer.params")


def test_what_deepspeed_refuses_is_refused_here_with_a_reason():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    removed = {*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *(f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS)}
    assert removed <= set(NOT_HERE)


def test_no_key_is_both_allowed_and_refused():
    for path in NOT_HERE:
        section, _, key = path.rpartition(".")
        assert key not in (table(section) if section else SCHEMA), path


def test_neither_torch_nor_deepspeed_is_imported():
    code = "import sys, blipds.config.deepspeed; print({'torch', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- The files that come with the project ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_packaged_config_resolves(path):
    resolved = resolve_ds_config(
        load_ds_config(path), RUN, world_size=8, default_precision="bf16", hidden_size=1024, source=str(path)
    )
    assert "auto" not in json.dumps(resolved)
    assert path.stem.startswith(f"zero{resolved['zero_optimization']['stage']}")
    assert precision(resolved) == "bf16"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("default_precision", ["bf16", "fp16", "fp32"])
def test_deepspeed_accepts_what_is_resolved(path, default_precision, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = resolve(load_ds_config(path), world_size=1, default_precision=default_precision)
    parsed = DeepSpeedConfig(resolved)
    assert parsed.train_batch_size == 32
    assert parsed.gradient_clipping == 0.0  # left out, DeepSpeed 0.19 clips at 1.0
    assert parsed.optimizer_params["betas"] == [0.9, 0.999]
    assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (
        default_precision == "bf16",
        default_precision == "fp16",
    )


# ---- "auto" ---------------------------------------------------------------------------------------------------------


def test_autos_by_hand():
    ds = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    run = RunValues(16, 2, 1e-5, (0.9, 0.98), 0.05, max_grad_norm=1.5)
    assert resolve(ds, run) == {
        "train_batch_size": 256,  # 16 x 2 x 8 ranks
        "train_micro_batch_size_per_gpu": 16,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.5,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.05, "adam_w_mode": True},
        },
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 589_824,  # 768 x 768
            "stage3_prefetch_bucket_size": 530_841,  # int(0.9 x 589,824) = int(530,841.6)
            "stage3_param_persistence_threshold": 7_680,
        },
    }


def test_a_node_is_the_secondary_partition_of_zeropp():
    ds = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "auto"}}
    groups = [
        resolve(ds, world_size=ranks, local_world_size=local)["zero_optimization"]["zero_hpz_partition_size"]
        for ranks, local in ((16, 8), (16, 4), (8, None))
    ]
    assert groups == [8, 4, 8]


def test_what_is_left_out_counts_as_auto_and_the_input_is_left_alone():
    ds = {}
    resolved = resolve(ds)
    assert ds == {}
    assert resolved["train_batch_size"] == 256
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["optimizer"]["type"] == "AdamW"
    assert precision(resolved) == "fp32"


@pytest.mark.parametrize(
    ("bf16", "fp16", "default", "expected"),
    [
        ("auto", "auto", "bf16", "bf16"),
        ("auto", "auto", "fp16", "fp16"),
        ("auto", "auto", "fp32", "fp32"),
        (True, "auto", "fp16", "bf16"),
        ("auto", True, "bf16", "fp16"),
        (False, "auto", "bf16", "fp32"),
        (True, False, "fp32", "bf16"),
    ],
)
def test_precision(bf16, fp16, default, expected):
    ds = {"bf16": {"enabled": bf16}, "fp16": {"enabled": fp16}}
    assert precision(resolve(ds, default_precision=default)) == expected


def test_torch_autocast_keeps_the_parameters_in_fp32():
    ds = {"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert precision(resolve(ds)) == "fp32"


def test_whole_floats_become_integers():
    checked = check_keys({"zero_optimization": {"stage": 3.0, "sub_group_size": 1e9}}, "my.json")
    assert [type(value) for value in checked["zero_optimization"].values()] == [int, int]
    assert checked["zero_optimization"]["sub_group_size"] == 1_000_000_000


# ---- Errors in the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ds", "path", "meant"),
    [
        ({"zero_optimisation": {}}, "zero_optimisation", "zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com", "overlap_comm"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "zero_optimization.offload_optimizer.devise",
            "device",
        ),
        ({"optimizer": {"typ": "AdamW"}}, "optimizer.typ", "type"),
        ({"optimizer": {"params": {"wieght_decay": 0.1}}}, "optimizer.params.wieght_decay", "weight_decay"),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpoint",
            "cpu_checkpointing",
        ),
        ({"timers": {"throughput": {"enable": True}}}, "timers.throughput.enable", "enabled"),
        ({"bf16": {"enable": True}}, "bf16.enable", "enabled"),
    ],
)
def test_misspelt_keys(ds, path, meant):
    assert error(check_keys, ds, "my.json").startswith(
        f"my.json: unknown key '{path}'; did you mean '{meant}'? allowed: "
    )


def test_the_whole_line_about_a_misspelt_key():
    message = error(check_keys, {"timers": {"throughput": {"enable": True}}}, "my.json")
    assert message == (
        "my.json: unknown key 'timers.throughput.enable'; did you mean 'enabled'? allowed: enabled, synchronized"
    )


@pytest.mark.parametrize(
    ("ds", "expected"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is true, must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto", must be one of 0, 1, 2, 3'),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes", must be true or false or "auto"'),
        ({"steps_per_print": 0}, "steps_per_print is 0, must be a whole number of at least 1 or null"),
        (
            {"optimizer": {"params": {"eps": "small"}}},
            'optimizer.params.eps is "small", must be a number of at least 0 or "auto"',
        ),
        ({"optimizer": {"type": "Lamb"}}, 'optimizer.type is "Lamb", must be one of "AdamW", "Adam"'),
        ({"timers": True}, "timers is true, must be a section with throughput"),
    ],
)
def test_wrong_types(ds, expected):
    assert error(check_keys, ds, "my.json") == f"my.json: {expected}"


@pytest.mark.parametrize(
    ("section", "key", "given", "said"),
    [
        ("bf16", "check_grad_overflow", False, "true: blipds skips every step whose gradients are not finite"),
        (
            "bf16",
            "bf16_master_weights_and_grads",
            True,
            "false: blipds keeps the optimizer's weights and moments in fp32",
        ),
        ("fp16", "fp16_master_weights_and_grads", True, "false: blipds keeps the optimizer's weights"),
        (
            "activation_checkpointing",
            "partition_activations",
            True,
            "false: it is about activations split over model-par",
        ),
        (
            "activation_checkpointing",
            "number_checkpoints",
            4,
            "null: it is about activations split over model-parallel",
        ),
        (
            "activation_checkpointing",
            "contiguous_memory_optimization",
            True,
            "false: it is about activations split over",
        ),
        ("activation_checkpointing", "profile", True, "false: it belongs to DeepSpeed's own checkpoint function"),
        ("activation_checkpointing", "synchronize_checkpoint_boundary", True, "false: it belongs to DeepSpeed's own"),
    ],
)
def test_keys_with_one_value_here(section, key, given, said):
    message = error(check_keys, {section: {key: given}}, "my.json")
    assert message.startswith(f"my.json: {section}.{key} is {json.dumps(given)}, must be {said}")
    check_keys({section: {key: json.loads(said.partition(":")[0])}}, "my.json")


@pytest.mark.parametrize(
    ("ds", "reason"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "run.lr_sched"),
        ({"tensorboard": {"enabled": True}}, "run.trackers chooses TensorBoard, wandb and mlflow"),
        ({"amp": {"enabled": False}}, "use bf16, fp16 or torch_autocast"),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, "run.max_grad_norm"),
        ({"data_types": {"param_dtype": "bf16"}}, "bf16.enabled and fp16.enabled decide"),
        (
            {"zero_optimization": {"offload_optimizer": {"super_offload": True}}},
            "reads the optimizer's state to save it",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, 'say "offload_optimizer": {"device": "cpu"}'),
    ],
)
def test_what_belongs_elsewhere_says_where(ds, reason):
    message = error(check_keys, ds, "my.json")
    assert "does not belong here" in message
    assert reason in message


def test_unreadable_files(tmp_path):
    missing = tmp_path / "none.json"
    assert error(load_ds_config, missing) == f"{missing}: cannot read the DeepSpeed JSON: No such file or directory"
    path = written(tmp_path, '{\n  "bf16": {"enabled": true,}\n}')
    assert error(load_ds_config, path).startswith(f"{path}:2:")
    path = written(tmp_path, '{"bf16": {"enabled": true, "enabled": false}}')
    assert error(load_ds_config, path) == f"{path}: key 'enabled' stands twice in one object; keep one"
    path = written(tmp_path, '{"gradient_clipping": Infinity}')
    assert error(load_ds_config, path) == f"{path}: Infinity is not valid in JSON"
    assert "must be a JSON object" in error(load_ds_config, written(tmp_path, "[]"))


# ---- Contradictions -------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_its_own():
    assert error(resolve, {"optimizer": {"params": {"lr": 0.001}}}) == (
        'my.json: optimizer.params.lr is 0.001 but run.init_lr is 1e-05; say "auto" in the JSON: the run config owns it'
    )


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "run.batch_size_train is 16"),
        ({"gradient_accumulation_steps": 4}, "run.accum_grad_iters is 2"),
        ({"train_batch_size": "many"}, 'train_batch_size is "many" but run.batch_size_train 16 x'),
        ({"optimizer": {"params": {"betas": [0.9]}}}, "optimizer.params.betas is [0.9] but (0.9, run.beta2) is"),
        ({"train_batch_size": 64}, "run.batch_size_train 16 x run.accum_grad_iters 2 x 8 ranks is 256"),
        ({"gradient_clipping": 1.0}, "run.max_grad_norm (0: no clipping) is 0.0"),
        ({"optimizer": {"params": {"betas": [0.9, 0.98]}}}, "(0.9, run.beta2) is [0.9, 0.999]"),
        ({"optimizer": {"params": {"weight_decay": 0}}}, "run.weight_decay is 0.05"),
    ],
)
def test_numbers_that_contradict_the_run_config(ds, said):
    assert said in error(resolve, ds)


def test_numbers_that_agree_with_the_run_config():
    agreeing = {"train_batch_size": 256, "gradient_clipping": 0, "optimizer": {"params": {"lr": 0.00001}}}
    assert resolve(agreeing) == resolve({})


def zero(**keys):
    return {"zero_optimization": keys}


@pytest.mark.parametrize(
    ("ds", "said"),
    [
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "needs stage 1 or more"),
        (zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}), '"nvme" needs stage 3'),
        (zero(stage=3, offload_optimizer={"device": "nvme"}), "needs nvme_path"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param needs stage 3 (it is 2)"),
        (zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer.ratio needs stage 3"),
        (zero(stage=2, stage3_max_live_parameters=1), "stage3_max_live_parameters needs stage 3"),
        (zero(stage=1, zero_quantized_weights=True), "zero_quantized_weights needs stage 3"),
        (zero(stage=3, zero_hpz_partition_size=3), "zero_hpz_partition_size 3 does not divide 8 ranks"),
        ({**zero(stage=2), "prescale_gradients": True}, "reduce_scatter"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both true"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype"),
        ({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}, "needs stage 1 or more"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, 'say type "Adam"'),
        ({"optimizer": {"params": {"torch_adam": True, "bias_correction": True}}}, "bias_correction"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "the run config makes none: switch them on"),
    ],
)
def test_combinations_that_do_not_work(ds, said):
    assert said in error(resolve, ds)


CHECKPOINTED = replace(RUN, activation_checkpointing=True)
ON_THE_HOST = {"activation_checkpointing": {"cpu_checkpointing": True}}


def test_checkpoints_on_the_host_need_a_device_and_checkpoints():
    assert not checkpoints_on_host(resolve({}, CHECKPOINTED))
    assert checkpoints_on_host(resolve(ON_THE_HOST, CHECKPOINTED))
    assert error(resolve, ON_THE_HOST, CHECKPOINTED, device_type="cpu") == (
        "my.json: activation_checkpointing.cpu_checkpointing moves activations off the GPU, and there is none here: "
        "remove it"
    )


@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantised_communication_needs_cuda(key):
    ds = zero(stage=3, **{key: True})
    resolve(ds)
    assert f"zero_optimization.{key}: DeepSpeed's quantizer is a CUDA kernel" in error(resolve, ds, device_type="cpu")


@pytest.mark.parametrize(
    ("zero", "ranks", "works"),
    [
        ({"stage": 0}, 2, True),
        ({"stage": 1}, 2, True),
        ({"stage": 1, "overlap_comm": True}, 2, False),
        ({"stage": 2}, 2, False),
        ({"stage": 2}, 1, True),
        ({"stage": 3}, 2, True),
    ],
)
def test_compiled_layers_need_gradients_in_order(zero, ranks, works):
    run = replace(RUN, compile=True)
    if works:
        resolve({"zero_optimization": zero}, run, world_size=ranks)
    else:
        said = error(resolve, {"zero_optimization": zero}, run, world_size=ranks)
        assert "run.compile" in said and "take stage 0 or 3" in said


def test_folders_of_nvme_offload():
    ds = zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/a"}, offload_param={"device": "cpu"})
    assert offload_folders(ds) == {"/a"}
    own = with_offload_folder(ds, "run")
    assert offload_folders(own) == {"/a/run"}
    assert own["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert offload_folders(zero(stage=2)) == set()


@pytest.mark.parametrize(
    "ds",
    [
        zero(stage=1, offload_optimizer={"device": "cpu"}),
        zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/nvme"}, offload_param={"device": "cpu"}),
        zero(stage=0, offload_optimizer=None, offload_param={"device": "none"}, zero_hpz_partition_size=1),
        zero(stage=2, stage3_gather_16bit_weights_on_model_save=False),
        zero(stage=3, zero_hpz_partition_size=4, zero_quantized_weights=True, zero_quantized_gradients=True),
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        {**zero(stage=1), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_combinations_that_work(ds):
    resolve(ds)
