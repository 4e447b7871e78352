"""The loop under DeepSpeed computes what LAVIS's BLIP-2 code computes, whatever the stage and the number of ranks."""

import json

import pytest
from launching import launch


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_eight_losses_of_lavis(ranks, golden, run_config, tmp_path):
    fp32 = {"bf16": {"enabled": False}, "fp16": {"enabled": False}, "steps_per_print": 10**9}
    specs = [
        {
            "name": f"{key} {stage}",
            "cfg": str(run_config),
            "ds": {"zero_optimization": {"stage": stage}, **fp32},
            "options": [
                *("run.runner=runner_iter", "run.max_iters=8", "run.log_freq=1", "run.save_last=false"),
                *(f"run.batch_size_train={8 // ranks}", f"model.freeze_vit={key == 'loss_vit_frozen'}"),
                f"model.use_grad_checkpoint={stage % 2 == 1}",
            ],
        }
        for stage in (0, 1, 2, 3)
        for key in ("loss_vit_trains", "loss_vit_frozen")
    ]
    spec, losses = tmp_path / "spec.json", tmp_path / "losses.json"
    spec.write_text(json.dumps(specs))
    process = launch(ranks, "tests/engine/grid.py", spec, losses)
    assert process.returncode == 0, process.stdout[-4000:]
    results = json.loads(losses.read_text())
    for name, result in results.items():
        assert result["losses"] == pytest.approx(golden["train"][name.split()[0]], rel=1e-4), name
