"""Datasets by name, and the samples that they give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from blipds.config.sections import Config, DatasetConfig, ImageProcessorConfig
from blipds.data.annotations import Annotations, ImageFile, Record, annotations_of, read_annotations
from blipds.data.images import EmbedStore
from blipds.data.preparation import check_images
from blipds.data.processors import ImageProcessor
from blipds.data.shapes import make_scenes
from blipds.errors import UserError, nearest
from blipds.files.paths import user_path
from blipds.registry import DATASETS, PROCESSORS

PROBED = 100  # images that are there and cannot be read, before a split is given up
SHOWN = 3  # of them, in the error


@dataclass(frozen=True)
class Sample:
    """The image `name` with the captions that share its encoding; `error` says why it could not be read.

    `image`: uint8 pixels (3, H, W), or features (tokens, width) where the dataset has them. `views`: the same image for
    other models (`View`).
    """

    image: Tensor | None
    captions: list[str]
    error: str | None = None
    name: str = ""
    views: tuple[Tensor, ...] = ()


class View(Protocol):
    """What another model than the captioner makes of an image that is opened for both."""

    def shrink(self, width: int, height: int) -> int: ...
    def __call__(self, image: Image.Image) -> Tensor: ...


class CaptionDataset(Dataset[Sample]):
    """Samples of (image, `captions_per_image` of its captions).

    1 is the paper's recipe: a sample is a pair, in the order of the annotation file. N > 1: the captions of an image
    in groups of N; "all": in one group. Each (image, caption) pair is in exactly one sample. Without `training` a
    sample is an image.
    """

    def __init__(
        self,
        name: str,
        annotations: Annotations,
        image_processor: ImageProcessor,
        text_processor: Callable[[str], str],
        captions_per_image: int | str,
        training: bool,
    ) -> None:
        self.name = name
        self.records = annotations.records
        self.notices = annotations.notices
        self.image_processor = image_processor
        self.features: EmbedStore | None = None  # of a frozen encoder, in the place of pixels
        self.text_processor = text_processor
        self.groups: list[tuple[int, tuple[int, ...]]]  # (record, its captions)
        if not training:
            self.groups = [(record, ()) for record in range(len(self.records))]
        elif captions_per_image == 1:
            self.groups = [(record, (caption,)) for record, caption in annotations.pairs]
        else:
            self.groups = [
                (index, group)
                for index, record in enumerate(self.records)
                for group in caption_groups(record, captions_per_image)
            ]

    def __len__(self) -> int:
        return len(self.groups)

    def sample(self, index: int, seed: int) -> Sample:
        """Sample `index`, augmented by a random state that `seed` alone decides."""
        record, captions = self.groups[index]
        return self.image(record, seed, captions)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, seed=0)

    def image(self, number: int, seed: int = 0, captions: Sequence[int] = (), views: Sequence[View] = ()) -> Sample:
        """The image of a record, or a line that says why it cannot be read; with some of its captions, and views."""
        features, record = self.features, self.records[number]
        read = None if features is None else partial(features.read, number)
        return read_sample(record, captions, self.image_processor, self.text_processor, seed, read, views)


def caption_groups(record: Record, captions_per_image: int | str) -> list[tuple[int, ...]]:
    """The captions of an image, those of a sample together."""
    captions = range(len(record.captions))
    size = max(len(captions), 1) if captions_per_image == "all" else int(captions_per_image)
    return [tuple(captions[k : k + size]) for k in range(0, len(captions), size)]


def read_sample(
    record: Record,
    captions: Sequence[int],
    processor: ImageProcessor,
    clean: Callable[[str], str],
    seed: int,
    read: Callable[[], Tensor] | None = None,
    views: Sequence[View] = (),
) -> Sample:
    """A record's image, its pixels or what `read` gives, under a random state that `seed` alone decides.

    The file is opened once, as large as the most demanding of processor and `views` wants it.
    """
    takers = [*views] if read is not None else [processor, *views]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend: 0.1 ms
            images = [record.image.open(lambda *size: min(taker.shrink(*size) for taker in takers))] if takers else []
            image = processor(images[0]) if read is None else read()
            seen = tuple(view(images[0]) for view in views)
    except OSError as error:
        return Sample(None, [], f"{record.image}: {error}", str(record.image))
    return Sample(image, [clean(record.captions[k]) for k in captions], None, str(record.image), seen)


def build_dataset(name: str, config: Config, split: str, training: bool) -> CaptionDataset:
    """The dataset `name` of the run config. Raises UserError for unknown names, missing files and bad entries."""
    dataset = config.datasets[name]
    annotations = DATASETS[name](dataset, config, split, training)
    if not annotations.records:
        raise UserError(f"datasets.{name}: split '{split}' holds no image")
    limited = annotations.limited(config.run.limit_train if training else config.run.limit_val)
    first = [record.image.path for record in limited.records[:100] if isinstance(record.image, ImageFile)]
    check_images(name, config, first)
    if training:  # an evaluation counts what it could not read
        check_readable(limited, f"datasets.{name}: split '{split}'")
    processors = build_processors(dataset, config, training)
    return CaptionDataset(name, limited, *processors, dataset.captions_per_image, training)


def check_readable(annotations: Annotations, place: str) -> None:
    """UserError where no image can be read: no file is there, or none of the first `PROBED` that are there opens.

    The first that opens ends the search, so that a million images cost no more than one.
    """
    errors: list[str] = []
    tried = 0
    for record in annotations.records:
        try:
            if isinstance(record.image, ImageFile) and not record.image.path.exists():
                errors.append(f"{record.image}: no such file")
                continue
            record.image.open()
            return
        except OSError as error:
            errors.append(str(error))
            tried += 1
        if tried == PROBED:
            break
    which = f"its {len(annotations.records):,} images" if tried < PROBED else f"the first {PROBED} images"
    raise UserError("; ".join([f"{place}: none of {which} can be read", *errors[:SHOWN], *annotations.notices]))


def build_processors(
    dataset: DatasetConfig, config: Config, training: bool
) -> tuple[ImageProcessor, Callable[[str], str]]:
    """Those of images and of captions."""
    kind = "train" if training else "eval"
    image_processor = build_image_processor(getattr(dataset.vis_processor, kind), config.model.image_size)
    text = getattr(dataset.text_processor, kind)
    words = {} if text.max_words is None else {"max_words": text.max_words}
    return image_processor, PROCESSORS[text.name](prompt=config.model.prompt, **words)


def is_stream(storage: str) -> bool:
    """Whether it is no file, but what blipds/data/streams.py reads."""
    return storage.startswith("pipe:") or "://" in storage


def splits_of(dataset: DatasetConfig) -> list[str]:
    """The splits that a dataset has files or drawings for."""
    with_files = [name for name, files in dataset.build_info.annotations.items() if files.storage]
    return list(dict.fromkeys([*with_files, *dataset.num_images]))


def build_image_processor(config: ImageProcessorConfig, image_size: int) -> ImageProcessor:
    """What the config leaves open is the processor's own default."""
    optional = ("min_scale", "max_scale", "mean", "std")
    given: dict[str, Any] = {key: getattr(config, key) for key in optional if getattr(config, key) is not None}
    given.update({key: tuple(given[key]) for key in ("mean", "std") if key in given})
    try:
        return PROCESSORS[config.name](image_size=config.image_size or image_size, **given)
    except TypeError:
        raise UserError(f"vis_processor '{config.name}' does not take one of {', '.join(given)}") from None


