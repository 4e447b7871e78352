"""What a run directory holds, as the report reads it. Incomplete lines, as a crash leaves them, are skipped."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from blipds.captioning.confidence import Caption, Confidence
from blipds.files.replacing import replace_text
from blipds.scoring.clip import ClipScores

Line = dict[str, Any]  # of metrics.jsonl


@dataclass(frozen=True)
class Evaluation:
    """A line of kind "eval", and by image id the captions that it is about, in the order of the dataset.

    `cider`: of each image; None where it was not kept. `clip`: what CLIPs said of each. `confidence`: the model's in
    these captions, where it was kept.
    """

    line: Line
    captions: dict[str, str]
    cider: dict[str, float] | None
    clip: ClipScores = field(default_factory=ClipScores)
    confidence: dict[str, Confidence] = field(default_factory=dict)


def read_lines(run_dir: Path) -> list[Line]:
    """The lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "kind" in line:
            lines.append(line)
    return lines


def of_kind(lines: Iterable[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def by_split(evaluations: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines of kind "eval" of each split, in order; of repeated evaluations the last."""
    splits: dict[str, dict[tuple[Any, ...], Line]] = {}
    for line in evaluations:
        splits.setdefault(line["split"], {})[line["step"], line["epoch"], line.get("note")] = line
    return {split: list(lines.values()) for split, lines in splits.items()}


def best_of(evaluations: list[Line]) -> Line | None:
    """The first with the highest agg_metrics, as for the best checkpoint; None if nothing was scored."""
    scored = [line for line in evaluations if line.get("agg_metrics") is not None]
    return max(scored, key=lambda line: line["agg_metrics"], default=None)


def seconds_spent(lines: Iterable[Line]) -> float | None:
    """From each start of the run to its last line, added up; None if its lines have no times."""
    timed = [line for line in lines if "time" in line]
    spent = (later["time"] - earlier["time"] for earlier, later in pairwise(timed) if later["kind"] != "start")
    return sum(spent) if timed else None


def read_evaluation(run_dir: Path, line: Line) -> Evaluation | None:
    """None if the captions of the line are missing."""
    split, step, epoch = line["split"], line["step"], line["epoch"]
    for name in (f"{split}_step{step}", f"{split}_epoch{epoch}", split):
        results = run_dir / "results" / f"{name}.json"
        if results.exists():
            entries = json.loads(results.read_text(encoding="utf-8"))
            captions = {str(entry["image_id"]): str(entry["caption"]) for entry in entries}
            confidence = read_confidence(results, captions)
            return Evaluation(line, captions, read_cider(results), read_clip(results), confidence)
    return None


def cider_path(results: Path) -> Path:
    """<run>/results/val_epoch0.json -> <run>/scores/val_epoch0.json"""
    return results.parent.parent / "scores" / results.name


def confidence_path(results: Path) -> Path:
    """<run>/results/val_epoch0.json -> <run>/confidence/val_epoch0.json"""
    return results.parent.parent / "confidence" / results.name


def write_cider(results: Path, per_image: Mapping[str, float]) -> None:
    """Keeps the CIDEr of each image beside the captions in `results`, as [{image_id, CIDEr}]."""
    path = cider_path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"image_id": image_id, "CIDEr": value} for image_id, value in per_image.items()]
    replace_text(path, json.dumps(entries, ensure_ascii=False, indent=0))


def read_cider(results: Path) -> dict[str, float] | None:
    path = cider_path(results)
    if not path.exists():
        return None
    return {str(entry["image_id"]): float(entry["CIDEr"]) for entry in json.loads(path.read_text(encoding="utf-8"))}


def clip_path(results: Path) -> Path:
    """<run>/results/val_epoch0.json -> <run>/scores/val_epoch0.clip.json"""
    return cider_path(results).with_suffix(".clip.json")


def write_clip(results: Path, scores: ClipScores) -> None:
    """Keeps CLIPScore and PAC-S of each image, and their settings, beside the captions in `results`."""
    path = clip_path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(scores), ensure_ascii=False, indent=0))


def read_clip(results: Path) -> ClipScores:
    """Empty ones where none were kept."""
    path = clip_path(results)
    return ClipScores(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ClipScores()


def write_confidence(results: Path, captions: Mapping[str | int, Caption]) -> None:
    """Keeps the model's confidence in the captions, by image id, that `results` gets: an image a line.

    [{image_id, caption, log_prob, mean_log_prob, words: [[word, log_prob]]}]. A file of its own, since servers take
    `results` as they are, and other batches give other last digits.
    """
    path = confidence_path(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"image_id": image_id, "caption": text, **confidence.fields()}, ensure_ascii=False)
        for image_id, (text, confidence) in captions.items()
        if confidence is not None
    ]
    replace_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_confidence(results: Path, captions: Mapping[str, str]) -> dict[str, Confidence]:
    """By image id, of the images whose caption in `captions` is the one that was written about."""
    path = confidence_path(results)
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {
        str(entry["image_id"]): Confidence(
            entry["log_prob"], entry["mean_log_prob"], tuple((word, log_prob) for word, log_prob in entry["words"])
        )
        for entry in entries
        if captions.get(str(entry["image_id"])) == entry["caption"]
    }
