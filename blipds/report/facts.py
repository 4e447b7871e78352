"""Facts about a run, for the head of the report."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from blipds.config.deepspeed import precision, zero_stage
from blipds.config.sections import Config
from blipds.report.gallery import Shown
from blipds.report.run_files import Line, of_kind, seconds_spent

Rows = dict[str, str]  # what -> its value


def facts(run_dir: Path, config: Config, lines: Sequence[Line], splits: Sequence[Shown]) -> Mapping[str, Rows]:
    """Rows by heading; what is not known is left out. `lines`: of metrics.jsonl.

    The newest start counts: a run may resume on another machine.
    """
    start, trained = (of_kind(lines, "start") or [{}])[-1], of_kind(lines, "train")
    sections = {
        "Model": model_rows(config, start),
        "Data": data_rows(config, start, splits),
        "Training": training_rows(run_dir, config, start, trained[-1]) if trained else {},
        "Captions": decoding_rows(config),
        "Speed": speed_rows(trained, seconds_spent(lines)),
        "Machine": machine_rows(start) if "device" in start else {},
    }
    return {title: rows for title, rows in sections.items() if rows}


def model_rows(config: Config, start: Line) -> Rows:
    model = config.model
    whole = model.finetuned if model.load_finetuned else model.pretrained if model.load_pretrained else None
    parts = "; ".join(f"{part}: {source}" for part, source in model.parts().items())
    rows = {
        "Architecture": " ".join(filter(None, (model.arch, model.model_type))),
        "Image size": f"{model.image_size} x {model.image_size}",
        "Image encoder learns": "no" if model.freeze_vit else "yes",
        **dict(model.facts()),
        "Initial weights": str(whole or parts or "random weights"),
    }
    if "parameters" in start:
        rows["Parameters"] = f"{start['parameters']:,} trainable, {start['frozen_parameters']:,} frozen"
    return rows


def data_rows(config: Config, start: Line, splits: Sequence[Shown]) -> Rows:
    rows = {"Datasets": ", ".join(config.datasets)}
    if "images" in start:
        rows["Trained on"] = f"{start['images']:,} images, {start['captions']:,} captions"
    none = "no references" if config.run.report_metric else "not scored (run.report_metric is false)"
    for shown in splits:
        references = sum(map(len, (shown.references or {}).values()))
        said = f"{references:,} references" if references else none
        rows[f"Split {shown.split}"] = f"{len(shown.records):,} images, {said}"
    return rows


def training_rows(run_dir: Path, config: Config, start: Line, last: Line) -> Rows:
    run, of_steps = config.run, f" of {start['total_steps']:,}" if "total_steps" in start else ""
    epochs = f" of {run.max_epoch}" if run.runner == "runner_base" else ""
    warmup = f", {run.warmup_steps:,} steps of warm-up" if run.warmup_steps else ""
    rows = {
        "Progress": f"step {last['step']:,}{of_steps}, epoch {last['epoch'] + 1}{epochs}",
        "Objective": run.objective,
        "Learning rate": f"{run.lr_sched} from {run.init_lr:g}{warmup}",
        "Weight decay": f"{run.weight_decay:g} on {run.weight_decay_on}",
    }
    if "reward" in start:
        rows["Reward"] = start["reward"]
    if (path := run_dir / "ds_config.json").exists():
        ds = json.loads(path.read_text(encoding="utf-8"))
        micro, accumulated, batch = run.batch_size_train, run.accum_grad_iters, ds["train_batch_size"]
        ranks = batch // (micro * accumulated)
        rows["Batch"] = f"{micro} x {accumulated} accumulated x {ranks} ranks = {batch:,} samples a step"
        rows["Engine"] = f"ZeRO stage {zero_stage(ds)}, {precision(ds)}"
    return rows


def decoding_rows(config: Config) -> Rows:
    run = config.run
    if run.use_nucleus_sampling:
        how = f"nucleus sampling, top_p {run.top_p:g}, temperature {run.temperature:g}"
    else:
        how = f"{run.num_beams} beams" if run.num_beams > 1 else "greedy search"
    return {"Search": how, "Length": f"{run.min_len} to {run.max_len} tokens, with those of the prompt"}


def speed_rows(trained: Sequence[Line], seconds: float | None) -> Rows:
    keys = ("images_per_s", "captions_per_s", "data_wait", "device_memory_gb")
    values = {key: [line[key] for line in trained if line.get(key) is not None] for key in keys}
    median = {key: statistics.median(found) for key, found in values.items() if found}
    rows = {}
    for label, key in (("Images", "images_per_s"), ("Captions", "captions_per_s")):
        if key in median:
            rows[label] = f"{median[key]:,.1f} a second (the median of training)"
    if "data_wait" in median:
        rows["Waited for data"] = f"{median['data_wait']:.1%} of the time"
    if values["device_memory_gb"]:
        rows["Device memory"] = f"{max(values['device_memory_gb']):.1f} GB at most"
    if seconds is not None:
        rows["Time so far"] = duration(seconds)
    return rows


def machine_rows(start: Line) -> Rows:
    machines = start["ranks"] // max(start["ranks_a_machine"], 1)
    memory = f", {start['device_memory_gb']:.0f} GB" if "device_memory_gb" in start else ""
    return {
        "Ranks": f"{start['ranks']}{f' on {machines} machines' if machines > 1 else ''}",
        "Device": f"{'CPU' if start['device'] == 'cpu' else start['device']}{memory}",
        "Processor": f"{start['processor']}, {start['cores']} cores",
        "Memory": f"{start['memory_gb']:.0f} GB",
        "Versions": ", ".join(f"{name} {version}" for name, version in start["versions"].items()),
    }


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
