"""A captioner that nobody but its plugin knows: trained, stopped, resumed, evaluated, captioned, planned."""

import json
from pathlib import Path

import pytest
import yaml
from launching import REPOSITORY, launch, launch_as_typed

from blipds.catalogue import catalogue
from blipds.cli import import_plugins
from blipds.config.run import load_run_config
from blipds.errors import UserError

PLUGINS = ["--plugin", "tests.plugin_captioner", "--plugin", "tests.faulty"]


@pytest.fixture
def cfg_path(tmp_path):
    """Every entry that the plugin registers is used."""
    config = {
        "model": {"arch": "conv_gru", "width": 16, "image_size": 32, "load_pretrained": False, "load_finetuned": False},
        "datasets": {"few_shapes": {"vis_processor": {"train": {"name": "upside_down"}}}},
        "run": {
            **{"objective": "doubled", "lr_sched": "half", "init_lr": 0.01, "num_workers": 0, "num_beams": 2},
            **{"runner": "runner_iter", "max_iters": 6, "iters_per_inner_epoch": 6, "batch_size_train": 4},
            **{"valid_splits": ["val"], "test_splits": ["test"], "log_freq": 1, "limit_val": 8},
            **{"report_metric": False},  # scores are no matter of the arch, and METEOR's Java takes seconds to load
            **{"output_dir": str(tmp_path), "job_id": "run"},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(script, *arguments):
    return launch(1, script, *arguments, *PLUGINS)


def test_a_plugin_s_captioner_is_a_first_class_one(cfg_path, tmp_path):
    run_dir = tmp_path / "run"
    begun = ["--cfg-path", cfg_path, *PLUGINS, "--ds-config"]
    stopped = launch_as_typed(
        2, "launch/finetune.py", *begun, "ds_configs/zero2.json", "--options", "run.lr_sched=is_told_to_stop"
    )
    assert "stopped by SIGUSR1 after step 4" in stopped.stdout, stopped.stdout[-4000:]

    resumed = launch_as_typed(2, "launch/finetune.py", *begun, "ds_configs/zero3.json", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stdout[-4000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines if line["kind"] == "train"] == [0.01] * 4 + [0.005] * 2
    assert {line["split"] for line in lines if line["kind"] == "eval"} == {"val", "test"}
    assert "conv_gru" in (run_dir / "report.html").read_text()

    evaluated = run("launch/evaluate.py", "--cfg-path", cfg_path, "--checkpoint", run_dir, "--options", "run.job_id=e")
    assert evaluated.returncode == 0, evaluated.stdout
    results = json.loads((tmp_path / "e" / "results" / "test.json").read_text())
    assert results == json.loads(next(run_dir.glob("results/test_epoch*.json")).read_text())

    picture = REPOSITORY.parent / "shared" / "data" / "flickr8k" / "images"
    image = next(picture.glob("*.jpg")) if picture.is_dir() else Path(__file__).with_name("none.jpg")
    captioned = run("launch/caption.py", image, "--checkpoint", run_dir)
    assert captioned.returncode == 0, captioned.stdout
    assert json.loads(next(line for line in captioned.stdout.splitlines() if line.startswith("{")))["image"] == str(
        image
    )

    planned = run("launch/plan.py", "--cfg-path", cfg_path, "--gpus", 2, "--gpu-memory", "24GB")
    assert planned.returncode == 0 and "fits: " in planned.stdout, planned.stdout

    exported = run("launch/export.py", "--checkpoint", run_dir, "--format", "hf", "--output", tmp_path / "out")
    assert exported.returncode == 1 and "conv_gru has the formats none" in exported.stdout


def test_another_arch_s_key_is_told_as_that(cfg_path):
    import_plugins(["tests.plugin_captioner"])
    with pytest.raises(UserError, match=r"^model\.vit_type is a key of blip_caption, and model\.arch is conv_gru$"):
        load_run_config(cfg_path, ["model.vit_type=base"])
    with pytest.raises(UserError, match=r"^model\.model_type is 'big', but conv_gru has no model types: remove it$"):
        load_run_config(cfg_path, ["model.model_type=big"])


def test_list_names_what_the_plugin_registers():
    import_plugins(["tests.plugin_captioner"])
    listed = {line.split()[0] for line in catalogue() if line.startswith("  ")}
    assert {"blip_caption", "large_coco", "coco_caption", "cosine_step_lr", "cross_entropy", "CIDEr"} <= listed
    assert {"conv_gru", "few_shapes", "upside_down", "half", "doubled"} <= listed
