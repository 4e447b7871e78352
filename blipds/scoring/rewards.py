"""The reward of self-critical training: how much drawn captions agree with an image's references."""

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
SIGMA = 6.0  # of CIDEr-D's Gaussian over differences in length, in words
END = "<END>"  # the end token as a word: words are lower case, so no caption holds it
CACHE_VERSION = 1


@dataclass(frozen=True)
class RewardWeights:
    cider: float = 1.0
    bleu: float = 0.0


class CaptionReward:
    """CIDEr-D (and BLEU-4) of drawn captions with the document frequencies of the training references.

    Equal to pycocoevalcap's values for each caption: CIDEr-D of Vedantam et al. 2015, up to 10, and sentence BLEU-4 of
    Papineni et al. 2002, up to 1. The frequencies are counted once: a document is all references of an image.

    references: image key -> its captions. They are read and tokenized again at each use: 30 us a caption, where keeping
    their vectors takes 5 KB. cache_root: keeps the frequencies in its folder `document_frequencies`, by a hash of the
    captions. end_token: counts the end of a caption as a word, in references and samples alike; without it unfinished
    captions are rewarded (arXiv 2305.12254). counting: says how words are counted. Raises UserError for an image
    without a reference.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        weights: RewardWeights,
        cache_root: Path | None,
        *,
        end_token: bool = True,
    ) -> None:
        if bare := [image for image, captions in references.items() if not captions]:
            raise _without_references(bare[0])
        self.references, self.weights = references, weights
        self.end = [END] if end_token else []
        self.counting = f"PTB tokens, end token {'counted' if end_token else 'not counted'}"
        # log(images / images with the n-gram); the same for n-grams of one image and of none, as in pycocoevalcap
        self.rarest = math.log(max(1, len(references)))
        frequencies = _frequencies(references, self.end, cache_root)
        weight_of = {count: self.rarest - math.log(count) for count in set(frequencies.values())}
        self.rarity = {gram: weight_of[count] for gram, count in frequencies.items()}

    def __call__(self, image: str, captions: Sequence[str], ended: Sequence[bool]) -> list[float]:
        """The rewards of one image's samples. ended: the end token was drawn.

        About 90 us a sample at five samples and five references, 140 us with BLEU-4.
        """
        if not self.references.get(image):
            raise _without_references(image)
        references = [_ngrams(words(text) + self.end) for text in self.references[image]]
        samples = [
            _ngrams(words(text) + self.end if whole else words(text))
            for text, whole in zip(captions, ended, strict=True)
        ]
        rewards = [0.0] * len(samples)
        for weight, score in ((self.weights.cider, self._cider), (self.weights.bleu, _bleu)):
            if weight:
                scores = score(samples, references)
                rewards = [reward + weight * value for reward, value in zip(rewards, scores, strict=True)]
        return rewards

    def _cider(self, samples: "list[_Ngrams]", references: "list[_Ngrams]") -> list[float]:
        # n-gram -> for each reference with it: its number, the n-gram's weight, the weight over the reference's norm
        known: dict[str, list[tuple[int, float, float]]] = {}
        for number, reference in enumerate(references):
            for grams in reference:
                vector, norm = self._vector(grams)
                for gram, weight in vector.items():
                    if weight:
                        known.setdefault(gram, []).append((number, weight, weight / norm))
        scores = []
        for sample in samples:
            similarities = [0.0] * len(references)
            for grams in sample:
                vector, norm = self._vector(grams)
                for gram, weight in vector.items():
                    for number, theirs, scaled in known.get(gram, ()):
                        similarities[number] += min(weight, theirs) * scaled / norm
            for number, reference in enumerate(references):
                longer = len(sample[0]) - len(reference[0])
                similarities[number] *= math.exp(-(longer**2) / (2 * SIGMA**2))
            scores.append(10 * sum(similarities) / ORDERS / len(references))
        return scores

    def _vector(self, grams: list[str]) -> tuple[dict[str, float], float]:
        """The weights of n-grams of one order, and their norm."""
        rarity, rarest = self.rarity, self.rarest
        vector: dict[str, float] = {}
        for gram in grams:
            vector[gram] = vector.get(gram, 0.0) + rarity.get(gram, rarest)
        return vector, math.hypot(*vector.values())


_Ngrams = list[list[str]]  # of a caption, by order: words first


def _ngrams(caption: list[str]) -> _Ngrams:
    orders = [caption]
    for n in range(1, ORDERS):
        orders.append([f"{gram} {word}" for gram, word in zip(orders[-1], caption[n:], strict=False)])
    return orders


def _bleu(samples: list[_Ngrams], references: list[_Ngrams]) -> list[float]:
    """With pycocoevalcap's smoothing; the reference nearest in length decides, of two as near the shorter."""
    most: dict[str, int] = {}  # of each n-gram in the reference that has it most often
    for reference in references:
        for grams in reference:
            for gram, count in Counter(grams).items():
                most[gram] = max(count, most.get(gram, 0))
    scores = []
    for sample in samples:
        product = 1.0
        for grams in sample:
            correct = sum([min(count, most.get(gram, 0)) for gram, count in Counter(grams).items()])
            product *= (correct + 1e-15) / (len(grams) + 1e-9)
        length = len(sample[0])
        closest = min([(abs(len(reference[0]) - length), len(reference[0])) for reference in references])[1]
        ratio = (length + 1e-15) / (closest + 1e-9)
        scores.append(product ** (1 / ORDERS) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
    return scores


def _without_references(image: str) -> UserError:
    return UserError(f"{image}: no reference caption, which self-critical training needs to reward its samples")


def _frequencies(references: Mapping[str, Sequence[str]], end: list[str], cache_root: Path | None) -> dict[str, int]:
    """`_count`, kept below `cache_root` under a hash of the captions."""
    if cache_root is None:
        return _count(references.values(), end)
    digest = hashlib.blake2b(repr((CACHE_VERSION, end)).encode(), digest_size=16)
    for captions in references.values():
        digest.update(json.dumps(list(captions)).encode())
    kept = cache_root / "document_frequencies" / f"{digest.hexdigest()}.json"
    with suppress(OSError, ValueError):  # not there yet, or damaged
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    frequencies = _count(references.values(), end)
    with suppress(OSError):  # without room they are counted again
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(frequencies))
    return frequencies


def _count(documents: Iterable[Sequence[str]], end: list[str]) -> dict[str, int]:
    """n-gram -> the images that have it in a reference, for n-grams of several images: those of one weigh as unseen."""
    counts: Counter[str] = Counter()
    for captions in documents:
        counts.update({gram for text in captions for grams in _ngrams(words(text) + end) for gram in grams})
    return {gram: count for gram, count in counts.items() if count > 1}
