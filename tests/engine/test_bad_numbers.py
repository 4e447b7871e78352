"""A loss that is not a number changes no weight, whatever the stage and the precision, and its images are named."""

import json

import pytest
import torch
from launching import launch

PRECISIONS = {
    "fp32": {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
    "bf16": {"bf16": {"enabled": True}, "fp16": {"enabled": False}},
    "fp16": {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 4}},  # no overflow of its own
}
if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
    del PRECISIONS["fp16"]
KINDS = {
    f"{name} zero{stage}": precision | {"zero_optimization": {"stage": stage}}
    for name, precision in PRECISIONS.items()
    for stage in range(4)
}
KINDS["bf16 zero1 fp32 gradients"] = KINDS["bf16 zero1"] | {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, {kind: what became of it}): five steps on two ranks, the third with a bad loss on rank 1."""
    folder = tmp_path_factory.mktemp("bad")
    options = [
        *("datasets.shapes_caption.num_images.train=16", "run.batch_size_train=4", "run.num_workers=0"),
        *("run.runner=runner_iter", "run.max_iters=5", "run.log_freq=1", "run.valid_splits=[]", "run.save_last=false"),
        *("run.max_grad_norm=1.0", "run.warmup_steps=0", "run.save_freq=9"),
    ]
    specs = [
        {"name": name, "cfg": "tests/shapes_tiny.yaml", "options": options, "ds": ds | {"steps_per_print": 10**9}}
        for name, ds in KINDS.items()
    ]
    (folder / "specs.json").write_text(json.dumps(specs))
    process = launch(2, "tests/engine/bad_numbers.py", folder / "specs.json", folder / "results.json", timeout=1800)
    assert process.returncode == 0, process.stdout[-6000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_skipped_and_the_next_is_taken(runs, kind):
    result = runs[1][kind]
    first, second, third, fourth, fifth = result["weight_sums"]
    assert second == third
    assert len({first, second, fourth, fifth}) == 4
    assert result["losses"][2] is None and None not in result["losses"][:2] + result["losses"][3:]
    assert result["bad_steps"] == 1
    assert result["adam_step"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_of_the_bad_rank_are_named(runs, kind):
    folder, results = runs
    (line,) = (folder / kind / "bad_steps.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["step"] == 3 and line["not_finite"] == "loss" and line["losses"][1] == "nan"
    assert line["images"] == {"1": results[kind]["images"]} and len(results[kind]["images"]) == 4
