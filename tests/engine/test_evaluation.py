"""Captions during training, under ZeRO-3: the original code's, whether the weights are gathered or stay partitioned."""

import json

import pytest
from launching import launch

ZERO3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
GATHERED, IN_STEP = "run.gather_for_evaluation=true", "run.gather_for_evaluation=false"


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "oracle" / "golden.json").read_text())["generate"]["captions"]


@pytest.fixture(scope="module")
def run_config(shared, tmp_path_factory):
    """One step at a learning rate of 0 from the oracle's weights, then the captions of some photographs."""
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(
        f"""
env: {{cache_root: {shared}/data}}
model:
  load_pretrained: false
  finetuned: {shared}/oracle/tiny_blip.pth
  vit_kwargs: {{embed_dim: 96, depth: 4, num_heads: 4}}
  image_size: 96
  med_config_path: {shared}/oracle/med_config.json
datasets: {{flickr8k_caption: {{}}}}
run:
  runner: runner_iter
  max_iters: 1
  init_lr: 0
  batch_size_train: 1
  batch_size_eval: 2
  num_workers: 0
  limit_train: 2
  valid_splits: [val]
  report_metric: false
  save_last: false
"""
    )
    return path


@pytest.fixture(scope="module")
def captions(run_config, tmp_path_factory):
    """{setting: captions}. Of 5 photographs rank 0 has two batches and rank 1 one; of 1, rank 1 has none."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "gathered": [GATHERED, "run.limit_val=5"],
        "in step": [IN_STEP, "run.limit_val=5"],
        "greedy in step": [IN_STEP, "run.limit_val=5", "run.num_beams=1"],
        "one photograph": [IN_STEP, "run.limit_val=1"],
    }
    specs = [
        {"name": name, "cfg": str(run_config), "ds": ZERO3, "options": options} for name, options in settings.items()
    ]
    (folder / "specs.json").write_text(json.dumps(specs))
    process = launch(2, "tests/engine/grid.py", folder / "specs.json", folder / "losses.json")
    assert process.returncode == 0, process.stdout[-4000:]
    results = {name: json.loads((folder / name / "results" / "val_epoch0.json").read_text()) for name in settings}
    return {name: [entry["caption"] for entry in entries] for name, entries in results.items()}


@pytest.mark.parametrize("setting", ["gathered", "in step"])
def test_beam_search(captions, golden, setting):
    assert captions[setting] == golden["beam3_max20_min5"][:5]


def test_greedy_search(captions, golden):
    assert captions["greedy in step"] == golden["greedy_max20_min5"][:5]


def test_a_rank_without_images_takes_part(captions, golden):
    assert captions["one photograph"] == golden["beam3_max20_min5"][:1]
