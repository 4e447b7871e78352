"""blipds/config/deepspeed_schema.py: the table against DeepSpeed's own models, and what it refuses."""

import json
from pathlib import Path

import pytest
from refusals import error

from blipds.config.deepspeed import check_keys, load_ds_config
from blipds.config.deepspeed_schema import NOT_HERE, SCHEMA


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


# ---- Errors in the file ---------------------------------------------------------------------------------------------


def test_whole_floats_become_integers():
    checked = check_keys({"zero_optimization": {"stage": 3.0, "sub_group_size": 1e9}}, "my.json")
    assert [type(value) for value in checked["zero_optimization"].values()] == [int, int]
    assert checked["zero_optimization"]["sub_group_size"] == 1_000_000_000


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
