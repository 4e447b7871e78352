"""Training runs on this device through the launcher, against the same runs on the CPU.

Differences that are allowed: in fp32 without TF32 the devices add in other orders, 1e-7 a product, and some steps of
training make more of it (tests/engine allows its stages 1e-4, too). bf16 rounds weights and activations to 2^-8, fp16
to 2^-11; both are held against the CPU's fp32.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import Row
from launching import command

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "tests/shapes_tiny.yaml"
ALLOWED = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 5e-3}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}


def spec(name: str, stage: int, held: str, steps: int, **more: Any) -> dict[str, Any]:
    """A setting for tests/engine/grid.py: without dropout, so that devices draw nothing."""
    options = [
        *("datasets.shapes_caption.num_images.train=256", "datasets.shapes_caption.captions_per_image=all"),
        *("model.med_config_path=tests/engine/no_dropout.json", "run.batch_size_train=16", "run.num_workers=0"),
        *("run.runner=runner_iter", f"run.max_iters={steps}", "run.log_freq=1", "run.valid_splits=[]"),
        *(
            "run.warmup_steps=0",
            "run.max_grad_norm=0.5",
            "run.save_freq=99",
            f"run.save_last={str('until' in more).lower()}",
        ),
    ]
    precisions: dict[str, Any] = {key: {"enabled": key == held} for key in ("bf16", "fp16")}
    precisions["fp16"] |= {"initial_scale_power": more.pop("scale_power", 6)}  # small: no overflow of its own
    ds = {"zero_optimization": {"stage": stage, **more.pop("zero", {})}, **precisions, "steps_per_print": 10**9}
    if more.pop("torch_adam", False):
        ds["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    return {"name": name, "cfg": CONFIG, "options": options, "ds": ds, **more}


def start_grid(folder: Path, name: str, specs: list[dict], environment: dict[str, str]) -> subprocess.Popen:
    """On one rank, through DeepSpeed's launcher; the output is in `<name>.log`."""
    (folder / f"{name}.json").write_text(json.dumps(specs))
    typed = command(1, "tests/engine/grid.py", folder / f"{name}.json", folder / f"{name}_results.json", launcher=True)
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(typed, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def results(process: subprocess.Popen, folder: Path, name: str) -> dict[str, dict]:
    if process.wait() != 0:
        raise RuntimeError(f"{name} failed: {(folder / f'{name}.log').read_text()[-3000:]}")
    return json.loads((folder / f"{name}_results.json").read_text())


def compared(name: str, losses: list[float], expected: list[float], allowed: float) -> Row:
    differences = [abs(mine / theirs - 1) for mine, theirs in zip(losses, expected, strict=True)]
    details = {"losses": losses, "expected": expected, "good": max(differences) <= allowed}
    what = f"largest difference of {len(losses)} losses, {name}"
    return Row("training", what, f"{max(differences):.1e}", f"{allowed:.0e} allowed", None, None, details)


def rows(device: torch.device, folder: Path, dry: bool) -> Iterator[Row]:
    steps = 4 if dry else 20
    environment = dict(os.environ)
    # few threads: the other runs start meanwhile, and want the cores, too
    on_cpu = environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4"}
    cpu = start_grid(folder, "cpu", [spec("cpu", 0, "fp32", steps, torch_adam=True)], on_cpu)  # nothing to compile
    if not dry:  # minutes on busy cores
        yield compile_adam(environment)
    kinds = [(stage, held) for stage in range(4) for held in ("fp32", "bf16", "fp16")]
    if dry:
        kinds = [(0, "fp32"), (2, "bf16"), (3, "fp32")]
    specs = [spec(f"zero{stage} {held}", stage, held, steps, torch_adam=dry) for stage, held in kinds]
    run_dir = str(folder / "resumed")
    specs += [
        spec("first half", 2, "bf16", steps, run_dir=run_dir, until=steps // 2, torch_adam=dry),
        spec("resumed", 2, "bf16", steps, run_dir=run_dir, resume=run_dir, torch_adam=dry),
    ]
    if not dry or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        specs.append(spec("overflow", 2, "fp16", steps + 20, scale_power=30, torch_adam=dry))
    kinds_offloaded = [2] if dry else [2, 3]
    offloaded = [
        spec(f"zero{stage} bf16, offloaded", stage, "bf16", steps, zero=OFFLOAD, torch_adam=dry)
        for stage in kinds_offloaded
    ]
    grid = start_grid(folder, "grid", specs, environment)  # all side by side: each leaves the device idle for long
    offload = start_grid(folder, "offload", offloaded, environment)
    yield from through_the_launcher(folder, environment, dry)
    expected = results(cpu, folder, "cpu")["cpu"]["losses"]
    found = results(grid, folder, "grid")
    for stage, held in kinds:
        yield compared(f"zero{stage} {held}", found[f"zero{stage} {held}"]["losses"], expected, ALLOWED[held])
    resumed = found["resumed"]["losses"]
    yield compared("resumed, zero2 bf16", resumed, found["zero2 bf16"]["losses"][-len(resumed) :], 1e-4)
    if "overflow" in found:
        yield overflow(found["overflow"]["losses"])
    for name, result in results(offload, folder, "offload").items():
        yield compared(name, result["losses"], expected, ALLOWED["bf16"])


def compile_adam(environment: dict[str, str]) -> Row:
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "blipds.engine"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    seconds = time.perf_counter() - started
    good = process.returncode == 0 and "cannot be compiled" not in process.stdout
    details = {"output": process.stdout[-2000:], "good": good}
    return Row(
        "training", "DeepSpeed's Adam compiles", "yes" if good else "no", f"{seconds:.0f} s", None, None, details
    )


def overflow(losses: list[float | None]) -> Row:
    """A loss scale of 2^30 overflows: steps are skipped, their lines have no loss, until it is low enough."""
    skipped = losses.index(next(loss for loss in losses if loss is not None))
    trained = [loss for loss in losses[skipped:] if loss is not None]
    good = skipped > 0 and len(trained) >= 3 and trained[-1] < trained[0]
    what = "fp16 from a loss scale of 2^30 back to training"
    said = f"{skipped} steps skipped, loss {trained[0]:.2f} to {trained[-1]:.2f}"
    return Row("training", what, said, "-", None, None, {"losses": losses, "good": good})


def through_the_launcher(folder: Path, environment: dict[str, str], dry: bool) -> Iterator[Row]:
    """launch/finetune.py as a person types it: Ctrl-C after the first log line, --resume auto, captions at the end."""
    images = "{train: 400, val: 16, test: 8}"
    options = [
        *(f"datasets.shapes_caption.num_images={images}", "run.batch_size_train=8", "run.num_workers=2"),
        *("run.report_metric=false", "run.log_freq=2", f"run.output_dir={folder}", "run.job_id=typed"),
        *("run.max_epoch=1", f"run.limit_train={160 if dry else 400}", "run.test_splits=[]"),
    ]
    ds = {"zero_optimization": {"stage": 2}}
    if dry:
        ds["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}
    (folder / "typed_ds.json").write_text(json.dumps(ds))
    configs = ["--cfg-path", CONFIG, "--ds-config", folder / "typed_ds.json"]
    typed = command(1, "launch/finetune.py", *configs, "--resume", "auto", "--options", *options, launcher=True)
    run_dir, log = folder / "typed", (folder / "typed.log").open("w")
    how = {"cwd": REPOSITORY, "env": environment, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(typed, **how)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the launcher, which sends SIGTERM, and its ranks
    process.wait()
    said = (folder / "typed.log").read_text()
    good = "stopped by SIG" in said and (run_dir / "checkpoints" / "latest").exists()
    yield Row(
        "training", "Ctrl-C ends with a checkpoint", str(good), "-", None, None, {"good": good, "said": said[-900:]}
    )
    finished = subprocess.run(typed, **how).returncode == 0
    captions = run_dir / "results" / "val_epoch0.json"
    count = len(json.loads(captions.read_text())) if captions.exists() else 0
    details = {"good": finished and count == 16, "said": (folder / "typed.log").read_text()[-900:]}
    yield Row("training", "resumed to the end; captions of the validation", f"{count}", "16", None, None, details)
    log.close()
