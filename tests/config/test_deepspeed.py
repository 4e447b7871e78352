"""blipds/config/deepspeed.py: what "auto" becomes, and what contradicts the run config or itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import error

from blipds.config.deepspeed import (
    check_keys,
    checkpoints_on_host,
    load_ds_config,
    offload_folders,
    precision,
    resolve_ds_config,
    with_offload_folder,
)
from blipds.config.sections import Config, RunConfig
from blipds.models.blip.config import BlipConfig

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def config(**run):
    return Config(run=RunConfig(**{"batch_size_train": 16, "accum_grad_iters": 2} | run))


CONFIG = config()


def resolve(ds, config=CONFIG, world_size=8, default_precision="bf16", **machine):
    return resolve_ds_config(
        check_keys(ds, "my.json"),
        config,
        world_size=world_size,
        default_precision=default_precision,
        source="my.json",
        **machine,
    )


def test_neither_torch_nor_deepspeed_is_imported():
    code = "import sys, blipds.config.deepspeed; print({'torch', 'deepspeed'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- The files that come with the project ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_packaged_config_resolves(path):
    resolved = resolve(load_ds_config(path))
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
    assert resolve(ds, config(beta2=0.98, max_grad_norm=1.5)) == {
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


CHECKPOINTED = Config(model=BlipConfig(text_grad_ckpt=True), run=CONFIG.run)
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


@pytest.mark.parametrize(
    ("stage", "accumulation", "ds", "expected"),
    [
        (2, 2, {"bf16": {"enabled": True}}, "fp32"),
        (2, 2, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": None}}, "fp32"),
        (2, 2, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
        (2, 1, {"bf16": {"enabled": True}}, None),  # nothing is added up
        (0, 2, {"bf16": {"enabled": True}}, None),  # DeepSpeed cannot
        (2, 2, {"fp16": {"enabled": True}}, None),
    ],
)
def test_bf16_gradients_are_summed_in_fp32(stage, accumulation, ds, expected):
    found = resolve(zero(stage=stage) | ds, config(accum_grad_iters=accumulation))
    assert found.get("data_types", {}).get("grad_accum_dtype") == expected
