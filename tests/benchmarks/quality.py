"""Time to quality: real runs on the Flickr8k photographs, one caption an image against all five."""

import itertools
import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import Row
from launching import REPOSITORY, command, environment

CAPTIONS = 5  # an image, in Flickr8k
IMAGES = {1: 40, "all": 16}  # of a rank in a step, so 40 captions and 80: the second takes less memory all the same
PASSES = {1: 1.0, "all": 1.6}  # over the photographs, with every caption of each
LEARNING_RATE = 5e-5  # with all captions 1e-4 and 2e-4 end lower; for both recipes


@dataclass
class Curve:
    """Validation CIDEr against seconds of training, evaluations and checkpoints left out."""

    seconds: list[float] = field(default_factory=list)
    cider: list[float] = field(default_factory=list)

    def time_to(self, cider: float) -> float | None:
        """When it was first reached: between two evaluations interpolated, not before the first; None if never."""
        points = list(zip(self.seconds, self.cider, strict=True))
        for (before, low), (after, high) in itertools.pairwise([points[0], *points]):
            if high >= cider:
                return after if low >= cider else before + (after - before) * (cider - low) / (high - low)
        return None


def curve_of(lines: list[dict], images_a_step: int) -> Curve:
    """From the lines of metrics.jsonl, whose rates are those of the steps alone."""
    curve, trained, before = Curve(), {0: 0.0}, 0
    for line in lines:
        if line["kind"] == "train":
            step = line["step"]
            trained[step] = trained[before] + (step - before) * images_a_step / line["images_per_s"]
            before = step
        elif line["kind"] == "eval":
            curve.seconds.append(trained[line["step"]])
            curve.cider.append(line["CIDEr"])
    return curve


def train(
    captions_per_image: int | str, photographs: int, ranks: int, data: Path, start: list[str], run_dir: Path
) -> Curve:
    """Runs launch/finetune.py to its end; validates at the end, the run with all captions four times."""
    images = IMAGES[captions_per_image]
    samples = photographs * (CAPTIONS if captions_per_image == 1 else 1)
    steps = round(PASSES[captions_per_image] * samples / (images * ranks))
    options = [f"env.cache_root={data}", *start, "run.test_splits=[]", "run.log_freq=10", "run.save_last=false"]
    options += [f"datasets.flickr8k_caption.captions_per_image={captions_per_image}", f"run.batch_size_train={images}"]
    options += ["run.runner=runner_iter", f"run.max_iters={steps}", f"run.warmup_steps={steps // 10}"]
    options += [f"run.init_lr={LEARNING_RATE}"]
    options += [f"run.iters_per_inner_epoch={steps if captions_per_image == 1 else -(-steps // 4)}"]
    options += [
        f"run.limit_train={photographs}",
        "run.save_freq=1000",
        f"run.output_dir={run_dir.parent}",
        f"run.job_id={run_dir.name}",
    ]
    config = ["--cfg-path", "run_configs/caption_flickr8k_small_encoder.yaml"]
    log = run_dir.parent / f"{run_dir.name}.log"
    print(f"  captions_per_image {captions_per_image}: {steps} steps, log in {log}", flush=True)
    with log.open("w") as output:
        process = subprocess.run(
            command(ranks, "launch/finetune.py", *config, "--options", *options),
            cwd=REPOSITORY,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if process.returncode != 0:
        raise RuntimeError(f"the run failed:\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = curve_of(lines, images * ranks)
    for seconds, cider in zip(curve.seconds, curve.cider, strict=True):
        print(f"  captions_per_image {captions_per_image}: {seconds:.0f} s, CIDEr {cider:.3f}", flush=True)
    return curve


def quality(ranks: int, data: Path, photographs: int, start: list[str]) -> list[Row]:
    """An epoch of the one-caption recipe, and more than one of the other. Same start, learning rate and schedule.

    A whole epoch, since in less than one the first recipe sees every photograph before the other has seen a fifth.
    """
    with tempfile.TemporaryDirectory() as folder:
        one = train(1, photographs, ranks, data, start, Path(folder) / "one")
        several = train("all", photographs, ranks, data, start, Path(folder) / "all")
    goal = one.cider[-1]
    reached = several.time_to(goal)
    ratio = None if reached is None else one.seconds[-1] / reached
    return [
        Row(
            "quality",
            f"training time to validation CIDEr {goal:.3f} on Flickr8k (all captions an image)",
            "not reached" if reached is None else f"{reached:.0f} s",
            f"{one.seconds[-1]:.0f} s (1 caption an image, an epoch of {photographs:,} photographs)",
            ratio,
            2.5,
            {"one": one.__dict__, "all": several.__dict__},
        )
    ]
