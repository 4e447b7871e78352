"""Captions a stream of images on all ranks, in order, into one output."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from tqdm import tqdm

from blipds import distributed
from blipds.captioning.captioner import CaptionModel
from blipds.captioning.inputs import NamedImage, named_batches
from blipds.captioning.outputs import CaptionSink


@dataclass
class Counts:
    captioned: int = 0
    skipped: int = 0  # unreadable
    there: int = 0  # captioned before, or named twice
    seconds: float = 0.0

    def __str__(self) -> str:
        speed = f"{self.captioned / self.seconds:.1f} images/s" if self.seconds > 0 else ""
        return (
            f"{self.captioned:,} images captioned, {self.skipped:,} skipped (they cannot be read), "
            f"{self.there:,} there already; {self.seconds:.0f} s, {speed}"
        )


class Shares:
    """This rank's share of each batch of all ranks, as lists of names, asked for in step by all ranks. Collective.

    Rank 0 alone looks at the inputs and at what the output holds. `handed` keeps what it has handed out, until the
    captions have come back; so many batches are on their way as the loaders of the ranks take ahead.
    """

    def __init__(self, images: Iterable[NamedImage], sink: CaptionSink | None, batch_size: int, counts: Counts) -> None:
        self.images, self.sink, self.batch_size, self.counts = iter(images), sink, batch_size, counts
        self.handed: deque[list[NamedImage]] = deque()

    def __iter__(self) -> Iterator[list[str]]:
        ranks, rank = distributed.world_size(), distributed.rank()
        while True:
            batch: list[NamedImage] = []
            if self.sink is not None:
                batch = list(islice(self.wanted(), self.batch_size * ranks))
                self.handed.append(batch)
            names = distributed.broadcast([image.name for image in batch])
            if not names:
                return
            share = -(-len(names) // ranks)  # the last batch is shared evenly, too
            yield names[rank * share : (rank + 1) * share]

    def wanted(self) -> Iterator[NamedImage]:
        assert self.sink is not None
        for image in self.images:
            if self.sink.take(image):
                yield image
            else:
                self.counts.there += 1


def caption_images(
    model: CaptionModel,
    images: Iterable[NamedImage],
    sink: CaptionSink | None,
    *,
    batch_size: int,
    num_workers: int,
    total: int | None = None,
) -> Counts:
    """Captions `images` into `sink`; both are rank 0's, None elsewhere is enough. Collective.

    Batches go out to the ranks and come back in step: the output is in the order of the images at any moment, so that
    it may be gone on with on any number of ranks. Images that cannot be read are named on stderr. `total` is for the
    progress bar.
    """
    counts, begin = Counts(), time.monotonic()
    shares = Shares(images, sink, batch_size, counts)
    pin_memory = model.device.type == "cuda"
    shown = None if distributed.is_main() else True  # None: where there is a terminal
    with tqdm(total=total, unit="image", desc="caption", disable=shown) as bar:
        for batch in named_batches(shares, model.image_processor, num_workers, pin_memory):
            with torch.inference_mode():
                captions = model.captions(batch.images, batch.names) if batch.names else []
            found = distributed.gather((dict(zip(batch.names, captions, strict=True)), batch.errors))
            if sink is not None:
                write(sink, shares.handed.popleft(), found, counts)
                bar.update(counts.captioned + counts.skipped + counts.there - bar.n)
    counts.seconds = time.monotonic() - begin
    return counts


def write(
    sink: CaptionSink,
    images: list[NamedImage],
    found: list[tuple[dict[str, list[str]], dict[str, str]]],
    counts: Counts,
) -> None:
    captions = {name: texts for some, _ in found for name, texts in some.items()}
    errors = {name: why for _, some in found for name, why in some.items()}
    for image in images:
        if image.name in captions:
            sink.write(image, captions[image.name])
            counts.captioned += 1
        else:
            tqdm.write(f"skipped {image.name}: {errors[image.name]}", file=sys.stderr)
            counts.skipped += 1
    sink.flush()
