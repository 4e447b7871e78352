"""The sections of the run config: dataclasses are the schema, and check their values.

An arch's keys are in a subclass of `ModelConfig` (models/protocol.py). run_configs/README.md explains every key.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from blipds.errors import UserError, nearest
from blipds.registry import ARCHS
from blipds.trackers import TRACKERS

# What a number may be, by the words for it in messages.
LIMITS: dict[str, Callable[[float], bool]] = {
    "0 or more": lambda value: 0 <= value < math.inf,
    "1 or more": lambda value: value >= 1,
    "2 or more": lambda value: value >= 2,
    "more than 0": lambda value: value > 0,
    "0 or more, below 1": lambda value: 0 <= value < 1,
    "more than 0, at most 1": lambda value: 0 < value <= 1,
    "a number": math.isfinite,
}


def limited(default: Any, allowed: str) -> Any:
    """A dataclass field whose values `check_limits` checks; `allowed` is a key of LIMITS. None is inside any limit."""
    return field(default=default, metadata={"allowed": allowed})


def check_limits(place: str, section: Any) -> None:
    """UserError for the first value outside of its field's limits."""
    for of in fields(section):
        value = getattr(section, of.name)
        if "allowed" in of.metadata and value is not None:
            allowed = of.metadata["allowed"]
            check(f"{place}.{of.name}", value, LIMITS[allowed](value), allowed + (", or null" * (of.default is None)))


