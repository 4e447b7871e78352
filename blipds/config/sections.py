"""The sections of the run config: dataclasses are the schema, and check their values.

An arch's keys are in a subclass of `ModelConfig` (models/protocol.py). run_configs/README.md explains every key.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from blipds.errors import UserError, nearest
from blipds.registry import ARCHS


@dataclass
class ModelConfig:
    """`model:`, the keys that every arch has. An arch adds its own in a subclass (models/protocol.py)."""

    # Values of keys that switch activation checkpointing on, those that recompute least first; the first: off.
    CHECKPOINTING: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    # How captions become tokens: "bert" ([DEC] prompt caption [SEP]) or "causal" (data/tokenizer.py)
    TEXT: ClassVar[str] = "bert"
    # LAVIS's keys that something else decides now, and the line that says so.
    REPLACED: ClassVar[dict[str, str]] = {}

    arch: str = "blip_caption"
    model_type: str | None = None
    load_pretrained: bool = True
    load_finetuned: bool = True
    pretrained: str | None = None
    finetuned: str | None = None
    freeze_vit: bool = False
    cache_image_embeds: bool | str = False
    image_size: int = 384
    tokenizer: str | None = None
    prompt: str = "a picture of "
    max_txt_len: int = 40

    @property
    def recomputes(self) -> bool:
        """Whether activations are checkpointed."""
        return any(getattr(self, key) != off for key, off in self.CHECKPOINTING[0].items())

    @property
    def tokenizer_source(self) -> str | None:
        """Where the tokenizer comes from: a folder, a vocabulary file, a hub name; None: the package."""
        return self.tokenizer

    @property
    def hidden_size(self) -> int:
        """The width of the text decoder: "auto" sizes in the DeepSpeed JSON follow from it."""
        return 768

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of what the report's table of the model shows beside the common keys."""
        return []

    def parts(self) -> dict[str, str]:
        """{part of the model: where its first weights come from}, where no whole checkpoint is asked for."""
        return {}

    @property
    def encoder_name(self) -> str:
        """What tells image encoders apart whose weights alone do not (the number of heads), for the feature cache."""
        return self.arch

    def __post_init__(self) -> None:
        check("model.image_size", self.image_size, self.image_size > 0, "a positive number of pixels")
        good = self.prompt == "" or self.prompt.endswith(" ")
        check(
            "model.prompt",
            self.prompt,
            good,
            "a text that ends in a space (in --options: 'model.prompt=\"a photo of \"')",
        )
        check("model.max_txt_len", self.max_txt_len, self.max_txt_len > 1, "at least 2 tokens")
        if self.cache_image_embeds and not self.freeze_vit:
            raise UserError(
                "model.cache_image_embeds needs model.freeze_vit: features of an encoder that learns change"
            )


@dataclass
class AnnotationConfig:
    """Annotation files of one split: where they come from, their checksums, and where they lie.

    `member`: the url is a zip, and this is Karpathy's file in it, of which `storage` gets the split.
    """

    IN_PLACE: ClassVar = str | list[str]  # the storage may stand in the section's place

    url: list[str] = field(default_factory=list)
    md5: list[str] = field(default_factory=list)
    storage: list[str] = field(default_factory=list)
    member: str | None = None

    def __post_init__(self) -> None:
        if self.url and not len(self.storage) == len(self.url) == len(self.md5 or self.url):
            counts = f"{len(self.url)} url, {len(self.md5)} md5, {len(self.storage)} storage"
            raise UserError(f"build_info.annotations: a split has {counts}; allowed: as many of each, or no md5")


@dataclass
class ArchiveConfig:
    """An archive of images, for launch/prepare_data.py: its folder `source` becomes `target` below `images.storage`.

    `file` is its name, `size` in bytes. Without a `url` it has to be asked for at `request`; without a `file`, too,
    that page says how the images are to be had one by one.
    """

    file: str = ""
    url: str | None = None
    request: str | None = None
    md5: str | None = None
    size: int = 0
    source: str = ""
    target: str = ""


@dataclass
class ImagesConfig:
    storage: str | None = None
    archives: list[ArchiveConfig] = field(default_factory=list)


@dataclass
class BuildInfo:
    """`datasets.<name>.build_info:`; relative paths start at `env.cache_root`.

    Where only `storage` is to be said, the path may stand in the section's place: `annotations.train: my/train.csv`.
    """

    annotations: dict[str, AnnotationConfig] = field(default_factory=dict)
    images: ImagesConfig = field(default_factory=ImagesConfig)


