"""What is in a captioned collection, before an hour of training finds it out: `inspect` looks, `describe` says."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from blipds.data.annotations import Annotations, Record, same_id
from blipds.data.caption_checks import spelling
from blipds.data.processors import CaptionProcessor
from blipds.data.sources import ImageSource
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError

SHOWN = 10  # of a list of problems
BAR_WIDTH = 40


@dataclass(frozen=True)
class Picture:
    """What came of opening an image: its size and a digest of its pixels, or why it cannot be read."""

    size: tuple[int, int] = (0, 0)
    digest: bytes = b""
    error: str | None = None
    missing: bool = False


@dataclass
class Findings:
    """One split. `lengths`: tokens of each caption as training sees it, without the prompt; `unknown`: words with an
    [UNK] in them, and how often; `words`: how many there are in all; `cut_by_words`: captions that `max_words` cuts."""

    name: str
    annotations: Annotations
    pictures: list[Picture]
    max_words: int
    lengths: list[int]
    unknown: Counter[str]
    words: int
    cut_by_words: int
    spelling: str

    @property
    def readable(self) -> list[tuple[Record, Picture]]:
        pairs = zip(self.annotations.records, self.pictures, strict=True)
        return [(record, picture) for record, picture in pairs if picture.error is None]


def inspect(name: str, annotations: Annotations, tokenizer: CaptionTokenizer, max_words: int, workers: int) -> Findings:
    """Opens every image, in `workers` processes, and tokenizes every caption."""
    pictures = look_at_all([record.image for record in annotations.records], name, workers)
    processor = CaptionProcessor(max_words=max_words)
    written = [caption for record in annotations.records for caption in record.captions]
    cut = sum(len(processor.words(caption)) > max_words for caption in written)
    captions = [processor.clean(caption) for caption in written]
    tokens = tokenizer.tokenizer(captions, add_special_tokens=False)["input_ids"] if captions else []
    counts = Counter(word for caption in captions for word in caption.split())
    ids_of_words = tokenizer.tokenizer(list(counts), add_special_tokens=False)["input_ids"] if counts else []
    with_ids = zip(counts.items(), ids_of_words, strict=True)
    return Findings(
        name,
        annotations,
        pictures,
        max_words,
        lengths=list(map(len, tokens)),
        unknown=Counter({word: n for (word, n), ids in with_ids if tokenizer.tokenizer.unk_token_id in ids}),
        words=sum(counts.values()),
        cut_by_words=cut,
        spelling=spelling(written, tokenizer).line(),
    )


def look_at_all(sources: Sequence[ImageSource], name: str, workers: int) -> list[Picture]:
    bar: dict[str, Any] = {"desc": f"images of {name}", "unit": "image", "disable": None}
    if workers <= 1:
        return list(map(look_at, tqdm(sources, **bar)))
    try:
        return process_map(look_at, sources, max_workers=workers, chunksize=16, **bar)
    except BrokenProcessPool as error:
        raise UserError(f"{name}: a process that opened images was killed (out of memory?); try --workers 1") from error


def look_at(source: ImageSource) -> Picture:
    try:
        image = source.open()
    except FileNotFoundError:
        return Picture(error=f"{source}: missing", missing=True)
    except OSError as error:
        line = str(error)
        return Picture(error=line if line.startswith("cannot read") else f"{source}: {line}")
    return Picture(image.size, hashlib.blake2b(image.tobytes(), digest_size=16).digest())


def problems(findings: Findings) -> list[str]:
    """A line for each image that cannot be read, the missing ones first."""
    bad = [picture for picture in findings.pictures if picture.error is not None]
    return [str(picture.error) for picture in sorted(bad, key=lambda picture: not picture.missing)]


def describe(findings: Findings, tokenizer: CaptionTokenizer, max_len: int) -> list[str]:
    """The findings about one split, for a person. `max_len`: of generated captions, in tokens with the prompt."""
    records = findings.annotations.records
    missing = sum(picture.missing for picture in findings.pictures)
    bad = problems(findings)
    twice, alike = same_id(records), same_pixels(findings, findings)
    lines = [
        f"{findings.name}: {', '.join(findings.annotations.kinds)}",
        f"  images      {len(records):,}{sizes(findings.pictures)}",
        f"  captions    {len(findings.lengths):,}; {spread([len(record.captions) for record in records])} an image",
        f"  missing     {missing:,} images",
        f"  unreadable  {len(bad) - missing:,} images",
        *(f"    {line}" for line in shortened(bad)),
        f"  ids         {len(twice):,} images have the id of another",
        *(f"    {image_id}: {first.image} and {other.image}" for image_id, first, other in twice[:SHOWN]),
        f"  pictures    {len(alike):,} images are equal to another, pixel by pixel",
        *(f"    {first} = {other}" for first, other in alike[:SHOWN]),
        *(f"  note        {notice}" for notice in findings.annotations.notices),
    ]
    if findings.lengths:
        lines += ["  tokens in a caption, without the prompt", *histogram(findings.lengths)]
        prompt, longest = len(tokenizer.prompt_ids), tokenizer.max_txt_len
        cut = sum(prompt + length + 1 > longest for length in findings.lengths)
        beyond = sum(prompt + length > max_len for length in findings.lengths)
        often = ", ".join(f"{word[:20]} ({count})" for word, count in findings.unknown.most_common(SHOWN))
        lines += [
            f"  cut         {share(cut, len(findings.lengths))} of the captions, at model.max_txt_len={longest}; "
            f"{share(findings.cut_by_words, len(findings.lengths))}, at max_words={findings.max_words}",
            f"  long        {share(beyond, len(findings.lengths))} have more tokens than run.max_len={max_len} allows",
            f"  vocabulary  {share(sum(findings.unknown.values()), findings.words)} of {findings.words:,} words are "
            f"[UNK]{': ' * bool(often)}{often}",
            f"  spelling    {findings.spelling}",
        ]
    return lines


def sizes(pictures: Iterable[Picture]) -> str:
    found = sorted((picture.size for picture in pictures if picture.error is None), key=lambda size: size[0] * size[1])
    if not found:
        return ""
    first, middle, last = (f"{width}x{height}" for width, height in (found[0], found[len(found) // 2], found[-1]))
    return f", all {first} pixels" if found[0] == found[-1] else f", {first} to {last} pixels, the median {middle}"


def spread(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}, {sum(numbers) / len(numbers):.1f} on average,"


def share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.2%}"


def shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"... and {more:,} more (--problems FILE writes down all)"] if more > 0 else [])]


def histogram(numbers: Sequence[int], step: int = 5) -> list[str]:
    """A line for each `step` numbers; the last one takes what is far out."""
    last = max(sorted(numbers)[-(len(numbers) // 1000) - 1] // step, 1)
    counts = Counter(min(number // step, last) for number in numbers)
    unit = max(counts.values()) / BAR_WIDTH
    lines = []
    for bucket in range(last + 1):
        label = f"{bucket * step}+" if bucket == last else f"{bucket * step}-{bucket * step + step - 1}"
        lines.append(f"    {label:>7}  {counts[bucket]:>9,}  {'#' * round(counts[bucket] / unit)}".rstrip())
    return lines


def same_pixels(first: Findings, second: Findings) -> list[tuple[ImageSource, ImageSource]]:
    """Images that are equal pixel by pixel: one split's among themselves, or of two splits."""
    seen: dict[bytes, ImageSource] = {}
    for record, picture in first.readable:
        seen.setdefault(picture.digest, record.image)
    return [
        (seen[picture.digest], record.image)
        for record, picture in second.readable
        if picture.digest in seen and (first is not second or seen[picture.digest] != record.image)
    ]


def overlap(first: Findings, second: Findings) -> list[str]:
    """What two splits share: images by their pixels, and ids."""
    ids = {str(record.image_id) for record in first.annotations.records}
    both = [str(record.image_id) for record in second.annotations.records if str(record.image_id) in ids]
    shared = same_pixels(first, second)
    line = f"{first.name} and {second.name}: {len(shared):,} images and {len(both):,} ids in both"
    return [
        line,
        *(f"    {one} = {other}" for one, other in shared[:SHOWN]),
        *(f"    id {name}" for name in both[:SHOWN]),
    ]
