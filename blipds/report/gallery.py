"""The gallery of captioned images: chosen, and small enough to embed in the page."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from blipds.data.annotations import Record
from blipds.report.confidence import percent, shaded_words
from blipds.report.run_files import Evaluation

IMAGES = 240  # in a report, all splits together: with the limit below at most 8 MB
THUMBNAIL = 384  # longest side in pixels
THUMBNAIL_BYTES = 25_000  # of a JPEG; base64 adds a third
QUALITIES = (80, 65, 50, 35, 20)  # the first that is small enough

WORST, BEST, RANDOM = "worst", "best", "random"


@dataclass(frozen=True)
class Shown:
    """An evaluated split and its images. `references`: {image id: captions}; None where nothing was scored."""

    split: str
    records: Sequence[Record]
    references: Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class HeatMap:
    """Where the decoder looked when it chose a word: weights (rows, columns) over the whole image, from 0 to 1."""

    word: str
    weights: Sequence[Sequence[float]]


def choose(ids: Sequence[str], cider: Mapping[str, float] | None, count: int) -> dict[str, str]:
    """{image id: why it was chosen} of at most `count` images: the worst third, the best third, the rest at random.

    A hash of the id stands for a random number: each evaluation chooses the same images, and a smaller choice is part
    of a larger one. Without scores all are chosen at random. In the order of `ids`.
    """
    scored = cider or {}
    ranked = sorted((image_id for image_id in ids if image_id in scored), key=lambda image_id: scored[image_id])
    third = min(count, len(ranked)) // 3
    chosen = dict.fromkeys(ranked[:third], WORST) | dict.fromkeys(ranked[len(ranked) - third :], BEST)
    rest = [image_id for image_id in ids if image_id not in chosen]
    rest.sort(key=lambda image_id: hashlib.blake2b(image_id.encode(errors="replace"), digest_size=8).digest())
    chosen |= dict.fromkeys(rest[: count - len(chosen)], RANDOM)
    return {image_id: chosen[image_id] for image_id in ids if image_id in chosen}


def cards(
    evaluation: Evaluation, chosen: Mapping[str, str], shown: Shown, heat_maps: Mapping[str, Sequence[HeatMap]]
) -> list[dict[str, Any]]:
    """What the page says of each chosen image, in the order of the dataset; heat maps by image id."""
    records = {str(record.image_id): record for record in shown.records}
    found = []
    for place, (image_id, caption) in enumerate(evaluation.captions.items()):
        if image_id not in chosen or image_id not in records:
            continue
        thumbnail, size = thumbnail_of(records[image_id])
        found.append(
            {
                "place": place,
                "image_id": image_id,
                "source": str(records[image_id].image),
                "caption": caption,
                "references": (shown.references or {}).get(image_id, ()),
                "cider": (evaluation.cider or {}).get(image_id),
                "chosen_as": chosen[image_id],
                "thumbnail": thumbnail,
                "size": size,
                **confidence_of(evaluation, image_id),
                "words": [(heat.word, overlay(heat, size)) for heat in heat_maps.get(image_id, ())],
            }
        )
    return found


def confidence_of(evaluation: Evaluation, image_id: str) -> dict[str, Any]:
    """`mean_log_prob` of a token, `confidence` in percent and `shaded` words of an image's caption; None and no words
    where they were not kept."""
    found = evaluation.confidence.get(image_id)
    if found is None:
        return {"mean_log_prob": None, "confidence": None, "shaded": []}
    return {
        "mean_log_prob": found.mean_log_prob,
        "confidence": percent(found.mean_log_prob),
        "shaded": shaded_words(evaluation.captions[image_id], found),
    }


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
    grey = Image.fromarray((255 * np.array(heat.weights).clip(0, 1)).round().astype(np.uint8))
    scale = OVERLAY / max(size)
    grey = grey.resize((max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)), Image.Resampling.BICUBIC)
    places = np.linspace(0, 255, len(COLOURS))
    palette = [np.interp(range(256), places, channel).round() for channel in zip(*COLOURS, strict=True)]
    coloured = grey.convert("P")
    coloured.putpalette(np.stack(palette, axis=1).astype(np.uint8).tobytes(), "RGBA")
    file = io.BytesIO()
    coloured.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())
