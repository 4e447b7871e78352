"""Kills a run of two ranks at random moments, goes on with `--resume auto`, and compares it with one left in peace.

    python tests/faults.py --kills 20 [--seed 1]

fp32 on a CPU, dropout and augmentation on; every other run saves in the background. Every loss must be equal to the
bit, nothing lost but the steps since the last checkpoint. `tests/test_faults.py` does it with five kills.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

from launching import kill, start_ranks, wait

SAVE_STEPS = 2
DS_CONFIG = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
PHASES = ("start", "step", "saving", "evaluation")
PATIENCE = 600.0  # seconds without any progress: a hang


def options(output: Path, steps: int, async_save: bool = False) -> list[str]:
    ds_config = output / "fp32.json"
    output.mkdir(exist_ok=True)
    ds_config.write_text(json.dumps(DS_CONFIG | {"steps_per_print": 10**9}))
    settings = {
        "run.runner": "runner_iter",
        "run.max_iters": steps,
        "run.val_freq": 1,
        "run.iters_per_inner_epoch": 5,
        "run.save_steps": SAVE_STEPS,
        "run.async_save": async_save,
        "run.log_freq": 1,
        "run.report_metric": "false",  # captions without Java
        "run.num_workers": 1,
        "run.batch_size_train": 4,
        "run.batch_size_eval": 4,
        "run.limit_val": 8,
        "run.test_splits": "[]",
        "run.output_dir": output,
        "run.job_id": "run",
        "datasets.shapes_caption.num_images.train": 28,
        "model.med_config_path": "tests/engine/dropout.json",
    }
    where = ["--cfg-path", "tests/shapes_tiny.yaml", "--ds-config", str(ds_config), "--resume", "auto"]
    return [*where, "--options", *(f"{key}={value}" for key, value in settings.items())]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def newest_checkpoint(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_????????")), default=0)


def last_step(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    found = re.findall(r'"kind": "train", "step": (\d+)', metrics.read_text()) if metrics.exists() else []
    return int(found[-1]) if found else 0


def run_to_the_end(output: Path, steps: int) -> None:
    processes = start_ranks(2, output / "log", "launch/finetune.py", *options(output, steps))
    try:
        status = wait(processes, PATIENCE)
    finally:
        kill(processes)
    assert status == 0, (output / "log").read_text()[-4000:]


def run_and_kill(output: Path, steps: int, phase: str, async_save: bool, dice: random.Random) -> bool:
    """Starts the run and kills it in a phase; False: it had ended before."""
    run_dir, folder = output / "run", output / "run" / "checkpoints"
    target = min(newest_checkpoint(run_dir) + dice.randint(1, 4), steps)
    processes = start_ranks(2, output / "log", "launch/finetune.py", *options(output, steps, async_save))
    started = time.monotonic()

    def arrived() -> bool:
        if phase == "start":
            return time.monotonic() - started > start_delay
        if phase == "saving":
            return bool(list(folder.glob("*.partial"))) and last_step(run_dir) >= target
        if phase == "evaluation":  # of the steps 5, 10, ...: between the line of the step and the captions
            step = last_step(run_dir)
            return step > before and step % 5 == 0
        return last_step(run_dir) >= target

    before, start_delay = last_step(run_dir), dice.uniform(0, 8)
    try:
        while not arrived():
            if all(process.exitcode is not None for process in processes):
                assert [process.exitcode for process in processes] == [0, 0], (output / "log").read_text()[-4000:]
                return False
            assert time.monotonic() - started < PATIENCE, (output / "log").read_text()[-4000:]
            time.sleep(0.001)
        if phase in ("step", "evaluation"):
            time.sleep(dice.uniform(0, 0.3))
    finally:
        kill(processes)
    return True


def torment(folder: Path, kills: int, seed: int) -> list[dict]:
    """{phase, killed after, went on after} of each kill. Raises AssertionError where anything is lost or differs."""
    dice, steps = random.Random(seed), 2 * kills + 4
    calm, cut = folder / "calm", folder / "cut"
    run_to_the_end(_made(calm), steps)
    _made(cut)
    phases = [PHASES[number % len(PHASES)] for number in range(kills)]
    dice.shuffle(phases)
    happened = []
    for number, phase in enumerate(phases):
        log_before = len((cut / "log").read_text()) if (cut / "log").exists() else 0
        async_save = number % 2 == 1
        killed = run_and_kill(cut, steps, phase, async_save, dice)
        went_on = re.search(r"resumed    after step (\d+)", (cut / "log").read_text()[log_before:])
        if happened and went_on:
            assert int(went_on[1]) >= happened[-1]["whole checkpoint"], (phase, happened[-1])
        checkpoint, done = newest_checkpoint(cut / "run"), last_step(cut / "run")
        # in the background a checkpoint may take until the next is due
        assert done - checkpoint <= SAVE_STEPS * (1 + async_save), (
            f"after kill {number}: {done} steps, saved {checkpoint}"
        )
        happened.append({"phase": phase, "killed": killed, "last step": done, "whole checkpoint": checkpoint})
    run_to_the_end(cut, steps)
    assert losses(cut / "run") == losses(calm / "run")
    assert [step for step, _ in losses(cut / "run")] == list(range(1, steps + 1))
    assert curve(cut / "run") == curve(calm / "run")
    captions = [(output / "run" / "results" / f"val_step{steps}.json") for output in (calm, cut)]
    texts = [path.read_text() for path in captions if path.exists()]
    assert len(texts) in (0, 2) and len(set(texts)) <= 1
    return happened


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """The loss as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("train/loss")]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        happened = torment(Path(folder), args.kills, args.seed)
    for number, kill_ in enumerate(happened, start=1):
        print(number, *(f"{key}: {value}" for key, value in kill_.items()), sep="  ")
    print(f"{sum(kill_['killed'] for kill_ in happened)} kills; every loss equal to the bit")
    sys.exit(0)


if __name__ == "__main__":
    main()
