"""Runs that are killed, told to stop, fail, or learn too fast: real ranks, as the system does it to them."""

import json
import re
import time

import pytest
from faults import torment
from launching import kill, launch, launch_as_typed, start_ranks

from blipds.data.shapes import make_scenes
from blipds.scoring.metrics import score_captions

SMALL = [
    *("datasets.shapes_caption.num_images.train=40", "run.batch_size_train=4", "run.num_workers=1", "run.log_freq=1"),
    *("run.valid_splits=[]", "run.test_splits=[]", "run.max_epoch=2", "run.job_id=run"),
]


def finetune(output, *options, launch=launch):
    arguments = ["--cfg-path", "tests/shapes_tiny.yaml", "--plugin", "tests.faulty"]
    return launch(
        2, "launch/finetune.py", *arguments, "--options", *SMALL, f"run.output_dir={output}", *options, timeout=1200
    )


def test_five_kills_at_random_moments_change_no_loss(tmp_path):
    happened = torment(tmp_path, kills=5, seed=1)
    assert {kill["phase"] for kill in happened} == {"start", "step", "saving", "evaluation"}


def test_all_ranks_stop_after_the_step_in_which_one_is_told_to(tmp_path):
    process = finetune(tmp_path, "run.lr_sched=is_told_to_stop", launch=launch_as_typed)
    assert process.returncode == 75, process.stdout[-4000:]
    said = re.search(r"^stopped by SIGUSR1 after step (3|4); go on with --resume", process.stdout, re.MULTILINE)
    assert said and "Traceback" not in process.stdout
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["run"]["global_step"] == int(said[1])


def test_scores_that_were_awaited_come_after_a_resume(tmp_path):
    """Validations after steps 2, 4 and 6. A signal, and then a kill, come before the scores of one have come.

    Each is scored in the end, once, from its own captions; the best of the three keeps its checkpoint.
    """
    run_dir, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    options = [f"run.output_dir={tmp_path}", "run.runner=runner_iter", "run.max_iters=6", "run.iters_per_inner_epoch=2"]
    options += ["run.valid_splits=[val]", "run.limit_val=11", "run.batch_size_eval=4", "run.save_steps=1"]
    options += ["run.keep_last=1", "run.num_workers=0"]
    resume = ["--cfg-path", "tests/shapes_tiny.yaml", "--resume", "auto", "--options", *SMALL, *options]

    def evaluated():
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line for line in lines if line["kind"] == "eval"}, [
            line["step"] for line in lines if line["kind"] == "eval"
        ]

    process = finetune(tmp_path, "run.lr_sched=is_told_to_stop", *options)
    assert process.returncode == 75, process.stdout[-4000:]
    state = json.loads((checkpoints / "latest" / "state.json").read_text())["run"]
    stopped, awaited = state["global_step"], state["awaited_step"]
    assert (stopped, awaited) in ((3, 2), (4, 4))
    assert evaluated()[1] == [2] * (awaited == 4)
    assert (checkpoints / f"step_{awaited:08d}").is_dir()

    processes = start_ranks(1, tmp_path / "log", "launch/finetune.py", *resume)
    deadline = time.monotonic() + 600
    while not (checkpoints / f"step_{stopped + 1:08d}").is_dir():
        assert processes[0].exitcode is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
        time.sleep(0.05)
    kill(processes)

    process = launch(2, "launch/finetune.py", *resume, timeout=1200)
    assert process.returncode == 0, process.stdout[-4000:]
    lines, steps = evaluated()
    assert steps == [2, 4, 6]
    references = {scene.id: scene.captions() for scene in make_scenes("val", 300, 42)[:11]}
    for epoch, step in enumerate(steps):
        results = json.loads((run_dir / "results" / f"val_epoch{epoch}.json").read_text())
        expected = score_captions({line["image_id"]: line["caption"] for line in results}, references)
        assert {name: lines[step][name] for name in expected.values} == pytest.approx(expected.values, rel=1e-12)
        assert set(lines[step]["seconds"]) >= {"tokenization", "Bleu", "METEOR", "ROUGE_L", "CIDEr"}
    best = max(steps, key=lambda step: (lines[step]["agg_metrics"], -step))
    assert (checkpoints / "best").resolve().name == f"step_{best:08d}"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == sorted({f"step_{best:08d}", "step_00000006"})


def test_a_bug_on_one_rank_ends_all_and_is_shown_once(tmp_path):
    process = finetune(tmp_path, "run.lr_sched=raises", launch=launch_as_typed)
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
