"""How sure a model is of a caption: log-probabilities of all of it and of its words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from blipds.data.tokenizer import CaptionTokenizer

DIGITS = 6  # behind the point, in files: more differ between batches of another size


@dataclass(frozen=True)
class Confidence:
    """Natural logarithms of probabilities under the model (models/generation.py says which).

    log_prob: of the caption, the sum over its tokens; the closing token is one of them unless the caption was cut.
    mean_log_prob: a token. words: each with the sum over its own tokens; the closing token belongs to none.
    """

    KEYS: ClassVar = ("log_prob", "mean_log_prob", "words")  # of `fields`

    log_prob: float
    mean_log_prob: float
    words: tuple[tuple[str, float], ...]

    def fields(self) -> dict[str, Any]:
        """As files hold it."""
        return {
            "log_prob": round(self.log_prob, DIGITS),
            "mean_log_prob": round(self.mean_log_prob, DIGITS),
            "words": [[word, round(log_prob, DIGITS)] for word, log_prob in self.words],
        }


class Caption(NamedTuple):
    """`confidence`: None where nobody asked for it, or the model cannot take the text."""

    text: str
    confidence: Confidence | None = None


def confidence_in(tokenizer: CaptionTokenizer, ids: Sequence[int], log_probs: Sequence[float]) -> Confidence:
    """ids: prompt and caption, without the closing token; log_probs: of the tokens behind the prompt, then perhaps of
    the closing token."""
    words, places = tokenizer.words(ids)
    sums = [0.0] * len(words)
    for place, log_prob in zip(places, log_probs, strict=False):
        sums[place] += log_prob
    total = sum(log_probs)
    return Confidence(total, total / len(log_probs), tuple(zip(words, sums, strict=True)))
