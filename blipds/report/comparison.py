"""`launch/report.py RUN_A RUN_B ...`: runs beside each other on one self-contained page.

The first run is what the others are compared with: the difference of each metric with its 95 % interval, by paired
bootstrap over the images that all runs captioned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from blipds.data.annotations import Record
from blipds.errors import UserError
from blipds.files.replacing import replace_text
from blipds.report.charts import Chart, chart
from blipds.report.gallery import Shown, thumbnail_of
from blipds.report.page import CURVES, METRICS, MINOR_METRICS, TITLES, curve, when
from blipds.report.rendering import render
from blipds.report.run_files import Evaluation, Line, best_of, by_split, of_kind, read_evaluation, read_lines
from blipds.scoring.bootstrap import RESAMPLES, Sums, image_parts, interval, part_and_value, resampled_sums
from blipds.scoring.clip import CLIP_METRICS, clip_lines

COMPARISON = "comparison.html"
IMAGES = 60  # on the page, all splits together: at most 2 MB
DIVERSITY = {
    "distinct_1": ("Distinct-1", "{:.3f}"),
    "distinct_2": ("Distinct-2", "{:.3f}"),
    "vocabulary": ("Different words", "{:,.0f}"),
    "words_per_caption": ("Words a caption", "{:.1f}"),
    "seen_in_training": ("Seen in training", "{:.3f}"),
}
FORMATS = {metric: (TITLES[metric], "{:.3f}") for metric in (*METRICS, *MINOR_METRICS)} | DIVERSITY

Parts = dict[str, np.ndarray]  # of a run: what each image adds to its metrics (scoring/bootstrap.py)


@dataclass(frozen=True)
class Run:
    """`evaluations`: lines of kind "eval" by split."""

    name: str
    folder: Path
    lines: Sequence[Line]
    evaluations: Mapping[str, list[Line]]


@dataclass
class ComparedSplit:
    """The best evaluations of a split, one of each run (the newest, where none was scored).

    `ids`: of the images that all runs captioned; `same`: no run has others. `parts`: of each run, over these images.
    """

    split: str
    lines: list[Line]
    captions: list[dict[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    same: bool = True
    parts: list[Parts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_comparison(run_dirs: Sequence[Path], splits: Sequence[Shown], path: Path) -> None:
    """Writes the page. `splits`: where images and references come from; without a split's the page has its numbers.

    UserError where no split was evaluated in all runs, or the file cannot be written.
    """
    runs = read_runs(run_dirs)
    shown = {one.split: one for one in splits}
    common = [split for split in runs[0].evaluations if all(split in run.evaluations for run in runs)]
    if not common:
        evaluated = "; ".join(f"{run.name}: {', '.join(run.evaluations) or 'none'}" for run in runs)
        raise UserError(f"no split was evaluated in all of these runs ({evaluated})")
    compared = [compare(runs, split, shown.get(split)) for split in common]
    html = render(
        "comparison.html",
        runs=runs,
        charts=charts_of(runs, common),
        tables=[table_of(split, runs) for split in compared],
        galleries=[
            {"split": split.split, "cards": cards, "metric": metric}
            for split in compared
            if (metric := ranking_metric(split))
            and (cards := cards_of(split, metric, runs, shown.get(split.split), IMAGES // len(compared)))
        ],
    )
    try:
        replace_text(path, html)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Runs by the names of their folders, or by their paths, where two have one name."""
    names = [folder.resolve().name for folder in run_dirs]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in run_dirs]
    if len(set(names)) < len(names):
        raise UserError(f"a run is given twice: {', '.join(names)}")
    runs = []
    for name, folder in zip(names, run_dirs, strict=True):
        lines = read_lines(folder)
        runs.append(Run(name, folder, lines, by_split(of_kind(lines, "eval"))))
    return runs


