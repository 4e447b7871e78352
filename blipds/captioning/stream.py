"""Captions a stream of images on all ranks into one output, in the order of the images."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch.utils.data import DataLoader
from tqdm import tqdm

from blipds import distributed
from blipds.captioning.captioner import CaptionModel
from blipds.captioning.inputs import ImageReader, NamedImage
from blipds.captioning.outputs import CaptionOutput
from blipds.data.workers import Shared, received, worker_context
from blipds.signals import leave_signals_alone


@dataclass
class Counts:
    verb: str = "captioned"
    captioned: int = 0
    unreadable: int = 0
    already: int = 0  # captioned by an earlier command, or named twice
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.captioned:,} images {self.verb}, {self.unreadable:,} skipped (they cannot be read), "
            f"{self.already:,} already {self.verb}; {self.seconds:.0f} s, "
            f"{self.captioned / max(self.seconds, 1e-3):.1f} images/s"
        )


def caption_images(
    model: CaptionModel,
    images: Iterable[NamedImage],
    output: CaptionOutput | None,
    *,
    batch_size: int,
    num_workers: int,
    total: int | None = None,
    verb: str = "captioned",
) -> Counts:
    """Captions `images` into rank 0's `output`, which is None elsewhere. Only rank 0 counts. Collective.

    A batch of all ranks is written when all of its captions are there: the output is in the order of the images at any
    moment, so that it can be continued on any number of ranks. Unreadable images are named on stderr. `total` is for
    the progress bar, `verb` for the counts.
    """
    counts, started = Counts(verb), time.monotonic()
    wanted = iter(()) if output is None else images_to_caption(images, output, counts)
    reader = ImageReader(model.image_processor)
    loader = DataLoader(
        reader,
        batch_sampler=shares(wanted, batch_size),
        collate_fn=Shared(reader.collate),
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers),
        worker_init_fn=leave_signals_alone,
        pin_memory=model.device.type == "cuda",
    )
    hidden = None if distributed.is_main() else True  # None: where stderr is no terminal
    with tqdm(total=total, unit="image", desc="caption", disable=hidden) as bar:
        for pixels, named, errors in received(loader):
            captions = model.captions(pixels, [image.name for image in named]) if named else []
            for captioned, unreadable in distributed.gather((list(zip(named, captions, strict=True)), errors)):
                if output is None:
                    continue
                output.write(captioned)
                for name, reason in unreadable:
                    tqdm.write(f"skipped {name}: {reason}", file=sys.stderr)
                counts.captioned += len(captioned)
                counts.unreadable += len(unreadable)
            bar.update(counts.captioned + counts.unreadable + counts.already - bar.n)
    counts.seconds = time.monotonic() - started
    return counts


def images_to_caption(images: Iterable[NamedImage], output: CaptionOutput, counts: Counts) -> Iterator[NamedImage]:
    for image in images:
        if output.needs(image):
            yield image
        else:
            counts.already += 1


def shares(images: Iterator[NamedImage], batch_size: int) -> Iterator[list[NamedImage]]:
    """This rank's share of each batch of rank 0's `images`. Each of them is collective."""
    rank, ranks = distributed.rank(), distributed.world_size()
    while batch := distributed.broadcast(list(islice(images, batch_size * ranks))):
        share = -(-len(batch) // ranks)  # the last batch is shared evenly, too
        yield batch[rank * share : (rank + 1) * share]
