"""A training step never waits for the device: what the host must know of it, it reads while the device goes on."""

import json

import pytest
from launching import launch

SETTINGS = [(stage, held) for stage in range(4) for held in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{setting: of each of two steps of two micro-batches, what was found}"""
    folder = tmp_path_factory.mktemp("syncs")
    options = [
        *("datasets.shapes_caption.num_images.train=32", "datasets.shapes_caption.captions_per_image=all"),
        *("run.batch_size_train=4", "run.accum_grad_iters=2", "run.num_workers=0", "run.max_grad_norm=0.5"),
        *("run.runner=runner_iter", "run.max_iters=4", "run.log_freq=9", "run.valid_splits=[]", "run.save_last=false"),
    ]
    specs = [
        {
            "name": f"zero{stage} {held}",
            "cfg": "tests/shapes_tiny.yaml",
            "options": options,
            "ds": {
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": held == "bf16"},
                "fp16": {"enabled": False},
                "steps_per_print": 10**9,
            },
        }
        for stage, held in SETTINGS
    ]
    (folder / "specs.json").write_text(json.dumps(specs))
    process = launch(1, "tests/engine/step_syncs.py", folder / "specs.json", folder / "syncs.json")
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads((folder / "syncs.json").read_text())


@pytest.mark.parametrize(("stage", "held"), SETTINGS)
def test_a_step_waits_for_nothing_but_what_deepspeed_waits_for(steps, stage, held):
    """`ReadLater.numbers` waits for an event before the first forward pass, not for the device."""
    found = steps[f"zero{stage} {held}"]
    own = [["tolist", "distributed.py:numbers"]]
    if (stage, held) == (0, "fp32"):  # where DeepSpeed does not look whether gradients are finite, blipds does
        own = [["__bool__", "engine.py:clip_or_drop"], *own]
    assert found == [own, own]
