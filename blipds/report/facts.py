"""Facts about a run, for the head of the report."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipds.config.sections import Config
from blipds.report.run_files import Line, of_kind, seconds_spent

Row = tuple[str, str]


@dataclass(frozen=True)
class Facts:
    """Rows of (what, value) under a heading; unknown values have none."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class SplitSize:
    name: str
    images: int
    references: int


def facts(run_dir: Path, config: Config, lines: Sequence[Line], splits: Sequence[SplitSize]) -> list[Facts]:
    """`lines`: of metrics.jsonl. The newest start counts: a run may resume on another machine."""
    start = (of_kind(lines, "start") or [{}])[-1]
    trained = of_kind(lines, "train")
    sections = [
        Facts("Model", model_rows(config, start)),
        Facts("Data", data_rows(config, start, splits)),
        Facts("Training", training_rows(run_dir, config, start, trained) if trained else []),
        Facts("Captions", decoding_rows(config)),
        Facts("Speed", speed_rows(trained, lines)),
        Facts("Machine", machine_rows(start)),
    ]
    return [section for section in sections if section.rows]


def model_rows(config: Config, start: Line) -> list[Row]:
    model = config.model
    rows = [
        ("Architecture", " ".join(filter(None, (model.arch, model.model_type)))),
        ("Image size", f"{model.image_size} x {model.image_size}"),
        ("Image encoder learns", "no" if model.freeze_vit else "yes"),
        *model.facts(),
        ("Initial weights", initial_weights(config)),
    ]
    if "parameters" in start:
        rows.append(("Parameters", f"{start['parameters']:,} trainable, {start['frozen_parameters']:,} frozen"))
    return rows


def initial_weights(config: Config) -> str:
    model = config.model
    if model.load_finetuned and model.finetuned:
        return str(model.finetuned)
    if model.load_pretrained and model.pretrained:
        return str(model.pretrained)
    return "; ".join(f"{part}: {source}" for part, source in model.parts().items()) or "random weights"


def data_rows(config: Config, start: Line, splits: Sequence[SplitSize]) -> list[Row]:
    rows = [("Datasets", ", ".join(config.datasets))]
    if "images" in start:
        rows.append(("Trained on", f"{start['images']:,} images, {start['captions']:,} captions"))
    no_references = "no references" if config.run.report_metric else "not scored (run.report_metric is false)"
    for split in splits:
        references = f"{split.references:,} references" if split.references else no_references
        rows.append((f"Split {split.name}", f"{split.images:,} images, {references}"))
    return rows


def training_rows(run_dir: Path, config: Config, start: Line, trained: Sequence[Line]) -> list[Row]:
    run, ds = config.run, read_json(run_dir / "ds_config.json")
    step, of_steps = trained[-1]["step"], f" of {start['total_steps']:,}" if "total_steps" in start else ""
    epochs = f" of {run.max_epoch}" if run.runner == "runner_base" else ""
    micro, accumulated = run.batch_size_train, run.accum_grad_iters
    warmup = f", {run.warmup_steps:,} steps of warm-up" if run.warmup_steps else ""
    rows = [
        ("Progress", f"step {step:,}{of_steps}, epoch {trained[-1]['epoch'] + 1}{epochs}"),
        ("Learning rate", f"{run.lr_sched} from {run.init_lr:g}{warmup}"),
        ("Weight decay", f"{run.weight_decay:g} on {run.weight_decay_on}"),
    ]
    if "train_batch_size" in ds:
        ranks = ds["train_batch_size"] // (micro * accumulated)
        whole = f"{ds['train_batch_size']:,} samples a step"
        rows.insert(1, ("Batch", f"{micro} x {accumulated} accumulated x {ranks} ranks = {whole}"))
        rows.append(("Engine", f"ZeRO stage {ds.get('zero_optimization', {}).get('stage', 0)}, {precision_of(ds)}"))
    return rows


def precision_of(ds: dict[str, Any]) -> str:
    enabled = [name for name in ("bf16", "fp16") if ds.get(name, {}).get("enabled")]
    return enabled[0] if enabled else "fp32"


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def decoding_rows(config: Config) -> list[Row]:
    run = config.run
    if run.use_nucleus_sampling:
        how = f"nucleus sampling, top_p {run.top_p:g}, temperature {run.temperature:g}"
    else:
        how = f"{run.num_beams} beams" if run.num_beams > 1 else "greedy search"
    return [("Search", how), ("Length", f"{run.min_len} to {run.max_len} tokens, with those of the prompt")]


def speed_rows(trained: Sequence[Line], lines: Sequence[Line]) -> list[Row]:
    rows = []
    for label, key in (("Images", "images_per_s"), ("Captions", "captions_per_s")):
        if found := values_of(trained, key):
            rows.append((label, f"{statistics.median(found):,.1f} a second (the median of training)"))
    if found := values_of(trained, "data_wait"):
        rows.append(("Waited for data", f"{statistics.median(found):.1%} of the time"))
    if found := values_of(trained, "device_memory_gb"):
        rows.append(("Device memory", f"{max(found):.1f} GB at most"))
    seconds = seconds_spent(lines)
    if seconds is not None:
        rows.append(("Time so far", duration(seconds)))
    return rows


def machine_rows(start: Line) -> list[Row]:
    if "device" not in start:
        return []
    machines = start["ranks"] // max(start["ranks_a_machine"], 1)
    on = f" on {machines} machines" if machines > 1 else ""
    memory = f", {start['device_memory_gb']:.0f} GB" if "device_memory_gb" in start else ""
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    return [
        ("Ranks", f"{start['ranks']}{on}"),
        ("Device", f"{'CPU' if start['device'] == 'cpu' else start['device']}{memory}"),
        ("Processor", f"{start['processor']}, {start['cores']} cores"),
        ("Memory", f"{start['memory_gb']:.0f} GB"),
        ("Versions", versions),
    ]


def values_of(lines: Sequence[Line], key: str) -> list[float]:
    return [line[key] for line in lines if line.get(key) is not None]


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