def check(key: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise UserError(f"{key} is {value!r}; allowed: {allowed}")


def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{key} is '{value}'; {nearest(value, allowed)}")


@dataclass
class LoraConfig:
    """`model.lora:`. Patterns are of the model's own names; None: those of the arch (models/protocol.py).

    base: where the weights are that the adapters of a checkpoint adapt, if not where it says.
    """

    r: int = limited(16, "1 or more")
    alpha: int = limited(32, "1 or more")
    dropout: float = limited(0.0, "0 or more, below 1")
    target_modules: list[str] | None = None
    train_also: list[str] | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        check_limits("model.lora", self)


@dataclass
class ModelConfig:
    """`model:`, the keys that every arch has. An arch adds its own in a subclass (models/protocol.py)."""

    # Values of keys that switch activation checkpointing on, those that recompute least first; the first: off.
    CHECKPOINTING: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    # How captions become tokens: "bert" ([DEC] prompt caption [SEP]), "causal" or "seq2seq" (data/tokenizer.py)
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
    image_size: int = limited(384, "1 or more")
    tokenizer: str | None = None
    prompt: str = "a picture of "
    max_txt_len: int = limited(40, "2 or more")
    lora: LoraConfig | None = None

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

    def check_precision(self, precision: str) -> None:
        """UserError where this model cannot be trained in "fp32", "bf16" or "fp16"."""

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
        check_limits("model", self)
        good = self.prompt == "" or self.prompt.endswith(" ")
        allowed = "a text that ends in a space (in --options: 'model.prompt=\"a photo of \"')"
        check("model.prompt", self.prompt, good, allowed)
        if self.cache_image_embeds and not self.freeze_vit:
            raise UserError(
                "model.cache_image_embeds needs model.freeze_vit: features of an encoder that learns change"
            )
        if self.lora is not None and not (self.load_finetuned or self.load_pretrained):
            raise UserError("model.lora adapts a whole checkpoint: say model.load_pretrained or load_finetuned")


@dataclass
class AnnotationConfig:
    """Annotation files of one split: where they come from, their checksums, and where they lie.

    `member`: the url is a zip, and this is Karpathy's file in it, of which `storage` gets the split.
    """

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
    shuffle_buffer: int = limited(1000, "1 or more")
    vis_processor: ImageProcessors = field(default_factory=ImageProcessors)
    text_processor: TextProcessors = field(default_factory=TextProcessors)


@dataclass
class SelfCriticalConfig:
    """`run.self_critical:`, the keys of `run.objective: self_critical`."""

    samples: int = limited(5, "1 or more")
    temperature: float = limited(1.0, "more than 0")
    top_k: int | None = limited(None, "1 or more")
    top_p: float | None = limited(None, "more than 0, at most 1")
    baseline: str = "leave_one_out"
    cider_weight: float = limited(1.0, "0 or more")
    bleu_weight: float = limited(0.0, "0 or more")
    cross_entropy_weight: float = limited(0.0, "0 or more")

    def __post_init__(self) -> None:
        place = "run.self_critical"
        check_limits(place, self)
        one_of(f"{place}.baseline", self.baseline, ["leave_one_out", "greedy"])
        if self.samples == 1 and self.baseline == "leave_one_out":
            raise UserError(f"{place}.samples is 1; allowed: 2 or more with baseline leave_one_out, 1 with greedy")
        if not self.cider_weight + self.bleu_weight:
            raise UserError(f"{place}: cider_weight and bleu_weight are 0, so that nothing is rewarded")


@dataclass
class RunConfig:
    """`run:`"""

    task: str = "captioning"
    runner: str = "runner_base"

    # optimisation
    objective: str = "cross_entropy"
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    lr_sched: str = "cosine_step_lr"
    init_lr: float = limited(1e-5, "0 or more")
    min_lr: float = limited(0.0, "0 or more")
    warmup_lr: float | None = None
    warmup_steps: int = limited(0, "0 or more")
    lr_decay_rate: float | None = None
    weight_decay: float = limited(0.05, "0 or more")
    weight_decay_on: str = "matrices"
    beta2: float = limited(0.999, "0 or more, below 1")
    lr_scale: dict[str, float] = field(default_factory=dict)
    lr_layer_decay: float | None = limited(None, "more than 0, at most 1")
    max_grad_norm: float | None = limited(None, "more than 0")
    max_epoch: int = limited(5, "1 or more")
    max_iters: int | None = limited(None, "more than 0")
    iters_per_inner_epoch: int | None = limited(None, "more than 0")

    # batches
    batch_size_train: int = limited(16, "1 or more")
    batch_size_eval: int = limited(32, "1 or more")
    accum_grad_iters: int = limited(1, "1 or more")
    num_workers: int = limited(4, "0 or more")
    train_dataset_ratios: dict[str, float] | None = None
    shuffle: bool = True
    limit_train: int | None = limited(None, "more than 0")
    limit_val: int | None = limited(None, "more than 0")
    max_bad_images: int = limited(100, "0 or more")
    compile: bool = False
    tf32: bool = False
    seed: int = 42

    # splits and captions
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    valid_splits: list[str] = field(default_factory=lambda: ["val"])
    test_splits: list[str] = field(default_factory=list)
    evaluate: bool = False
    eval_precision: str = "fp32"
    gather_for_evaluation: bool = True
    num_beams: int = limited(3, "1 or more")
    max_len: int = 20
    min_len: int = limited(5, "0 or more")
    length_penalty: float = limited(1.0, "a number")
    repetition_penalty: float = limited(1.0, "more than 0")
    use_nucleus_sampling: bool = False
    top_p: float = limited(0.9, "more than 0, at most 1")
    temperature: float = limited(1.0, "more than 0")
    report_metric: bool = True
    annotation_file: str | None = None
    clip_score: str | None = None
    pac_score: str | None = None

    # output
    output_dir: str = "output"
    job_id: str | None = None
    expect_world_size: int | None = limited(None, "more than 0")
    resume_ckpt_path: str | None = None
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_freq: int = limited(50, "1 or more")
    val_freq: int = limited(1, "1 or more")
    val_steps: int | None = limited(None, "more than 0")
    save_freq: int = limited(1, "1 or more")
    save_steps: int | None = limited(None, "more than 0")
    save_minutes: float | None = limited(None, "more than 0")
    save_last: bool = True
    keep_last: int = limited(2, "1 or more")
    async_save: bool = False
    max_bad_steps: int = limited(20, "1 or more")
    stall_minutes: float = limited(30.0, "more than 0")
    collective_minutes: float = limited(30.0, "more than 0")

    def __post_init__(self) -> None:
        one_of("run.task", self.task, ["captioning"])
        one_of("run.runner", self.runner, ["runner_base", "runner_iter"])
        for tracker in self.trackers:
            one_of("run.trackers", tracker, list(TRACKERS))
        one_of("run.weight_decay_on", self.weight_decay_on, ["matrices", "all"])
        one_of("run.eval_precision", self.eval_precision, ["fp32", "bf16", "fp16"])
        check_limits("run", self)
        for prefix, scale in self.lr_scale.items():
            check(f"run.lr_scale.{prefix}", scale, scale > 0, "more than 0 (model.freeze_vit keeps weights still)")
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
            check_limits(place, dataset)
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
