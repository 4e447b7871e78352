"""Tar shards that come through a pipe or from an address: read in order, through a shuffle buffer, over and over.

Nothing of them is kept, so they have no known length: set the number of steps (`run.max_iters`). Each rank reads
its own shards once a pass, in a thread beside the training, and hands the undecoded images to its workers. Names as in
WebDataset: `pipe:COMMAND` and `https://...`, with {000..099} in them.
"""

import io
import os
import queue
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from math import gcd
from operator import itemgetter
from pathlib import PurePosixPath
from typing import ClassVar, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from blipds.config.sections import Config
from blipds.data.annotations import Record, RecordBuilder, expand_braces
from blipds.data.datasets import Sample, build_processors, caption_groups, is_stream, read_sample
from blipds.data.layouts import canonical_split, sample_entry
from blipds.data.loader import Key, RankBatches, RankShare, TrainLoader, derive_seed
from blipds.data.processors import ImageProcessor, Shrink, load_image
from blipds.data.shards import ShardSample, keyed_members, open_tar, samples_of, take_member
from blipds.data.sources import is_image
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.files import download

T = TypeVar("T")

PIECE = 1 << 20  # bytes
ENDLESS = sys.maxsize  # steps in an epoch that never ends
ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".zip")  # that people take for what can be streamed


@dataclass(frozen=True)
class StreamedImage:
    """An image that has been read, not decoded; `place` names it in messages."""

    place: str
    data: bytes = field(repr=False)

    def open(self, shrink: Shrink | None = None) -> Image.Image:
        return load_image(self.place, shrink, data=io.BytesIO(self.data))

    def __str__(self) -> str:
        return self.place


StreamSample = tuple[Record, tuple[int, ...]]  # an image, and which of its captions


@dataclass
class CaptionStream:
    """A dataset of tar shards that are read from start to end.

    `storages`: what the run config names, braces and all. `say` is told, once each, what is left out. `splits`: those
    to take, where samples name theirs.
    Raises UserError for addresses that cannot be streamed, and later for what breaks for good.
    """

    name: str
    storages: Sequence[str]
    image_processor: ImageProcessor
    text_processor: Callable[[str], str]
    captions_per_image: int | str
    shuffle_buffer: int
    say: Callable[[str], None]
    splits: Sequence[str] = ("train",)
    features: ClassVar[None] = None  # a stream gives pixels

    def __post_init__(self) -> None:
        self.shards = [shard for storage in self.storages for shard in shards_of(storage)]
        self.said: set[str] = set()

    def share(self, rank: int, world_size: int) -> Iterator[StreamSample]:
        """One pass of a rank, in order: whole shards where there are enough of them, else every n-th image of all.

        The ranks' turns go round all shards, so that none is read more often than another, whatever their number.
        """
        if len(self.shards) < world_size:
            yield from islice(self.samples(self.shards), rank, None, world_size)
            return
        turns = len(self.shards) // gcd(len(self.shards), world_size)
        yield from self.samples(self.shards[(rank + turn * world_size) % len(self.shards)] for turn in range(turns))

    def samples(self, shards: Iterable[str]) -> Iterator[StreamSample]:
        for shard in shards:
            for sample, data in self.read(shard):
                place = f"{shard}/{sample.image}"
                try:
                    entry = sample_entry(sample, StreamedImage(place, data))
                except UserError as error:
                    self.note(shard, "captions that cannot be read", str(error))
                    continue
                if entry.split not in (None, *map(canonical_split, self.splits)):
                    self.note(shard, "images of other splits", place)
                    continue
                builder = RecordBuilder()
                builder.add(entry)
                (record,) = builder.annotations().records
                if builder.blank:
                    self.note(shard, "captions without a word", place)
                if not record.captions:
                    self.note(shard, "images without a caption beside them", place)
                for captions in caption_groups(record, self.captions_per_image):
                    yield record, captions

    def read(self, shard: str) -> Iterator[tuple[ShardSample, bytes]]:
        """The samples of a shard with the bytes of their images. Members of one key stand together, as WebDataset's."""
        left_out = partial(self.note, shard)
        lone: dict[str, bool] = {}  # keys with an image or captions only: whether it is the image
        content = piped(shard.removeprefix("pipe:")) if shard.startswith("pipe:") else download.stream(shard)
        with (
            closing(content) as pieces,
            open_tar(shard, fileobj=Pieces(pieces), mode="r|*", bufsize=PIECE) as tar,  # compressed or not
        ):
            for key, members in groupby(keyed_members(tar, left_out), key=itemgetter(0)):
                names: dict[str, ShardSample] = {}
                data: dict[str, bytes] = {}
                for _, member in members:
                    take_member(tar, member, names, left_out)
                    if is_image(member.name) and (file := tar.extractfile(member)):
                        data[member.name] = file.read()
                captioned = any(sample.text is not None or sample.json is not None for sample in names.values())
                if names and captioned != bool(data) and lone.setdefault(key, bool(data)) != bool(data):
                    raise UserError(
                        f"{shard}: image and captions of '{key}' do not stand together, which a stream needs: pack it "
                        "with tar --sort=name, or give the tar as a file"
                    )
                for sample in samples_of(key, names, left_out):
                    yield sample, data[sample.image]

    def note(self, shard: str, what: str, first: str) -> None:
        if what not in self.said:
            self.said.add(what)
            self.say(f"{self.name}: {what} are left out; the first: {first} (of {shard})")

    def sample(self, which: StreamSample, seed: int) -> Sample:
        """What a worker makes of a sample: the image augmented by a random state that `seed` alone decides."""
        return read_sample(*which, self.image_processor, self.text_processor, seed)


