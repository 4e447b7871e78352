"""From the command to the first optimizer step, through the real launcher."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import Row
from launching import REPOSITORY, command, environment
from tqdm import tqdm

# What a run must do before its first step, on drawn shapes, so that no data is needed
FIRST_STEP = ["run.runner=runner_iter", "run.max_iters=1", "run.log_freq=1", "run.save_last=false", "run.num_workers=1"]


def seconds_to_first_step(ranks: int, run_dir: Path) -> float:
    """Starts launch/finetune.py and waits for the line of its first step; the run is left to end by itself."""
    options = [*FIRST_STEP, "run.valid_splits=[]", "run.test_splits=[]"]
    options += [f"run.output_dir={run_dir.parent}", f"run.job_id={run_dir.name}"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command(ranks, "launch/finetune.py", "--cfg-path", "tests/shapes_tiny.yaml", "--options", *options),
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = None
    metrics = run_dir / "metrics.jsonl"
    while seconds is None and process.poll() is None:
        if metrics.exists() and '"kind": "train"' in metrics.read_text():
            seconds = time.perf_counter() - started
        time.sleep(0.05)
    output, _ = process.communicate()
    if seconds is None or process.returncode != 0:
        raise RuntimeError(f"the run failed (exit status {process.returncode}):\n{output}")
    return seconds


def startup(ranks: int, rounds: int) -> list[Row]:
    """DeepSpeed's ops compiled before: that happens once a machine."""
    subprocess.run([sys.executable, "-m", "blipds.engine"], cwd=REPOSITORY, env=environment(), check=True)
    with tempfile.TemporaryDirectory() as folder:
        seconds = [
            seconds_to_first_step(ranks, Path(folder) / str(number))
            for number in tqdm(range(rounds), desc="start-up", leave=False, disable=None)
        ]
    median = statistics.median(seconds)
    what = f"launch to the end of the first step, {ranks} ranks, tiny, ops compiled"
    return [Row("startup", what, f"{median:.1f} s", "-", None, None, {"seconds": seconds})]
