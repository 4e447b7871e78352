"""What captions lose before anybody sees it: words cut off, and words that the tokenizer cannot spell."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from blipds.data.processors import CaptionProcessor
from blipds.data.tokenizer import CaptionTokenizer

LOOKED_AT = 2_000  # captions; tokenizing them takes a fraction of a second
WORTH_SAYING = 0.001  # of the words; COCO has a "café" here and there


def cut_lines(captions: Sequence[str], processor: Callable[[str], str], tokenizer: CaptionTokenizer) -> list[str]:
    """How many training captions are cut, a line for each key that cuts some. Looks at `LOOKED_AT` of them at most."""
    sample = evenly_sampled(captions)
    cut = {}
    if isinstance(processor, CaptionProcessor):
        key = f"text_processor.train.max_words={processor.max_words}"
        cut[key] = sum(len(processor.words(caption)) > processor.max_words for caption in sample)
    if sample:
        ids = tokenizer.tokenizer([processor(caption) for caption in sample], verbose=False)["input_ids"]
        key = f"model.max_txt_len={tokenizer.max_txt_len} tokens, the prompt's included"
        cut[key] = sum(len(row) > tokenizer.max_txt_len for row in ids)
    looked = "" if len(sample) == len(captions) else f" looked at (of {len(captions):,})"
    of = f"of {len(sample):,} captions{looked}"
    return [f"{count:,} {of} are longer than {key}, and are cut" for key, count in cut.items() if count]


@dataclass(frozen=True)
class Spelling:
    """`words`: how many were looked at; `changed`: {word: (what the tokenizer makes of it, how often it is there)}."""

    words: int
    changed: dict[str, tuple[str, int]]

    @property
    def share(self) -> float:
        return sum(count for _, count in self.changed.values()) / max(self.words, 1)

    def line(self) -> str:
        """What a person should know; one line."""
        line = f"{self.share:.2%} of {self.words:,} reference words cannot be generated as they are written"
        if not self.changed:
            return line
        word, (written, _) = max(self.changed.items(), key=lambda item: item[1][1])
        return (
            f"{line} (accents, other scripts), so they never match: the tokenizer makes {written[:40]!r} of "
            f"{word[:40]!r}. Perfect captions score CIDEr 1.9 of 10 in Portuguese, 0 in Chinese: see model.tokenizer"
        )


def spelling(captions: Sequence[str], tokenizer: CaptionTokenizer) -> Spelling:
    """Which words of captions (references) come back otherwise from the tokenizer. Looks at `LOOKED_AT` at most.

    Case and punctuation do not count: the metrics take them away from both sides.
    """
    counts = Counter(word for caption in evenly_sampled(captions) for word in words_of(caption))
    if not counts:
        return Spelling(0, {})
    ids = tokenizer.tokenizer(list(counts), add_special_tokens=False, verbose=False)["input_ids"]
    written = tokenizer.tokenizer.batch_decode(ids, skip_special_tokens=True)
    pairs = zip(counts.items(), written, strict=True)
    changed = {word: (text, count) for (word, count), text in pairs if text.strip().lower() != word}
    return Spelling(sum(counts.values()), changed)


def spelling_lines(references: Iterable[Sequence[str]], tokenizer: CaptionTokenizer) -> list[str]:
    """A line about the references of a split, each image's together, where it is worth saying."""
    found = spelling([text for texts in references for text in texts], tokenizer)
    return [found.line()] if found.share > WORTH_SAYING else []


def words_of(caption: str) -> list[str]:
    """Runs of letters, marks and digits, in lower case."""
    text = unicodedata.normalize("NFC", caption.lower())
    return "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text).split()


def evenly_sampled(captions: Sequence[str]) -> Sequence[str]:
    return captions[:: max(-(-len(captions) // LOOKED_AT), 1)]