def compare(runs: Sequence[Run], split: str, shown: Shown | None) -> ComparedSplit:
    lines = [best_of(run.evaluations[split]) or run.evaluations[split][-1] for run in runs]
    compared = ComparedSplit(split, lines)
    found = [read_evaluation(run.folder, line) for run, line in zip(runs, lines, strict=True)]
    evaluations = [evaluation for evaluation in found if evaluation is not None]
    if len(evaluations) < len(runs):
        compared.notes.append("The captions of a run are no longer there, so there are no intervals.")
        return compared
    compared.captions = [evaluation.captions for evaluation in evaluations]
    compared.ids = [key for key in compared.captions[0] if all(key in captions for captions in compared.captions)]
    most = max(map(len, compared.captions))
    compared.same = len(compared.ids) == most
    if not compared.same:
        compared.notes.append(
            f"Over the {len(compared.ids):,} images that all runs captioned, of {most:,}. What is no sum over images "
            "(METEOR, diversity) is left out."
        )
    if compared.ids:
        compared.parts = parts_of(compared, evaluations, (shown and shown.references) or {})
    return compared


def parts_of(
    compared: ComparedSplit, evaluations: Sequence[Evaluation], references: Mapping[str, Sequence[str]]
) -> list[Parts]:
    """What each image adds to each metric: computed from the references, else what the runs kept of each image."""
    parts: list[Parts] = [{} for _ in evaluations]
    if all(references.get(image_id) for image_id in compared.ids):
        try:
            parts = image_parts(compared.captions, {image_id: references[image_id] for image_id in compared.ids})
        except (OSError, RuntimeError) as error:
            compared.notes.append(f"BLEU and ROUGE-L have no interval: {error}")
    for part, evaluation in zip(parts, evaluations, strict=True):
        kept = evaluation.clip.per_image | ({"CIDEr": evaluation.cider} if evaluation.cider else {})
        for metric, values in kept.items():
            if metric not in part and all(image_id in values for image_id in compared.ids):
                part[metric] = np.array([[values[image_id]] for image_id in compared.ids])
    known = set.intersection(*map(set, parts))
    return [{metric: added for metric, added in part.items() if metric in known} for part in parts]


def table_of(compared: ComparedSplit, runs: Sequence[Run]) -> dict[str, Any]:
    """Rows: {title, cells: a cell for each run}. `uncertain`: titles of the metrics without an interval."""
    images = len(compared.ids)
    known = set(compared.parts[0]) if compared.parts else set()
    sums = resampled(compared.parts)
    rows, uncertain = [], []
    for metric, (title, form) in FORMATS.items():
        part, value = part_and_value(metric)
        numbers = [line.get(metric) for line in compared.lines]
        ends: list[tuple[float, float]] = []
        if part in known:
            values = [float(value(parts[part].sum(0), images)) for parts in compared.parts]
            draws = [value(run[part], images) for run in sums]
            ends += [interval(draws[0], other) for other in draws[1:]]
        elif compared.same and None not in numbers:
            values = [float(number) for number in numbers if number is not None]
            uncertain.append(title)
        else:
            continue
        cells = [cell(form, of, of - values[0], end) for of, end in zip_longest(values[1:], ends)]
        rows.append({"title": title, "cells": [{"value": form.format(values[0])}, *cells]})
    return {
        "split": compared.split,
        "images": images,
        "rows": rows,
        "evaluations": [when(line) or "newest" for line in compared.lines],
        "notes": [*compared.notes, *clip_notes(compared, runs)],
        "uncertain": uncertain,
        "resamples": RESAMPLES if known else 0,
    }


def clip_notes(compared: ComparedSplit, runs: Sequence[Run]) -> list[str]:
    """How each run's CLIPScore and PAC-S were computed, and a warning where that was not by one CLIP."""
    settings = [line.get("settings") or {} for line in compared.lines]
    notes = [f"{run.name}: {line}" for run, found in zip(runs, settings, strict=True) for line in clip_lines(found)]
    for metric in CLIP_METRICS:
        if len({found[metric]["model"] for found in settings if metric in found}) > 1:
            notes.append(f"The {metric} of these runs cannot be compared: it is by different CLIPs.")
    return notes


