"""How varied the captions of a split are, and how many of them the captioner has by heart."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from blipds.config.sections import Config
from blipds.data.processors import CaptionProcessor
from blipds.errors import UserError
from blipds.registry import DATASETS


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """distinct_n: different n-grams / all n-grams (Li et al. 2016, arXiv 1510.03055). vocabulary: different words.

    Words are in lower case, without punctuation. All but the length depend on the number of captions: compare only over
    the same images.
    """
    words = [_words(caption) for caption in captions]
    found = {}
    for n in (1, 2):
        grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        found[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    found["vocabulary"] = len({word for text in words for word in text})
    found["words_per_caption"] = sum(map(len, words)) / max(len(words), 1)
    return found


def _words(caption: str) -> list[str]:
    return CaptionProcessor().words(caption)


@dataclass
class TrainingCaptions:
    """The captions that a run config trains on. They are read when first asked for: COCO's in seconds, 100 MB."""

    config: Config

    @cached_property
    def texts(self) -> frozenset[str]:
        """Their words. Raises UserError where they are not at hand."""
        return frozenset(" ".join(_words(caption)) for caption in self._read())

    def share(self, captions: Sequence[str]) -> float:
        """The share of `captions` that are, word by word, captions that were trained on. Raises as `texts`."""
        return sum(" ".join(_words(caption)) in self.texts for caption in captions) / max(len(captions), 1)

    def _read(self) -> Iterator[str]:
        run = self.config.run
        for name, dataset in self.config.datasets.items():
            for split in run.train_splits:
                try:
                    found = DATASETS[name](dataset, self.config, split, True)
                except OSError as error:
                    raise UserError(f"datasets.{name}: {error}") from error
                for record in found.limited(run.limit_train).records:
                    yield from record.captions
