"""What a report says of a run."""

import json
from pathlib import Path

import pytest
import torch

from blipds.config.run import load_run_config
from blipds.data.annotations import ImageFile, Record
from blipds.report.facts import duration, facts
from blipds.report.gallery import Shown
from blipds.report.machine import machine_facts

RECORD = Record(ImageFile(Path("a.jpg")), (), 1)
START = {
    "kind": "start",
    "step": 0,
    "total_steps": 1880,
    "parameters": 18_000_000,
    "frozen_parameters": 22_000_000,
    "images": 6000,
    "captions": 30_000,
    "reward": "CIDEr-D",
    "time": 1000.0,
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {model_type: tiny, freeze_vit: true}\ndatasets: {shapes_caption: {}}\n")
    return load_run_config(path, ["run.batch_size_train=16", "run.accum_grad_iters=2", "run.max_epoch=10"])[0]


def rows(tmp_path, config, lines, splits=()):
    return {what: value for rows in facts(tmp_path, config, lines, splits).values() for what, value in rows.items()}


def test_a_run_in_its_third_epoch(tmp_path, config):
    ds = {"train_batch_size": 64, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    (tmp_path / "ds_config.json").write_text(json.dumps(ds))
    speeds = [{"images_per_s": 10.0, "captions_per_s": speed, "data_wait": 0.01} for speed in (50.0, 90.0, 100.0)]
    train = [{"kind": "train", "step": 500, "epoch": 2, "time": 4600.0, **speed} for speed in speeds]
    val = Shown("val", [RECORD] * 1000, {str(image): ["a house"] * 5 for image in range(1000)})
    said = rows(tmp_path, config, [START, *train], [val, Shown("test", [RECORD] * 7, None)])
    assert said["Parameters"] == "18,000,000 trainable, 22,000,000 frozen"
    assert said["Trained on"] == "6,000 images, 30,000 captions"
    assert said["Objective"] == "cross_entropy" and said["Reward"] == "CIDEr-D"
    assert said["Split val"] == "1,000 images, 5,000 references"
    assert said["Split test"] == "7 images, no references"
    assert said["Progress"] == "step 500 of 1,880, epoch 3 of 10"
    assert said["Batch"] == "16 x 2 accumulated x 2 ranks = 64 samples a step"
    assert said["Engine"] == "ZeRO stage 2, bf16"
    assert said["Captions"] == "90.0 a second (the median of training)"
    assert said["Time so far"] == "1 h 0 min"
    assert said["Initial weights"] == "random weights"


def test_report_metric_false_is_not_called_no_references(tmp_path, config):
    config.run.report_metric = False
    said = rows(tmp_path, config, [], [Shown("val", [RECORD] * 1000, None)])
    assert said["Split val"] == "1,000 images, not scored (run.report_metric is false)"


def test_what_is_not_known_is_not_said(tmp_path, config):
    """An evaluation of some checkpoint: no training, and here not even the start is noted."""
    assert list(facts(tmp_path, config, [], [])) == ["Model", "Data", "Captions"]
    assert not {"Parameters", "Trained on", "Time so far", "Progress"} & rows(tmp_path, config, []).keys()


def test_machine(tmp_path, config):
    found = machine_facts(torch.device("cpu"))
    json.dumps(found)  # a line of metrics.jsonl
    assert found["ranks"] == 1 and torch.__version__.startswith(found["versions"]["torch"])
    said = rows(tmp_path, config, [START | found])
    assert (
        said["Device"] == "CPU" and said["Ranks"] == "1" and f"torch {found['versions']['torch']}" in said["Versions"]
    )
    several = START | found | {"ranks": 16, "ranks_a_machine": 8, "device": "NVIDIA H100", "device_memory_gb": 84.9}
    said = rows(tmp_path, config, [several])
    assert said["Ranks"] == "16 on 2 machines" and said["Device"] == "NVIDIA H100, 85 GB"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (99.4, "99 s"), (101, "2 min"), (3599, "1 h 0 min"), (3600, "1 h 0 min"), (45_240, "12 h 34 min")],
)
def test_duration(seconds, said):
    assert duration(seconds) == said
