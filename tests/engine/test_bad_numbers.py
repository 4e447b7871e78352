"""A loss that is not a number changes no weight, whatever the stage and the precision, and its images are named."""

import json

import pytest
from launching import launch

FP32, BF16 = ({"bf16": {"enabled": on}, "fp16": {"enabled": False}} for on in (False, True))
KINDS = {
    "fp32 zero0": FP32 | {"zero_optimization": {"stage": 0}},
    "bf16 zero0": BF16 | {"zero_optimization": {"stage": 0}},
    "bf16 zero2": BF16 | {"zero_optimization": {"stage": 2}},
    "fp32 zero3": FP32 | {"zero_optimization": {"stage": 3}},
}


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
        {"name": name, "cfg": "run_configs/shapes_tiny.yaml", "options": options, "ds": ds | {"steps_per_print": 10**9}}
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_images_of_the_bad_rank_are_named(runs, kind):
    folder, results = runs
    (line,) = (folder / kind / "bad_steps.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["step"] == 3 and line["not_finite"] == "loss" and line["losses"][1] == "nan"
    assert line["images"] == {"1": results[kind]["images"]} and len(results[kind]["images"]) == 4
