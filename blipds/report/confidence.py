"""How sure the model was of its captions: words by their probability, and confidence against CIDEr."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from blipds.captioning.confidence import Confidence
from blipds.report.charts import Chart, scatter
from blipds.report.run_files import Evaluation

SHADES = (0.9, 0.7, 0.5, 0.25)  # a word is shaded once for each of these that its probability is below
LEGEND = [(f"{SHADES[0]:.0%} and more", 0), *((f"below {high:.0%}", shade) for shade, high in enumerate(SHADES, 1))]


def percent(log_prob: float) -> str:
    share = math.exp(log_prob)
    return f"{share:.0%}" if share >= 0.01 else "below 1%"


def shaded_words(caption: str, confidence: Confidence) -> list[tuple[str, str, int]]:
    """(word, its probability in percent, shade from 0 to 4); none where the words are not those of the caption."""
    if caption.split() != [word for word, _ in confidence.words]:
        return []
    return [
        (word, percent(log_prob), sum(math.exp(log_prob) < limit for limit in SHADES))
        for word, log_prob in confidence.words
    ]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values sharing the mean of their ranks; None where one has a single value."""
    ranks = [mean_ranks(first), mean_ranks(second)]
    if any(np.ptp(one) == 0 for one in ranks):
        return None
    return float(np.corrcoef(ranks)[0, 1])


def mean_ranks(values: Sequence[float]) -> Any:
    _, places, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def against_cider(evaluation: Evaluation) -> tuple[Chart, str] | None:
    """Every image by its confidence and CIDEr, and a sentence on the rank correlation; None without both of two."""
    cider = evaluation.cider or {}
    ids = [image_id for image_id in evaluation.confidence if image_id in cider]
    if len(ids) < 2:
        return None
    sure = [evaluation.confidence[image_id].mean_log_prob for image_id in ids]
    scores = [cider[image_id] for image_id in ids]
    found = spearman(sure, scores)
    said = "none, since all are equal in one of them" if found is None else f"{found:.2f}"
    sentence = f"Spearman's rank correlation of confidence with CIDEr over {len(ids):,} images: {said}."
    points = list(zip(sure, scores, ids, strict=True))
    return scatter("Confidence and CIDEr", sentence, points, "mean log-probability of a token", "CIDEr"), sentence
