"""Runs that are killed, told to stop, fail, or learn too fast: real ranks, as the system does it to them."""

import json
import re

from faults import torment
from launching import launch

SMALL = [
    *("datasets.shapes_caption.num_images.train=40", "run.batch_size_train=4", "run.num_workers=1", "run.log_freq=1"),
    *("run.valid_splits=[]", "run.test_splits=[]", "run.max_epoch=2", "run.job_id=run"),
]


def finetune(output, *options):
    arguments = ["--cfg-path", "run_configs/shapes_tiny.yaml", "--plugin", "tests.faulty"]
    return launch(
        2, "launch/finetune.py", *arguments, "--options", *SMALL, f"run.output_dir={output}", *options, timeout=1200
    )


def test_five_kills_at_random_moments_change_no_loss(tmp_path):
    happened = torment(tmp_path, kills=5, seed=1)
    assert {kill["phase"] for kill in happened} == {"start", "step", "saving", "evaluation"}


def test_all_ranks_stop_after_the_step_in_which_one_is_told_to(tmp_path):
    process = finetune(tmp_path, "run.lr_sched=is_told_to_stop")
    assert process.returncode == 75, process.stdout[-4000:]
    said = re.search(r"^stopped by SIGUSR1 after step (3|4); go on with --resume", process.stdout, re.MULTILINE)
    assert said and "Traceback" not in process.stdout
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["run"]["global_step"] == int(said[1])


def test_a_bug_on_one_rank_ends_all_and_is_shown_once(tmp_path):
    process = finetune(tmp_path, "run.lr_sched=raises")
    assert process.returncode != 0
    assert process.stdout.count("Traceback") == process.stdout.count("RuntimeError: the cable is broken") == 1
    assert "rank 1 failed:" in process.stdout


def test_a_run_that_diverges_ends_with_a_diagnosis(tmp_path):
    """At a rate of 1e38 the first step takes the weights beyond all numbers, and nothing after it is finite."""
    process = finetune(
        tmp_path, "run.lr_sched=constant_lr", "run.init_lr=1e38", "run.max_bad_steps=3", "run.warmup_steps=0"
    )
    assert process.returncode == 1, process.stdout[-4000:]
    (error,) = [line for line in process.stdout.splitlines() if line.startswith("error")]
    assert "3 steps in a row with a loss or gradient that is not finite" in error
    assert "first met at rank 0: the weights visual_encoder." in error
    assert "learning rate 1e+38" in error
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