def resampled(runs: Sequence[Parts]) -> list[dict[str, Sums]]:
    """Sums of each part of each run over the same draws of images."""
    flat = [(number, name, added) for number, parts in enumerate(runs) for name, added in parts.items()]
    found: list[dict[str, Sums]] = [{} for _ in runs]
    if flat:
        ends = np.cumsum([added.shape[1] for _, _, added in flat])[:-1]
        whole = resampled_sums(np.hstack([added for _, _, added in flat]))
        for (number, name, _), sums in zip(flat, np.split(whole, ends, axis=1), strict=True):
            found[number][name] = sums
    return found


def cell(form: str, value: float, difference: float, ends: tuple[float, float] | None) -> dict[str, str]:
    """`verdict`: "better" or "worse" where the interval leaves out 0, else ""."""
    found = {"value": form.format(value), "difference": signed(form, difference), "interval": "", "verdict": ""}
    if ends is not None:
        found["interval"] = f"{signed(form, ends[0])} to {signed(form, ends[1])}"
        found["verdict"] = "better" if ends[0] > 0 else "worse" if ends[1] < 0 else ""
    return found


def signed(form: str, number: float) -> str:
    """+0.012; a 0 has no sign."""
    text = form.replace(":", ":+").format(number)
    return text if any(digit in text for digit in "123456789") else text[1:]


def ranking_metric(compared: ComparedSplit) -> str | None:
    """By which images differ."""
    known = compared.parts[0] if compared.parts else {}
    return next((metric for metric in ("CIDEr", "CLIPScore", "PAC-S") if metric in known), None)


def cards_of(
    compared: ComparedSplit, metric: str, runs: Sequence[Run], shown: Shown | None, count: int
) -> list[dict[str, Any]]:
    """The images whose scores differ most between the runs, the largest difference first."""
    records: dict[str, Record] = {str(record.image_id): record for record in shown.records} if shown else {}
    scores = np.hstack([parts[metric] for parts in compared.parts])  # (images, runs)
    spread = scores.max(1) - scores.min(1)
    found = []
    for place in np.argsort(-spread, kind="stable")[:count]:
        image_id = compared.ids[place]
        if spread[place] == 0 or image_id not in records:
            continue
        thumbnail, size = thumbnail_of(records[image_id])
        best = scores[place].max()
        found.append(
            {
                "image_id": image_id,
                "source": str(records[image_id].image),
                "thumbnail": thumbnail,
                "size": size,
                "references": ((shown and shown.references) or {}).get(image_id, ()),
                "captions": [
                    (run.name, captions[image_id], f"{score:.3f}", "best" if score == best else "")
                    for run, captions, score in zip(runs, compared.captions, scores[place], strict=True)
                ],
            }
        )
    return found


def charts_of(runs: Sequence[Run], splits: Sequence[str]) -> list[Chart]:
    """A line for each run: metrics of each split, then curves of training. None of runs that did not train."""
    trained = {run.name: of_kind(run.lines, "train") for run in runs}
    last_step = max((lines[-1]["step"] for lines in trained.values() if lines), default=0)
    if not last_step:
        return []
    drawn = []
    for split in splits:
        for key in METRICS:
            curves = {run.name: curve(run.evaluations[split], key) for run in runs if trained[run.name]}
            title = TITLES[key] if len(splits) == 1 else f"{TITLES[key]}, {split}"
            drawn.append(chart(title, curves, last_step, dots=True))
    for key, title, from_zero in CURVES:
        curves = {name: curve(lines, key) for name, lines in trained.items()}
        drawn.append(chart(title, curves, last_step, from_zero=from_zero))
    return [one for one in drawn if one is not None]