class StreamBatches(RankBatches):
    """The micro-batches of one rank: one epoch without an end.

    Pass p of a rank is in an order that `seed`, p and the rank decide, so that a resumed run comes to where it was by
    reading again, undecoded, what it had read of its pass; whole passes before that are only counted.
    """

    def __init__(self, stream: CaptionStream, share: RankShare, seed: int) -> None:
        super().__init__(share)
        self.stream = stream
        self.seed = seed

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[Key]]:
        keys = read_ahead(self.keys(), self.share.micro_batch)
        while batch := list(islice(keys, self.share.micro_batch)):
            yield batch

    def keys(self) -> Iterator[Key]:
        """The samples of all passes, from `first_step` on."""
        rank, skipped = self.share.rank, self.first_step * self.share.samples
        if skipped:
            self.stream.say(f"{self.stream.name}: reading past {skipped:,} samples a rank that were trained on")
        number = 0
        while True:
            found = 0
            generator = random.Random(derive_seed(self.seed, "pass", number, rank))
            samples = self.stream.share(rank, self.share.world_size)
            for streamed in shuffled(samples, self.stream.shuffle_buffer, generator):
                if found >= skipped:
                    yield 0, streamed, derive_seed(self.seed, number, rank, found)
                found += 1
            if not found:
                raise UserError(f"{self.stream.shards[0]}: a stream without an image that has captions")
            number += 1 + max(skipped - found, 0) // found
            skipped = max(skipped - found, 0) % found


def streams_of(config: Config) -> list[str]:
    """What is streamed of the training splits. UserError where the run wants what only files can give."""
    run = config.run
    storages = [
        storage
        for dataset in config.datasets.values()
        for split in run.train_splits
        if split in dataset.build_info.annotations
        for storage in dataset.build_info.annotations[split].storage
    ]
    streams = [storage for storage in storages if is_stream(storage)]
    if not streams:
        return []
    steps = (
        "it has no length: give run.runner=runner_iter, run.max_iters and run.iters_per_inner_epoch, the steps after "
        "which a checkpoint is saved and the validation splits are captioned"
    )
    problems = {
        "nothing else can be trained on beside it": len(config.datasets) > 1 or len(streams) < len(storages),
        steps: run.runner != "runner_iter" or run.iters_per_inner_epoch is None,
        "run.limit_train needs files": run.limit_train is not None,
        "model.cache_image_embeds needs files": config.model.cache_image_embeds,
    }
    for problem, there in problems.items():
        if there:
            raise UserError(f"{streams[0]} is a stream: {problem}")
    return streams


