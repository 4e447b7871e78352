"""How sure a difference between two captioners is: the paired bootstrap over images (Efron 1979; Koehn 2004 for BLEU).

A metric is a function of sums over images: of what each image adds. The images are drawn anew, with replacement, many
times, and all captioners are scored on the same draws.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blipds.scoring.metrics import tokenized_captions

RESAMPLES, SEED = 10_000, 0
DRAWN_AT_ONCE = 1 << 22  # images: 64 MB
TAILS = (2.5, 97.5)  # percentiles: the ends of a 95 % interval

Sums = np.ndarray  # (..., what an image adds)
Value = Callable[[Sums, int], np.ndarray]  # of sums over so many images: (...)


def resampled_sums(added: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> Sums:
    """Sums (resamples, S) over images drawn with replacement, of what each adds (images, S).

    How often each image is drawn is counted first, so that the sums are a matrix product: 5,000 images with 60 numbers
    each take 3 s.
    """
    images, sums = len(added), []
    rng, room = np.random.default_rng(seed), max(DRAWN_AT_ONCE // len(added), 1)
    for start in range(0, resamples, room):
        count = min(room, resamples - start)
        drawn = rng.integers(0, images, (count, images)) + images * np.arange(count)[:, None]
        sums.append(np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images) @ added)
    return np.concatenate(sums)


def interval(first: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The 95 % interval, by percentiles, of other - first; values on the same resamples."""
    low, high = np.percentile(other - first, TAILS)
    return float(low), float(high)


def mean(sums: Sums, images: int) -> np.ndarray:
    """Of a metric that is a mean over images: an image adds its own value, (..., 1)."""
    return sums[..., 0] / images


def bleu(n: int) -> Value:
    """BLEU-n as pycocoevalcap computes it, tiny numbers included; an image adds `bleu_counts`, (..., 10)."""

    def value(sums: Sums, images: int) -> np.ndarray:
        length, reference, guessed, correct = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
        precision = np.prod((correct[..., :n] + 1e-15) / (guessed[..., :n] + 1e-9), axis=-1) ** (1 / n)
        ratio = (length + 1e-15) / (reference + 1e-9)
        return precision * np.exp(np.minimum(1 - 1 / ratio, 0))

    return value


def bleu_counts(caption: str, references: Sequence[str]) -> list[int]:
    """Of tokenized texts: length, length of the closest reference, n-grams of the caption, and those in a reference."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    lengths, counts = cook_refs(references)
    found = cook_test(caption, (lengths, counts), eff="closest")
    return [found["testlen"], found["reflen"], *found["guess"], *found["correct"]]


VALUES: dict[str, tuple[str, Value]] = {f"Bleu_{n}": ("bleu_counts", bleu(n)) for n in (1, 2, 3, 4)}


def part_and_value(metric: str) -> tuple[str, Value]:
    """Which of the parts of `image_parts` a metric is a function of, and the function: most are means of their own."""
    return VALUES.get(metric, (metric, mean))


def image_parts(
    captioners: Sequence[Mapping[str, str]], references: Mapping[str, Sequence[str]]
) -> list[dict[str, np.ndarray]]:
    """For each captioner ({image id: caption}): what each image adds to CIDEr, ROUGE-L and BLEU, (images, S).

    All in the order of `references`. METEOR is no sum: its parts are known to Java alone. CIDEr keeps the document
    frequencies of all the images, whichever are drawn. Raises RuntimeError or OSError where Java cannot tokenize.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    ordered = ({image_id: [captions[image_id]] for image_id in references} for captions in captioners)
    known, *tokenized = tokenized_captions(references, *ordered)
    return [
        {
            "CIDEr": Cider().compute_score(known, candidates)[1][:, None],
            "ROUGE_L": Rouge().compute_score(known, candidates)[1][:, None],
            "bleu_counts": np.array([bleu_counts(candidates[key][0], known[key]) for key in known], dtype=float),
        }
        for candidates in tokenized
    ]
