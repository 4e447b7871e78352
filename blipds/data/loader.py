"""Batches: which samples, in which order, on which rank, and as which tensors."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from blipds.data.caption_rows import CaptionRows, caption_rows
from blipds.data.datasets import CaptionDataset, Sample, View
from blipds.data.images import EmbedStore, ImageEmbeds, Images, stack
from blipds.data.processors import ImageProcessor
from blipds.data.tokenizer import CaptionTokenizer
from blipds.data.workers import Shared, received, worker_context
from blipds.errors import UserError
from blipds.signals import leave_signals_alone


class ModelInputs(Protocol):
    """Images as the model takes them: pixels, features, or (in training/self_critical.py) what an encoder made."""

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]: ...


class Batch(NamedTuple):
    """A micro-batch of one rank: images with their captions. `names`: of the images, in their order.

    A filler, which completes the last global batch of an epoch, has no caption and "" for a name, and neither has an
    image that cannot be read (`errors`). `num_images` and `num_captions` do not count them.
    """

    images: ModelInputs
    captions: CaptionRows
    num_images: int
    num_captions: int
    names: list[str]
    errors: list[str]

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of `CaptioningModel.forward`, on the device."""
        return {**self.images.model_inputs(device, dtype), **self.captions.to(device)}


class EvalBatch(NamedTuple):
    """Images to caption and their indices in the dataset; unreadable ones are only in `errors`.

    `views`: of each view that the loader was asked for, what it makes of these images, stacked.
    """

    images: Images | ImageEmbeds
    indices: list[int]
    errors: list[str]
    views: tuple[Tensor, ...] = ()


class SampleSource(Protocol):
    """What gives samples, each from a seed of its own: pixels of `image_processor`, or `features`."""

    @property
    def image_processor(self) -> ImageProcessor: ...
    @property
    def features(self) -> EmbedStore | None: ...
    def sample(self, which: Any, seed: int) -> Sample: ...


class Collator:
    """Makes a Batch from samples; runs in the worker, so that tokenizing and label-making cost the step nothing."""

    def __init__(self, tokenizer: CaptionTokenizer, dataset: SampleSource) -> None:
        self.tokenizer = tokenizer
        self.dataset = dataset  # any one of those that the samples come from

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        captions = [[self.tokenizer.encode(caption) for caption in sample.captions] for sample in samples]
        return Batch(
            images=stack([sample.image for sample in samples], self.dataset.image_processor, self.dataset.features),
            captions=caption_rows(captions, self.tokenizer.prompt_ids, self.tokenizer.pad_token_id),
            num_images=sum(sample.image is not None for sample in samples),
            num_captions=sum(map(len, captions)),
            names=["" if sample.image is None else sample.name for sample in samples],
            errors=[sample.error for sample in samples if sample.error is not None],
        )


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all the parts, and on nothing else (not on the number of ranks or workers)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


Key = tuple[int, Any, int]  # (dataset, which of its samples, seed)


