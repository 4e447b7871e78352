"""Adapters under DeepSpeed: every ZeRO stage learns alike, checkpoints are small, and runs resume anywhere."""

import json
from functools import partial
from pathlib import Path

import pytest
from launching import launch
from safetensors import safe_open
from safetensors.torch import save_file

from blipds.config.run import load_run_config
from blipds.models import build_model
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights

SHAPES = "tests/shapes_tiny.yaml"
STEPS, SECOND = 4, "checkpoints/step_00000002"
OPTIONS = [
    *("model.load_pretrained=true", "model.lora={r: 4, alpha: 8, train_also: [cls.*]}"),
    *("model.med_config_path=tests/engine/no_dropout.json", "datasets.shapes_caption.num_images.train=70"),
    *("run.runner=runner_iter", f"run.max_iters={STEPS}", "run.log_freq=1", "run.save_freq=1000", "run.num_workers=0"),
    *("run.valid_splits=[]", "run.warmup_steps=0", "run.init_lr=1e-3", "run.lr_sched=constant_lr"),
    *("run.max_grad_norm=0.5", "run.save_last=false"),
]
RECOMPUTED = ("model.vit_grad_ckpt=true", "model.text_grad_ckpt=true")
FROZEN = ("model.freeze_vit=true", "datasets.shapes_caption.vis_processor.train.name=blip_image_eval")
SELF_CRITICAL = ("run.objective=self_critical", "run.self_critical.samples=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A whole checkpoint to adapt."""
    config, _ = load_run_config(Path(SHAPES), ["model.med_config_path=tests/engine/no_dropout.json"])
    model = build_model(config.model, keep_activations)
    initialise(model, 3, partial(copy_into, model))
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(dict(model.named_parameters()), path, metadata={"format": "blipds", "config": "{}"})
    return path


def setting(base, name, ranks, stage, *options, precision=None, offload=False, **more):
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    ds = {"zero_optimization": zero, "steps_per_print": 10**9}
    ds |= {kind: {"enabled": kind == precision} for kind in ("bf16", "fp16")}
    sizes = [f"run.batch_size_train={8 // ranks}", f"model.pretrained={base}"]
    return {"name": name, "cfg": SHAPES, "ds": ds, "options": [*OPTIONS, *sizes, *options], **more}


def train(folder, ranks, *settings):
    (folder / "spec.json").write_text(json.dumps(settings))
    process = launch(ranks, "tests/engine/grid.py", folder / "spec.json", folder / "losses.json")
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads((folder / "losses.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(base, runs, tmp_path_factory):
    killed = str(runs / "killed")
    return train(
        tmp_path_factory.mktemp("one"),
        1,
        setting(base, "whole", 1, 0),
        setting(base, "killed", 1, 0, "run.save_last=true", until=2, run_dir=killed),
        setting(
            base, "resumed", 1, 0, "run.save_last=true", run_dir=killed, resume=f"{killed}/checkpoints/step_00000002"
        ),
        setting(base, "self-critical", 1, 0, *SELF_CRITICAL),
        setting(base, "frozen", 1, 0, *FROZEN),
        setting(base, "bf16", 1, 0, precision="bf16"),
    )


@pytest.fixture(scope="module")
def two_ranks(base, runs, one_rank, tmp_path_factory):
    """In one launch, since a launch costs more than the steps."""
    folder = tmp_path_factory.mktemp("two")
    killed = f"{runs}/killed/{SECOND}"
    cached = (*FROZEN, "model.cache_image_embeds=true", f"env.cache_root={folder}")
    return train(
        folder,
        2,
        *(setting(base, f"zero{stage}", 2, stage) for stage in range(4)),
        setting(base, "recomputed", 2, 3, *RECOMPUTED),
        setting(base, "offload", 2, 2, offload=True),
        setting(base, "bf16", 2, 3, precision="bf16"),
        setting(base, "self-critical", 2, 3, *SELF_CRITICAL),
        setting(base, "cached", 2, 2, *cached),
        setting(base, "resumed", 2, 3, run_dir=str(runs / "resumed"), resume=killed),
    )


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "recomputed", "offload"])
def test_every_stage_learns_as_one_rank_does(one_rank, two_ranks, name):
    found, expected = two_ranks[name], one_rank["whole"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-3)
    assert found["weight_sums"] == pytest.approx(expected["weight_sums"], rel=1e-4)
    assert expected["losses"][-1] < expected["losses"][0]


def test_other_ways_of_training(one_rank, two_ranks):
    assert two_ranks["self-critical"]["losses"] == pytest.approx(
        one_rank["self-critical"]["losses"], rel=1e-4, abs=1e-6
    )
    # features are kept in bf16
    assert two_ranks["cached"]["losses"] == pytest.approx(one_rank["frozen"]["losses"], rel=2e-2)
    assert two_ranks["bf16"]["losses"] == pytest.approx(one_rank["bf16"]["losses"], rel=2e-2)
    assert not any(name.startswith("visual_encoder.") for name in one_rank["frozen"]["weight_sums"])


def test_a_resumed_run_is_the_uninterrupted_one(one_rank, two_ranks):
    whole, killed, resumed = (one_rank[name] for name in ("whole", "killed", "resumed"))
    for key in ("losses", "grad_norms"):
        assert killed[key] + resumed[key] == whole[key]
        assert two_ranks["resumed"][key] == pytest.approx(whole[key][2:], rel=1e-4)
    assert resumed["weight_sums"] == whole["weight_sums"]


def test_a_checkpoint_holds_what_learns(base, one_rank, runs):
    folder = runs / "killed" / "checkpoints" / "latest"
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names, config = set(file.keys()), json.loads(file.metadata()["config"])
    assert names == set(one_rank["whole"]["weight_sums"]) and len(names) < 60
    assert all(".lora_" in name or name.startswith("text_decoder.cls.") for name in names)
    assert config["lora"] == {"r": 4, "alpha": 8, "dropout": 0.0} and config["base"] == str(base)
    numbers = sum(open_weights(str(folder), folder).tensors[name].numel() for name in names)
    size = sum(path.stat().st_size for path in folder.resolve().iterdir())
    assert 12 * numbers < size < 12 * numbers + 60_000  # fp32 weights, two moments, headers


def test_what_was_trained_is_evaluated_merged(base, one_rank, runs):
    config, _ = load_run_config(Path(SHAPES), [*OPTIONS, f"model.pretrained={base}"])
    model = build_model(config.model, keep_activations)
    lines = []
    load_weights(model, open_weights(str(runs / "killed"), runs), lines.append)
    layer = "text_decoder.bert.encoder.layer.0.attention.self.query"
    stored = open_weights(str(runs / "killed"), runs).tensors
    first, second = stored[f"{layer}.lora_A.weight"], stored[f"{layer}.lora_B.weight"]
    expected = open_weights(str(base), runs).tensors[f"{layer}.weight"] + 2 * second @ first
    assert second.any() and (model.get_parameter(f"{layer}.weight") - expected).abs().max() < 1e-6
    assert lines[-1].endswith("merged")
