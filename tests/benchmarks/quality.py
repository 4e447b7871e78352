"""Time to quality: real runs on the Flickr8k photographs, one caption an image against all five."""

import itertools
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import Row
from launching import REPOSITORY, command, environment


@dataclass
class Curve:
    """Validation CIDEr against seconds of training, evaluations left out."""

    seconds: list[float] = field(default_factory=list)
    cider: list[float] = field(default_factory=list)

    def time_to(self, cider: float) -> float | None:
        """When it was first reached, interpolated between two evaluations; None if never."""
        points = list(zip([0.0, *self.seconds], [0.0, *self.cider], strict=True))
        for (before, low), (after, high) in itertools.pairwise(points):
            if high >= cider:
                return before + (after - before) * (cider - low) / (high - low)
        return None


def watch(captions_per_image: int | str, epochs: int, ranks: int, data: Path, run_dir: Path) -> Curve:
    """Runs launch/finetune.py to its end. Times are taken as the lines of metrics.jsonl appear."""
    options = [f"env.cache_root={data}", f"datasets.flickr8k_caption.captions_per_image={captions_per_image}"]
    options += [f"run.max_epoch={epochs}", "run.val_freq=1", "run.test_splits=[]", "run.log_freq=10"]
    options += [f"run.output_dir={run_dir.parent}", f"run.job_id={run_dir.name}"]
    config = ["--cfg-path", "run_configs/caption_flickr8k_tiny.yaml"]
    log = run_dir.parent / f"{run_dir.name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command(ranks, "launch/finetune.py", *config, "--options", *options),
            cwd=REPOSITORY,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        curve, trained, seen, last = Curve(), 0.0, 0, None
        trained_at: dict[int, float] = {}
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None:
            time.sleep(0.1)
            now = time.perf_counter()
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            for text in lines[seen:]:
                if not text.endswith("\n"):
                    break
                seen += 1
                line = json.loads(text)
                if line["kind"] == "train":
                    trained += now - last if last is not None else 0.0
                    trained_at[line["step"]] = trained
                    last = now
                elif line["kind"] == "save":  # an evaluation ends with one; its scores come later
                    last = now
                else:
                    seconds = trained_at[line["step"]]
                    curve.seconds.append(seconds)
                    curve.cider.append(line["CIDEr"])
                    print(f"  captions_per_image {captions_per_image}: {seconds:.0f} s, CIDEr {line['CIDEr']:.3f}")
    if process.returncode != 0:
        raise RuntimeError(f"the run failed:\n{log.read_text()[-3000:]}")
    return curve


def quality(ranks: int, data: Path, epochs: int) -> list[Row]:
    """`epochs` of the one-caption recipe; the other run has three times as many passes over the photographs.

    Same seed, so the same weights at the start; same images a step, learning rate and schedule, each over its own
    length.
    """
    with tempfile.TemporaryDirectory() as folder:
        one = watch(1, epochs, ranks, data, Path(folder) / "one")
        several = watch("all", 3 * epochs, ranks, data, Path(folder) / "all")
    goal = one.cider[-1]
    reached = several.time_to(goal)
    ratio = None if reached is None else one.seconds[-1] / reached
    return [
        Row(
            "quality",
            f"training time to validation CIDEr {goal:.3f} on Flickr8k (all captions an image)",
            "not reached" if reached is None else f"{reached:.0f} s",
            f"{one.seconds[-1]:.0f} s (1 caption an image, {epochs} epochs)",
            ratio,
            2.5,
            {"one": one.__dict__, "all": several.__dict__},
        )
    ]