@DATASETS.register("coco_caption")
@DATASETS.register("flickr8k_caption")
@DATASETS.register("flickr30k_caption")
@DATASETS.register("nocaps")
@DATASETS.register("custom_caption")
def annotation_files(dataset: DatasetConfig, config: Config, split: str, training: bool) -> Annotations:
    """Datasets of files in any layout that blipds/data/layouts.py knows."""
    files = dataset.build_info.annotations.get(split)
    if files is None or not files.storage:
        raise UserError(
            f"no annotation file for split '{split}': give datasets.<name>.build_info.annotations.{split}.storage; "
            f"{nearest(split, splits_of(dataset))}"
        )
    for storage in files.storage:
        if is_stream(storage):
            raise UserError(
                f"{storage}: a stream can only be trained on, and nothing else beside it; split '{split}' needs files"
            )
    cache_root = user_path(config.env.cache_root)
    images = dataset.images or dataset.build_info.images.storage
    image_root = None if images is None else cache_root / user_path(images)
    paths = [cache_root / user_path(storage) for storage in files.storage]
    return read_annotations(paths, image_root, training, split, cache_root / "shard_indices")


@DATASETS.register("shapes_caption")
def shapes(dataset: DatasetConfig, config: Config, split: str, training: bool) -> Annotations:
    """Drawn scenes; deterministic by split and seed."""
    if split not in dataset.num_images:
        raise UserError(
            f"datasets.shapes_caption.num_images has no split '{split}'; {nearest(split, dataset.num_images)}"
        )
    scenes = make_scenes(split, dataset.num_images[split], config.run.seed)
    return annotations_of([Record(scene, tuple(scene.captions()), scene.id) for scene in scenes])