class EpochOrder:
    """Which samples form global batch k of an epoch: a matter of seed and epoch alone.

    Without `ratios` an epoch holds every sample of every dataset once. With them it is as long, but dataset d has a
    share of `ratios[d]`, taken from an endless sequence of its own shuffles, epoch after epoch.
    """

    def __init__(self, sizes: Sequence[int], ratios: Sequence[float] | None, seed: int, shuffle: bool) -> None:
        self.sizes = sizes
        self.seed = seed
        self.shuffle = shuffle
        total = sum(sizes)
        self.shares = list(sizes)
        if ratios is not None:
            self.shares = [max(round(total * ratio / sum(ratios)), 1) for ratio in ratios]

    def __len__(self) -> int:
        return sum(self.shares)

    def permutation(self, size: int, *parts: object) -> np.ndarray:
        if not self.shuffle:
            return np.arange(size, dtype=np.int32)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *parts))
        return torch.randperm(size, generator=generator, dtype=torch.int32).numpy()

    def dataset_samples(self, dataset: int, epoch: int) -> np.ndarray:
        """The samples of one dataset in this epoch: a stretch of its endless sequence of passes."""
        size, share = self.sizes[dataset], self.shares[dataset]
        first, last = epoch * share, (epoch + 1) * share
        passes = []
        for number in range(first // size, (last - 1) // size + 1):
            order = self.permutation(size, "pass", dataset, number)
            passes.append(order[max(first - number * size, 0) : last - number * size])
        return np.concatenate(passes) if passes else np.zeros(0, dtype=np.int32)

    def keys(self, epoch: int) -> "EpochKeys":
        """All samples of an epoch, in order."""
        samples = [self.dataset_samples(dataset, epoch) for dataset in range(len(self.sizes))]
        datasets = np.repeat(np.arange(len(samples), dtype=np.int16), [len(share) for share in samples])
        order = self.permutation(len(datasets), "epoch", epoch)
        return EpochKeys(self.seed, epoch, datasets[order], np.concatenate(samples)[order])


@dataclass(frozen=True)
class EpochKeys:
    """The keys of an epoch, made when they are asked for: 6 bytes a sample, where lists of them would take 200."""

    seed: int
    epoch: int
    datasets: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> Key:
        dataset, sample = int(self.datasets[place]), int(self.samples[place])
        return dataset, sample, derive_seed(self.seed, self.epoch, dataset, sample)


class KeyedSamples(Dataset[Sample]):
    """Several datasets as one, addressed by key; None is a filler."""

    def __init__(self, datasets: Sequence[SampleSource]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: Key | None) -> Sample:
        if key is None:
            return Sample(None, [])
        dataset, which, seed = key
        return self.datasets[dataset].sample(which, seed)


@dataclass(frozen=True)
class RankShare:
    """How much of each optimizer step is this rank's: `accumulation` micro-batches of `micro_batch` samples."""

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def samples(self) -> int:
        """Of this rank in a step."""
        return self.micro_batch * self.accumulation

    @property
    def global_batch(self) -> int:
        """Samples in a step, all ranks together."""
        return self.samples * self.world_size


class RankBatches(Sampler[list[Any]]):
    """The micro-batches of one rank, as lists of keys, from a step of an epoch on; its length: steps in an epoch."""

    def __init__(self, share: RankShare) -> None:
        self.share = share
        self.epoch, self.first_step = 0, 0

    def __len__(self) -> int:
        raise NotImplementedError


class EpochBatches(RankBatches):
    """Each rank's share of every global batch of an `EpochOrder`.

    The last global batch of an epoch is completed with fillers that carry no label, so that every pair counts exactly
    once.
    """

    def __init__(self, order: EpochOrder, share: RankShare) -> None:
        super().__init__(share)
        self.order = order

    def __len__(self) -> int:
        return -(-len(self.order) // self.share.global_batch)

    def __iter__(self) -> Iterator[list[Key | None]]:
        size, micro_batch = self.share.global_batch, self.share.micro_batch
        keys = self.order.keys(self.epoch)
        for step in range(self.first_step, len(self)):
            places = range(step * size + self.share.rank, (step + 1) * size, self.share.world_size)
            mine = [keys[place] if place < len(keys) else None for place in places]  # fillers are spread
            for start in range(0, len(mine), micro_batch):
                yield mine[start : start + micro_batch]


class TrainLoader:
    """Gives each rank its share of every global batch, as windows of `accumulation` micro-batches.

    Workers stay alive from epoch to epoch.
    """

    def __init__(
        self, datasets: Sequence[SampleSource], batches: RankBatches, tokenizer: CaptionTokenizer, *, num_workers: int
    ) -> None:
        self.batches = batches
        self.loader = DataLoader(
            KeyedSamples(datasets),
            batch_sampler=batches,
            collate_fn=Shared(Collator(tokenizer, datasets[0])),
            num_workers=num_workers,
            multiprocessing_context=worker_context(num_workers),
            persistent_workers=num_workers > 0,
            worker_init_fn=leave_signals_alone,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its draws leave torch's own random state alone
        )
        self.started: tuple[tuple[int, int], Iterator[Batch]] | None = None

    @property
    def global_batch(self) -> int:
        """Samples in an optimizer step, all ranks and accumulated micro-batches together."""
        return self.batches.share.global_batch

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches)

    def start(self, epoch: int, first_step: int = 0) -> None:
        """Sets the workers to the batches of `windows(epoch, first_step)`, to be ready when they are asked for."""
        self.batches.epoch, self.batches.first_step = epoch, first_step
        self.started = (epoch, first_step), received(iter(self.loader))

    def windows(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """The accumulation windows of one epoch, one for each optimizer step from `first_step` on."""
        if self.started is None or self.started[0] != (epoch, first_step):
            self.start(epoch, first_step)
        assert self.started is not None
        batches, self.started = self.started[1], None
        for _ in range(first_step, self.steps_per_epoch):
            yield list(islice(batches, self.batches.share.accumulation))


def epoch_loader(
    datasets: Sequence[CaptionDataset],
    tokenizer: CaptionTokenizer,
    share: RankShare,
    *,
    seed: int,
    shuffle: bool = True,
    ratios: Sequence[float] | None = None,
    num_workers: int = 0,
) -> TrainLoader:
    """A loader over datasets that are known whole."""
    first = datasets[0].image_processor
    for dataset in datasets:
        if (dataset.image_processor.mean, dataset.image_processor.std) != (first.mean, first.std):
            raise UserError(f"datasets.{dataset.name}: mean and std differ from those of {datasets[0].name}")
    order = EpochOrder([len(dataset) for dataset in datasets], ratios, seed, shuffle)
    batches = EpochBatches(order, share)
    return TrainLoader(datasets, batches, tokenizer, num_workers=num_workers)


class EvalLoader:
    """Some images of a dataset, by their record, in batches; each file is opened once, for all `views`, too."""

    def __init__(
        self,
        dataset: CaptionDataset,
        records: Sequence[int],
        *,
        batch_size: int,
        num_workers: int,
        views: Sequence[View] = (),
    ) -> None:
        self.dataset = dataset
        self.loader = DataLoader(
            IndexedImages(dataset, views),
            batch_sampler=[list(records[i : i + batch_size]) for i in range(0, len(records), batch_size)],
            collate_fn=Shared(self.collate),
            num_workers=num_workers,
            multiprocessing_context=worker_context(num_workers),
            worker_init_fn=leave_signals_alone,
            pin_memory=torch.cuda.is_available(),
        )

    def collate(self, found: Sequence[tuple[int, Sample]]) -> EvalBatch:
        readable = [(index, sample) for index, sample in found if sample.image is not None]
        given: list[Tensor | None] = [sample.image for _, sample in readable]
        images = stack(given or [None], self.dataset.image_processor, self.dataset.features)
        errors = [sample.error for _, sample in found if sample.error is not None]
        views = tuple(map(torch.stack, zip(*(sample.views for _, sample in readable), strict=True)))
        return EvalBatch(images, [index for index, _ in readable], errors, views)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[EvalBatch]:
        return received(iter(self.loader))


class IndexedImages(Dataset[tuple[int, Sample]]):
    def __init__(self, dataset: CaptionDataset, views: Sequence[View]) -> None:
        self.dataset = dataset
        self.views = views

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.dataset.image(index, views=self.views)
