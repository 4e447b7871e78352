"""Puts the report together and writes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blipds.config.run import load_run_config
from blipds.files.replacing import replace_text
from blipds.report.charts import Chart, chart
from blipds.report.confidence import LEGEND, against_cider
from blipds.report.facts import duration, facts
from blipds.report.gallery import BEST, IMAGES, RANDOM, WORST, HeatMap, Shown, cards, choose
from blipds.report.rendering import render
from blipds.report.run_files import (
    Evaluation,
    Line,
    best_of,
    by_split,
    of_kind,
    read_evaluation,
    read_lines,
    seconds_spent,
)
from blipds.scoring.clip import clip_lines
from blipds.scoring.metrics import score_captions
from blipds.scoring.published import CLIP_COLUMNS, COLUMNS

REPORT = "report.html"
METRICS = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "SPICE", *CLIP_COLUMNS)
TITLES = COLUMNS | CLIP_COLUMNS
MINOR_METRICS = ("Bleu_1", "Bleu_2", "Bleu_3")  # on wide screens
CURVES = (
    ("loss", "Training loss", False),
    ("lr", "Learning rate", True),
    ("grad_norm", "Gradient norm", True),
    ("captions_per_s", "Captions a second", True),
    ("reward", "Reward", False),
    ("bad_endings", "Samples with a bad ending", True),
    ("distinct_captions", "Distinct samples an image", True),
    ("entropy", "Entropy, nats a token", True),
)


def write_report(
    run_dir: Path,
    splits: Sequence[Shown],
    say: Callable[[str], None],
    heat_maps: Mapping[str, Mapping[str, Sequence[HeatMap]]] | None = None,
    path: Path | None = None,
) -> bool:
    """Writes `report.html` from the files of the run directory; rank 0 only. False: it could not be written.

    `splits`: where images and references come from; of others the page has numbers alone. `heat_maps`: by
    split and image id. A failure is a line and no more, since the run is worth more than its report.
    """
    target = path or run_dir / REPORT
    try:
        replace_text(target, page(run_dir, splits, heat_maps or {}))
    except Exception as error:  # of any kind: the training run must survive it
        reason = " ".join(str(error).split())[:300]
        say(f"{target} is not written: {type(error).__name__}: {reason}")
        return False
    return True


def page(run_dir: Path, splits: Sequence[Shown], heat_maps: Mapping[str, Mapping[str, Sequence[HeatMap]]]) -> str:
    """The report's HTML."""
    lines = read_lines(run_dir)
    config, _ = load_run_config(run_dir / "config.yaml")
    evaluations = by_split(of_kind(lines, "eval"))
    galleries = [
        gallery_of(shown, evaluation, IMAGES // len(splits), heat_maps.get(shown.split, {}))
        for shown in splits
        if (evaluation := shown_evaluation(run_dir, shown, evaluations.get(shown.split)))
    ]
    return render(
        "page.html",
        "page.js",
        name=run_dir.resolve().name,
        folder=str(run_dir.resolve()),
        tiles=tiles(lines, evaluations),
        charts=charts_of(lines, evaluations),
        weights=weights_of,
        legend=LEGEND,
        tables=[table_of(split, rows) for split, rows in evaluations.items()],
        galleries=galleries,
        examples=next(reversed(of_kind(lines, "examples")), None),
        facts=facts(run_dir, config, lines, splits),
        command=(of_kind(lines, "start") or [{}])[-1].get("command"),
        files=[(name, read_text(run_dir / name)) for name in ("config.yaml", "ds_config.json")],
    )


def read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None


def tiles(lines: Sequence[Line], evaluations: Mapping[str, list[Line]]) -> list[tuple[str, str, str]]:
    """(label, value, what it is about) of the numbers to see first."""
    found = []
    for split, rows in evaluations.items():
        best = best_of(rows)
        if best is not None:
            found.append((f"CIDEr, {split}", f"{best['CIDEr']:.3f}", when(best)))
            found.append((f"BLEU-4, {split}", f"{best['Bleu_4']:.3f}", when(best)))
    trained = of_kind(lines, "train")
    if losses := [line for line in trained if line.get("loss") is not None]:
        found.append(("Training loss", f"{losses[-1]['loss']:.3f}", f"step {losses[-1]['step']:,}"))
    seconds = seconds_spent(lines)
    if seconds is not None:
        found.append(("Time so far", duration(seconds), f"{trained[-1]['step']:,} steps" if trained else ""))
    return found


def when(line: Line) -> str:
    """The epoch, counted from 1; the weights for an evaluation outside of training."""
    return weights_of(line) if line["epoch"] is None else f"epoch {line['epoch'] + 1}"


def charts_of(lines: Sequence[Line], evaluations: Mapping[str, list[Line]]) -> list[Chart]:
    """Metrics, with a line for each split, and curves of training; none for a run that did not train."""
    trained = of_kind(lines, "train")
    if not trained:
        return []
    last_step, epoch_ends = trained[-1]["step"], {line["epoch"] + 1: line["step"] for line in trained}
    best = next(filter(None, map(best_of, evaluations.values())), None)
    drawn = []
    for key in METRICS:
        curves = {split: curve(rows, key) for split, rows in evaluations.items()}
        mark = None if best is None or best.get(key) is None else (best["step"], best[key])
        drawn.append(chart(TITLES[key], curves, last_step, epoch_ends.items(), best=mark, dots=True))
    for key, title, from_zero in CURVES:
        curves = {title: curve(trained, key)}
        drawn.append(chart(title, curves, last_step, epoch_ends.items(), from_zero=from_zero))
    return [one for one in drawn if one is not None]


def curve(lines: Sequence[Line], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def table_of(split: str, rows: list[Line]) -> dict[str, Any]:
    """`columns`: (key, title, whether narrow screens show it). `missing`: {metric: why}, of the newest evaluation."""
    keys = [key for key in (*METRICS, *MINOR_METRICS) if any(row.get(key) is not None for row in rows)]
    return {
        "split": split,
        "columns": [(key, TITLES[key], key in METRICS) for key in keys],
        "rows": rows,
        "best": best_of(rows) if len(rows) > 1 else None,
        "missing": rows[-1].get("missing") or {},
        "notes": notes_of(best_of(rows) or rows[-1]),
    }


def notes_of(line: Line) -> list[str]:
    """How varied the captions of an evaluation are, and how CLIPScore and PAC-S were computed."""
    notes = clip_lines(line.get("settings") or {})
    if line.get("vocabulary") is not None:
        seen = line.get("seen_in_training")
        known = "" if seen is None else f"; {seen:.1%} of the captions stand in the training captions"
        notes.append(
            f"Diversity of {when(line) or 'the captions'}: distinct-1 {line['distinct_1']:.3f}, distinct-2 "
            f"{line['distinct_2']:.3f}, {line['vocabulary']:,} different words, {line['words_per_caption']:.1f} words "
            f"a caption{known}."
        )
    return notes


def weights_of(line: Line) -> str:
    """The note of an evaluation, a path shortened to its last part."""
    what, comma, precision = str(line.get("note") or "").rpartition(", ")
    return f"{Path(what).name}{comma}{precision}"


def gallery_of(
    shown: Shown, evaluation: Evaluation, count: int, heat_maps: Mapping[str, Sequence[HeatMap]]
) -> dict[str, Any]:
    """Cards of one split; `head` says of which evaluation, `choice` how they were chosen."""
    line = evaluation.line
    chosen = choose(list(evaluation.captions), evaluation.cider, count)
    of = "the best evaluation so far" if line.get("agg_metrics") is not None else "the newest evaluation"
    head = f"{when(line)}, {of}" if line["epoch"] is not None else when(line) or of
    return {
        "split": shown.split,
        "head": head[0].upper() + head[1:],
        "choice": choice(list(chosen.values()), len(evaluation.captions)),
        "cards": cards(evaluation, chosen, shown, heat_maps),
        "scored": evaluation.cider is not None,
        "sure": bool(evaluation.confidence),
        "against_cider": against_cider(evaluation),
    }


def shown_evaluation(run_dir: Path, shown: Shown, rows: list[Line] | None) -> Evaluation | None:
    """The best evaluation of a split, the newest if none was scored; None if its captions are missing.

    With the CIDEr of each image, computed here if the run did not keep it.
    """
    found = read_evaluation(run_dir, best_of(rows) or rows[-1]) if rows else None
    if found is None or found.cider is not None or shown.references is None:
        return found
    known = {image_id: caption for image_id, caption in found.captions.items() if shown.references.get(image_id)}
    scores = score_captions(known, {image_id: list(shown.references[image_id]) for image_id in known}, ("CIDEr",))
    return replace(found, cider=scores.per_image_cider or None)


def shown_captions(run_dir: Path, shown: Shown, count: int) -> dict[str, str]:
    """{image id: caption} of `count` images, chosen as for the split's gallery."""
    rows = by_split(of_kind(read_lines(run_dir), "eval")).get(shown.split)
    evaluation = shown_evaluation(run_dir, shown, rows)
    if evaluation is None:
        return {}
    chosen = choose(list(evaluation.captions), evaluation.cider, count)
    return {image_id: evaluation.captions[image_id] for image_id in chosen}


def choice(reasons: list[str], images: int) -> str:
    """How the images of a gallery were chosen, as a sentence."""
    if len(reasons) == images:
        return f"All {images:,} images."
    if WORST not in reasons:
        return f"Of {images:,} images, {len(reasons):,} chosen at random."
    return (
        f"Of {images:,} images: the {reasons.count(WORST):,} with the lowest CIDEr, the {reasons.count(BEST):,} with "
        f"the highest, and {reasons.count(RANDOM):,} of the others, chosen at random."
    )