@dataclass
class ImageProcessorConfig:
    """What is None is the processor's own default, and for image_size the model's."""

    name: str = "blip_image_eval"
    image_size: int | None = None
    min_scale: float | None = None
    max_scale: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("mean", -math.inf), ("std", 0)):
            values = getattr(self, name)
            good = values is None or (len(values) == 3 and all(lowest < value < math.inf for value in values))
            check(f"vis_processor: {name}", values, good, "three numbers" + " above 0" * (name == "std"))
        low = 0.5 if self.min_scale is None else self.min_scale
        high = 1.0 if self.max_scale is None else self.max_scale
        allowed = "more than 0, at most 1, the smaller one first"
        check("vis_processor: [min_scale, max_scale]", [low, high], 0 < low <= high <= 1, allowed)


@dataclass
class TextProcessorConfig:
    name: str = "blip_caption"
    prompt: str | None = None
    max_words: int | None = None


@dataclass
class ImageProcessors:
    train: ImageProcessorConfig = field(default_factory=lambda: ImageProcessorConfig(name="blip_image_train"))
    eval: ImageProcessorConfig = field(default_factory=ImageProcessorConfig)


@dataclass
class TextProcessors:
    train: TextProcessorConfig = field(default_factory=TextProcessorConfig)
    eval: TextProcessorConfig = field(default_factory=TextProcessorConfig)


@dataclass
class DatasetConfig:
    """`datasets.<name>:`. `images` overrides the image root; `num_images` is for drawn datasets, by split;
    `shuffle_buffer` for tar shards that are streamed."""

    data_type: str = "images"
    build_info: BuildInfo = field(default_factory=BuildInfo)
    images: str | None = None
    num_images: dict[str, int] = field(default_factory=dict)
    captions_per_image: int | str = 1
    shuffle_buffer: int = 1000
    vis_processor: ImageProcessors = field(default_factory=ImageProcessors)
    text_processor: TextProcessors = field(default_factory=TextProcessors)


