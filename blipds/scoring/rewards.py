"""The reward of self-critical training: CIDEr-D and BLEU-4 of drawn captions."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blipds.errors import UserError
from blipds.files.replacing import replace_text
from blipds.scoring.ptb import words

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr-D's Gaussian over differences in length
END = "<END>"  # the end token as a word: PTB words are lower case, so no caption holds it
CACHE_VERSION = 1


@dataclass(frozen=True)
class RewardWeights:
    cider: float = 1.0
    bleu: float = 0.0


class CaptionReward:
    """CIDEr-D (and BLEU-4) of drawn captions with the document frequencies of the training references.

    references: image key -> its captions, raw; they are tokenized anew at each use, which costs less than the memory
    to keep them. cache_root: keeps the frequencies by a hash of the references. end_token: counts the end of a caption
    as a word, in both references and samples. Raises UserError for an image without a reference.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        weights: RewardWeights,
        cache_root: Path | None,
        *,
        end_token: bool = True,
    ) -> None:
        for image, captions in references.items():
            if not captions:
                raise UserError(f"{image}: has no reference caption, so its samples cannot be rewarded")
        self.references, self.weights = references, weights
        self.end = [END] if end_token else []
        self.counting = f"PTB tokens, end token {'counted' if end_token else 'not counted'}"
        frequencies = _kept_frequencies(references, self.end, cache_root)
        log_documents = math.log(len(references)) if references else 0.0
        self.rarity = {gram: log_documents - math.log(count) for gram, count in frequencies.items()}
        self.rarest = log_documents  # of n-grams in one image or none

    def __call__(self, image: str, captions: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The rewards of one image's samples. ended: whether the end token was drawn."""
        if not self.references.get(image):
            raise UserError(f"{image}: has no reference caption, so its samples cannot be rewarded")
        references = [_ngrams(words(text) + self.end) for text in self.references[image]]
        samples = [
            _ngrams(words(text) + (self.end if whole else [])) for text, whole in zip(captions, ended, strict=True)
        ]
        rewards = [0.0] * len(samples)
        if self.weights.cider:
            vectors = [self._vector(reference) for reference in references]
            for number, sample in enumerate(samples):
                rewards[number] += self.weights.cider * _cider(self._vector(sample), vectors)
        if self.weights.bleu:
            for number, sample in enumerate(samples):
                rewards[number] += self.weights.bleu * _bleu(sample, references)
        return rewards

    def _vector(self, ngrams: list[list[str]]) -> "_Vector":
        orders = [
            {gram: count * self.rarity.get(gram, self.rarest) for gram, count in Counter(grams).items()}
            for grams in ngrams
        ]
        norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in orders]
        return _Vector(orders, norms, len(ngrams[1]))


@dataclass
class _Vector:
    orders: list[dict[str, float]]
    norms: list[float]
    length: int  # in bigrams, as in pycocoevalcap


def _ngrams(tokens: list[str]) -> list[list[str]]:
    orders = [tokens]
    for n in range(1, ORDERS):
        orders.append([f"{gram} {word}" for gram, word in zip(orders[-1], tokens[n:], strict=False)])
    return orders


def _cider(sample: _Vector, references: list[_Vector]) -> float:
    total = 0.0
    for reference in references:
        similarity = 0.0
        for ours, theirs, norm, other in zip(
            sample.orders, reference.orders, sample.norms, reference.norms, strict=True
        ):
            product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
            similarity += product / (norm * other) if norm and other else product
        total += similarity * math.exp(-((sample.length - reference.length) ** 2) / (2 * SIGMA**2))
    return 10 * total / ORDERS / len(references)


def _bleu(sample: list[list[str]], references: list[list[list[str]]]) -> float:
    length = len(sample[0])
    closest = min((abs(len(reference[0]) - length), len(reference[0])) for reference in references)[1]
    product = 1.0
    for n, grams in enumerate(sample):
        most: Counter[str] = Counter()
        for reference in references:
            most |= Counter(reference[n])
        correct = (Counter(grams) & most).total()
        product *= (correct + 1e-15) / (len(grams) + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    return product ** (1 / ORDERS) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def _kept_frequencies(references: Mapping[str, Sequence[str]], end: list[str], root: Path | None) -> dict[str, int]:
    if root is None:
        return _count(references.values(), end)
    digest = hashlib.blake2b(repr((CACHE_VERSION, end)).encode(), digest_size=16)
    for captions in references.values():
        digest.update(json.dumps(list(captions)).encode())
    kept = root / "document_frequencies" / f"{digest.hexdigest()}.json"
    with suppress(OSError, ValueError, AttributeError):  # not there yet, or damaged
        return {str(gram): int(count) for gram, count in json.loads(kept.read_text(encoding="utf-8")).items()}
    frequencies = _count(references.values(), end)
    with suppress(OSError):  # without room it is counted anew
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(frequencies))
    return frequencies


def _count(documents: Iterable[Sequence[str]], end: list[str]) -> dict[str, int]:
    """n-gram -> the number of images with it in a reference; those in one image weigh as those in none: left out."""
    counts: Counter[str] = Counter()
    for captions in documents:
        counts.update({gram for text in captions for grams in _ngrams(words(text) + end) for gram in grams})
    return {gram: count for gram, count in counts.items() if count > 1}