def build_stream(config: Config, storages: list[str], say: Callable[[str], None]) -> CaptionStream:
    ((name, dataset),) = config.datasets.items()
    buffer = dataset.shuffle_buffer if config.run.shuffle else 1
    processors = build_processors(dataset, config, training=True)
    return CaptionStream(name, storages, *processors, dataset.captions_per_image, buffer, say, config.run.train_splits)


def stream_loader(
    stream: CaptionStream, tokenizer: CaptionTokenizer, share: RankShare, *, seed: int, num_workers: int = 0
) -> TrainLoader:
    """A loader over a stream."""
    if len(stream.shards) < share.world_size:
        stream.say(
            f"{stream.name}: {len(stream.shards)} shards for {share.world_size} ranks, so each rank reads all of them "
            f"and keeps every {share.world_size}th image; with as many shards as ranks it would read its own only"
        )
    batches = StreamBatches(stream, share, seed)
    return TrainLoader([stream], batches, tokenizer, num_workers=num_workers)


# --- bytes -----------------------------------------------------------------------------------------------------------


def shards_of(storage: str) -> list[str]:
    """The shards that braces stand for. UserError for what cannot be streamed."""
    if storage.startswith("pipe:"):
        return expand_braces(storage)
    if not storage.startswith(("http://", "https://")):
        raise UserError(f"{storage}: only http(s):// and pipe: can be streamed, as in pipe:aws s3 cp {storage} -")
    suffix = PurePosixPath(urlsplit(storage).path).suffix.lower()
    if suffix in ANNOTATIONS:
        raise UserError(f"{storage}: only tar shards can be streamed; download it, and give the path of the file")
    return expand_braces(storage)


def piped(command: str) -> Generator[bytes, None, None]:
    """What a shell command prints. UserError where it fails.

    In a session of its own: a Ctrl-C asks the training to end well, and would end the command at once.
    """
    with subprocess.Popen(
        command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        try:
            while piece := process.stdout.read(PIECE):
                yield piece
        except GeneratorExit:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise UserError(f"pipe:{command} ended with exit status {process.returncode}")


class Pieces:
    """Pieces of bytes as what tarfile reads a stream from: all that it calls is read()."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces
        self.rest = b""

    def read(self, size: int) -> bytes:
        while len(self.rest) < size and (piece := next(self.pieces, b"")):
            self.rest += piece
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken


# --- order -----------------------------------------------------------------------------------------------------------


def shuffled(items: Iterable[T], size: int, generator: random.Random) -> Iterator[T]:
    """Each item changes places with one of `size` before it; what is left over at the end comes last, shuffled."""
    kept: list[T] = []
    for item in items:
        if len(kept) < size:
            kept.append(item)
        else:
            place = generator.randrange(size)
            kept[place], item = item, kept[place]
            yield item
    generator.shuffle(kept)
    yield from kept


def read_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, none of them None, taken `count` ahead in a thread; what it raises is raised here."""
    found: queue.Queue[T | BaseException | None] = queue.Queue(count)
    left = threading.Event()

    def run() -> None:
        try:
            for item in items:
                found.put(item)
                if left.is_set():
                    return
            found.put(None)
        except BaseException as error:
            found.put(error)

    threading.Thread(target=run, name="stream", daemon=True).start()
    try:
        while (item := found.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        while not found.empty():  # makes room for the item that the thread may be waiting with
            found.get_nowait()
