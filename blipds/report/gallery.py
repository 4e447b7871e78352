"""The gallery of captioned images: chosen, and small enough to embed in the page."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from blipds.data.annotations import Record
from blipds.report.run_files import Evaluation

IMAGES = 240  # in a report, all splits together: with the limit below at most 8 MB
THUMBNAIL = 384  # longest side in pixels
THUMBNAIL_BYTES = 25_000  # of a JPEG; base64 adds a third
QUALITIES = (80, 65, 50, 35, 20)  # the first that is small enough

WORST, BEST, RANDOM = "worst", "best", "random"


@dataclass(frozen=True)
class HeatMap:
    """Where the decoder looked when it chose a word: weights (rows, columns) over the whole image, from 0 to 1."""

    word: str
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Word:
    text: str
    overlay: str  # data URI of a picture to show on top of the image


@dataclass(frozen=True)
class Card:
    """One image of the gallery. `place`: in the dataset, from 0. `thumbnail`: a data URI, None: it cannot be read."""

    place: int
    image_id: str
    source: str
    caption: str
    references: tuple[str, ...]
    cider: float | None
    chosen_as: str
    thumbnail: str | None
    size: tuple[int, int] = (4, 3)
    words: list[Word] = field(default_factory=list)


def choose(ids: Sequence[str], cider: Mapping[str, float] | None, count: int) -> dict[str, str]:
    """{image id: why it was chosen} of at most `count` images: the worst third, the best third, the rest at random.

    A hash of the id stands for a random number: each evaluation chooses the same images, and a smaller choice is part
    of a larger one. Without scores all are chosen at random. In the order of `ids`.
    """
    chosen: dict[str, str] = {}
    if cider is not None:
        ranked = sorted((image_id for image_id in ids if image_id in cider), key=lambda image_id: cider[image_id])
        third = min(count, len(ranked)) // 3
        chosen |= dict.fromkeys(ranked[:third], WORST)
        chosen |= dict.fromkeys(ranked[len(ranked) - third :], BEST)
    rest = sorted((image_id for image_id in ids if image_id not in chosen), key=random_key)
    chosen |= dict.fromkeys(rest[: count - len(chosen)], RANDOM)
    return {image_id: chosen[image_id] for image_id in ids if image_id in chosen}


def random_key(image_id: str) -> bytes:
    return hashlib.blake2b(image_id.encode(errors="replace"), digest_size=8).digest()


def cards(
    evaluation: Evaluation,
    chosen: Mapping[str, str],
    records: Mapping[str, Record],
    references: Mapping[str, Sequence[str]],
    heat_maps: Mapping[str, Sequence[HeatMap]],
) -> list[Card]:
    """The chosen images of an evaluation, in the order of the dataset; `records` and all else by image id."""
    found = []
    for place, (image_id, caption) in enumerate(evaluation.captions):
        if image_id not in chosen or image_id not in records:
            continue
        thumbnail, size = thumbnail_of(records[image_id])
        found.append(
            Card(
                place,
                image_id,
                str(records[image_id].image),
                caption,
                tuple(references.get(image_id, ())),
                None if evaluation.cider is None else evaluation.cider.get(image_id),
                chosen[image_id],
                thumbnail,
                size,
                [Word(heat.word, overlay(heat, size)) for heat in heat_maps.get(image_id, ())],
            )
        )
    return found


def thumbnail_of(record: Record) -> tuple[str | None, tuple[int, int]]:
    """(data URI, size) of an image; (None, ...) where it cannot be read."""
    try:
        image = record.image.open(lambda width, height: max(width, height) // THUMBNAIL)
    except OSError:
        return None, (4, 3)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= THUMBNAIL_BYTES:
            break
    return data_uri("image/jpeg", file.getvalue()), image.size


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- heat maps

OVERLAY = 64  # longest side in pixels; the browser enlarges it
# From dark to bright, as opaque as they should be on a photograph: (red, green, blue, alpha) at equal distances.
COLOURS = ((20, 11, 52, 150), (90, 20, 110, 140), (187, 55, 84, 135), (249, 142, 9, 130), (252, 255, 164, 125))


def overlay(heat: HeatMap, size: tuple[int, int]) -> str:
    """A PNG in the shape of an image of `size`: dark where the decoder did not look, bright where it did most."""
    rows, columns = len(heat.weights), len(heat.weights[0])
    grey = Image.new("L", (columns, rows))
    grey.putdata([round(255 * min(max(weight, 0.0), 1.0)) for row in heat.weights for weight in row])
    scale = OVERLAY / max(size)
    grey = grey.resize((max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)), Image.Resampling.BICUBIC)
    coloured = grey.convert("P")
    coloured.putpalette(palette(), "RGBA")
    file = io.BytesIO()
    coloured.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def palette() -> list[int]:
    """256 colours between COLOURS."""
    steps = len(COLOURS) - 1
    colours: list[int] = []
    for level in range(256):
        first, share = divmod(level * steps / 255, 1)
        low, high = COLOURS[int(first)], COLOURS[min(int(first) + 1, steps)]
        colours += [round(one + share * (other - one)) for one, other in zip(low, high, strict=True)]
    return colours