@dataclass
class RunConfig:
    """`run:`"""

    task: str = "captioning"
    runner: str = "runner_base"

    # optimisation
    objective: str = "cross_entropy"
    lr_sched: str = "cosine_step_lr"
    init_lr: float = 1e-5
    min_lr: float = 0.0
    warmup_lr: float | None = None
    warmup_steps: int = 0
    lr_decay_rate: float | None = None
    weight_decay: float = 0.05
    weight_decay_on: str = "matrices"
    beta2: float = 0.999
    lr_scale: dict[str, float] = field(default_factory=dict)
    lr_layer_decay: float | None = None
    max_grad_norm: float | None = None
    max_epoch: int = 5
    max_iters: int | None = None
    iters_per_inner_epoch: int | None = None

    # batches
    batch_size_train: int = 16
    batch_size_eval: int = 32
    accum_grad_iters: int = 1
    num_workers: int = 4
    train_dataset_ratios: dict[str, float] | None = None
    shuffle: bool = True
    limit_train: int | None = None
    limit_val: int | None = None
    max_bad_images: int = 100
    compile: bool = False
    seed: int = 42

    # splits and captions
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=lambda: ["val"])
    test_splits: list[str] = field(default_factory=list)
    evaluate: bool = False
    gather_for_evaluation: bool = True
    num_beams: int = 3
    max_len: int = 20
    min_len: int = 5
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    use_nucleus_sampling: bool = False
    top_p: float = 0.9
    temperature: float = 1.0
    report_metric: bool = True
    annotation_file: str | None = None

    # output
    output_dir: str = "output"
    job_id: str | None = None
    expect_world_size: int | None = None
    resume_ckpt_path: str | None = None
    log_freq: int = 50
    val_freq: int = 1
    val_steps: int | None = None
    save_freq: int = 1
    save_steps: int | None = None
    save_minutes: float | None = None
    save_last: bool = True
    keep_last: int = 2
    async_save: bool = False
    max_bad_steps: int = 20
    stall_minutes: float = 30.0
    collective_minutes: float = 30.0

    def __post_init__(self) -> None:
        one_of("run.task", self.task, ["captioning"])
        one_of("run.runner", self.runner, ["runner_base", "runner_iter"])
        one_of("run.weight_decay_on", self.weight_decay_on, ["matrices", "all"])
        for name in ("batch_size_train", "batch_size_eval", "accum_grad_iters", "num_beams", "max_epoch"):
            check(f"run.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("log_freq", "val_freq", "save_freq", "keep_last", "max_bad_steps"):
            check(f"run.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("num_workers", "warmup_steps", "max_bad_images", "weight_decay", "init_lr", "min_lr", "min_len"):
            check(f"run.{name}", getattr(self, name), 0 <= getattr(self, name) < math.inf, "0 or more")
        check("run.length_penalty", self.length_penalty, math.isfinite(self.length_penalty), "a number")
        for name in ("stall_minutes", "collective_minutes"):
            check(f"run.{name}", getattr(self, name), getattr(self, name) > 0, "more than 0 minutes")
        for name in (
            "max_iters",
            "iters_per_inner_epoch",
            "limit_train",
            "limit_val",
            "val_steps",
            "max_grad_norm",
            "save_steps",
            "save_minutes",
            "expect_world_size",
        ):
            value = getattr(self, name)
            check(f"run.{name}", value, value is None or value > 0, "more than 0, or null")
        check("run.beta2", self.beta2, 0 <= self.beta2 < 1, "0 or more, below 1")
        for prefix, scale in self.lr_scale.items():
            check(f"run.lr_scale.{prefix}", scale, scale > 0, "more than 0 (model.freeze_vit keeps weights still)")
        decay = self.lr_layer_decay
        check("run.lr_layer_decay", decay, decay is None or 0 < decay <= 1, "more than 0, at most 1, or null")
        check("run.top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        check("run.temperature", self.temperature, self.temperature > 0, "more than 0")
        check("run.repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "more than 0")
        check("run.max_len", self.max_len, self.max_len > self.min_len, f"more than run.min_len ({self.min_len})")
        if self.runner == "runner_iter" and self.max_iters is None:
            raise UserError("run.runner is runner_iter but run.max_iters is not given")
        if self.runner == "runner_base" and self.max_iters is not None:
            raise UserError("run.max_iters is given but run.runner is runner_base, which counts max_epoch epochs")
        if self.use_nucleus_sampling and self.num_beams > 1:
            raise UserError(f"run.use_nucleus_sampling needs run.num_beams=1, not {self.num_beams}")


@dataclass
class EnvConfig:
    """`env:`; data and downloads lie under `cache_root`."""

    cache_root: str = "~/.cache/blipds"


@dataclass
class Config:
    model: ModelConfig = field(default_factory=lambda: ARCHS[ModelConfig.arch]().config())
    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    run: RunConfig = field(default_factory=RunConfig)
    env: EnvConfig = field(default_factory=EnvConfig)

    def __post_init__(self) -> None:
        prompt_owner = self.model.prompt
        for name, dataset in self.datasets.items():
            place = f"datasets.{name}"
            one_of(f"{place}.data_type", dataset.data_type, ["images"])
            captions = dataset.captions_per_image
            good = captions == "all" or (isinstance(captions, int) and captions >= 1)
            check(f"{place}.captions_per_image", captions, good, "a number from 1, or all")
            check(f"{place}.shuffle_buffer", dataset.shuffle_buffer, dataset.shuffle_buffer >= 1, "1 or more")
            for split in ("train", "eval"):
                size = getattr(dataset.vis_processor, split).image_size
                allowed = f"null or model.image_size ({self.model.image_size})"
                check(f"{place}.vis_processor.{split}.image_size", size, size in (None, self.model.image_size), allowed)
                prompt = getattr(dataset.text_processor, split).prompt
                # LAVIS's evaluation processors carry no prompt: its model puts it there
                good = prompt in (None, prompt_owner) or (split == "eval" and prompt == "")
                allowed = f"null or model.prompt ('{prompt_owner}'), which is also what the loss leaves out"
                check(f"{place}.text_processor.{split}.prompt", prompt, good, allowed)
        if self.run.train_dataset_ratios is not None:
            ratios = self.run.train_dataset_ratios
            if set(ratios) != set(self.datasets):
                raise UserError(
                    f"run.train_dataset_ratios names {sorted(ratios)}, but the datasets are {sorted(self.datasets)}"
                )
            for name, ratio in ratios.items():
                check(f"run.train_dataset_ratios.{name}", ratio, ratio > 0, "more than 0")


def check(key: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise UserError(f"{key} is {value!r}; allowed: {allowed}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key} is '{value}'; {nearest(value, allowed)}")
