"""A captioner: model, tokenizer, image processor and decoding together, and what a checkpoint says about them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds import distributed
from blipds.config.run import Config, ModelConfig, RunConfig, load_run_config
from blipds.data.datasets import build_image_processor
from blipds.data.images import Images
from blipds.data.loader import derive_seed
from blipds.data.processors import BlipImageEval, ImageProcessor
from blipds.data.tokenizer import CaptionTokenizer
from blipds.engine import DTYPES
from blipds.errors import UserError
from blipds.models import BlipCaption, build_from_geometry, build_model
from blipds.models.blip.geometry import BlipGeometry, geometry_from_transformers_config, geometry_of, published_geometry
from blipds.models.checkpoints import Checkpoint, open_checkpoint
from blipds.models.generation import GenerationConfig
from blipds.models.parameters import fingerprint
from blipds.models.weights import fill_image_statistics, load_weights, locate

# What a transformers folder's generation_config.json calls the run config's keys.
DECODING_KEYS = {
    "num_beams": "num_beams",
    "max_length": "max_len",
    "min_length": "min_len",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "do_sample": "use_nucleus_sampling",
    "top_p": "top_p",
    "temperature": "temperature",
}


class Captioner:
    """Turns images into captions. The model comes with each call: during training it is the engine's."""

    def __init__(self, tokenizer: CaptionTokenizer, generation: GenerationConfig, seed: int) -> None:
        if generation.max_len <= len(tokenizer.prompt_ids):
            raise UserError(
                f"run.max_len is {generation.max_len}, but it counts the prompt, which has "
                f"{len(tokenizer.prompt_ids)} tokens"
            )
        self.tokenizer = tokenizer
        self.generation = generation
        self.seed = seed

    @classmethod
    def from_config(cls, config: Config, num_captions: int = 1) -> "Captioner":
        run = config.run
        generation = GenerationConfig(
            num_beams=run.num_beams,
            max_len=run.max_len,
            min_len=run.min_len,
            length_penalty=run.length_penalty,
            repetition_penalty=run.repetition_penalty,
            use_nucleus_sampling=run.use_nucleus_sampling,
            top_p=run.top_p,
            temperature=run.temperature,
            num_captions=num_captions,
        )
        tokenizer = CaptionTokenizer(config.model.tokenizer, config.model.prompt, config.model.max_txt_len)
        return cls(tokenizer, generation, run.seed)

    def caption(
        self, model: BlipCaption, images: dict[str, Tensor], names: Sequence[object], lockstep: bool = False
    ) -> list[str]:
        """The best caption of each image. `images`: {"pixel_values": (I, 3, H, W)} or {"image_embeds": (I, N, width)}.

        `names` seed nucleus sampling, image by image. `lockstep`: all ranks call it together, since the model's
        parameters are partitioned; then it is collective.
        """
        return [captions[0] for captions in self.captions(model, images, names, lockstep)]

    @torch.no_grad()
    def captions(
        self, model: BlipCaption, images: dict[str, Tensor], names: Sequence[object], lockstep: bool = False
    ) -> list[list[str]]:
        """`generation.num_captions` captions of each image, best first where they are beams. Arguments as `caption`."""
        device = next(iter(images.values())).device
        prompt_ids = torch.tensor(self.tokenizer.prompt_ids, device=device)
        any_rank = distributed.any_rank if lockstep else None
        eos_token_id, count = self.tokenizer.eos_token_id, self.generation.num_captions
        if not self.generation.use_nucleus_sampling:
            sequences = model.generate(prompt_ids, eos_token_id, self.generation, **images, any_rank=any_rank)
            texts = [self.tokenizer.decode(sequence) for sequence in sequences]
            return [texts[first : first + count] for first in range(0, len(texts), count)]
        if "pixel_values" in images:
            images = {"image_embeds": model.visual_encoder(images["pixel_values"])}  # once for all draws
        draws = []
        for draw in range(count):
            uniform = self.uniform(names if draw == 0 else [(name, draw) for name in names]).to(device)
            sequences = model.generate(prompt_ids, eos_token_id, self.generation, uniform, **images, any_rank=any_rank)
            draws.append([self.tokenizer.decode(sequence) for sequence in sequences])
        return [list(texts) for texts in zip(*draws, strict=True)]

    def uniform(self, names: Sequence[object]) -> Tensor:
        """Random numbers (I, max_len) that depend on seed and image only, not on batch or rank."""
        seeds = (derive_seed(self.seed, "sample", name) for name in names)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.rand(self.generation.max_len, generator=generator) for generator in generators])


# --- what captions images without a dataset -------------------------------------------------------------------------


@dataclass
class CaptionModel:
    """A model with its weights, on its device, and all that turns image files into captions."""

    model: BlipCaption
    captioner: Captioner
    image_processor: ImageProcessor
    device: torch.device
    dtype: torch.dtype
    weights: str  # a hash of them: two checkpoints with the same one give the same captions

    def captions(self, images: Images, names: Sequence[object]) -> list[list[str]]:
        return self.captioner.captions(self.model, images.model_inputs(self.device, self.dtype), names)

    def settings(self) -> dict[str, Any]:
        """All that captions depend on beside the images, as JSON."""
        processor, tokenizer, decoding = self.image_processor, self.captioner.tokenizer, self.captioner.generation
        seed = {"seed": self.captioner.seed} if decoding.use_nucleus_sampling else {}
        return {
            "weights": self.weights,
            "precision": str(self.dtype).removeprefix("torch."),
            "prompt": tokenizer.prompt,
            **asdict(decoding),
            **seed,
            "images": repr(processor),
        }


def load_caption_model(
    plan: "CaptionPlan", num_captions: int, device: torch.device, precision: str, say: Callable[[str], None]
) -> CaptionModel:
    """Builds what `plan` describes and loads its checkpoint. `say(line)` tells what was loaded."""
    config = plan.config
    captioner = Captioner.from_config(config, num_captions)
    if plan.geometry is not None:
        model = build_from_geometry(plan.geometry)
    else:
        model = build_model(config.model, checkpoint_fn=lambda function, *inputs: function(*inputs))
    load_weights(model, plan.location, Path(config.env.cache_root).expanduser(), say)
    model.eval()
    weights = fingerprint(model, f"{geometry_of(model)}")
    dtype = DTYPES[precision]
    return CaptionModel(model.to(device, dtype), captioner, plan.image_processor, device, dtype, weights)


@dataclass
class CaptionPlan:
    """What is to be loaded and how: `geometry` where the checkpoint states it, else it is `config.model`'s."""

    location: str
    config: Config
    image_processor: ImageProcessor
    geometry: BlipGeometry | None = None

    def with_decoding(self, **given: Any) -> "CaptionPlan":
        """The same with values of `run` and `model` keys that are not None; UserError as in a run config."""
        names = {field.name for field in fields(RunConfig)}
        wanted = {key: value for key, value in given.items() if value is not None}
        run = replace(self.config.run, **{key: value for key, value in wanted.items() if key in names})
        model = replace(self.config.model, **{key: value for key, value in wanted.items() if key not in names})
        return replace(self, config=replace_sections(self.config, model, run))


def replace_sections(config: Config, model: ModelConfig, run: RunConfig) -> Config:
    """Datasets are left out: what they say about prompts is about their training."""
    return Config(model=model, run=run, env=config.env)


def plan_captions(location: str, cfg_path: Path | None, options: Sequence[str]) -> CaptionPlan:
    """How the checkpoint's captioner is built: by the run config given, else by what lies beside or in the checkpoint.

    A checkpoint of a run: <run>/config.yaml. A transformers folder or hub name: its config.json, processor, tokenizer
    and generation_config.json. A .pth of `launch/export.py`: the model section that it carries. BLIP's and LAVIS's own
    base and large: known by their shapes. UserError where nothing states the geometry.
    """
    run_dir = run_directory(Path(location).expanduser())
    if cfg_path is None and run_dir is not None:
        cfg_path = run_dir / "config.yaml"
    if cfg_path is not None:
        config, _ = load_run_config(cfg_path, options)
        fill_image_statistics(config)
        return CaptionPlan(location, config, image_processor_of(config))
    if options:
        raise UserError("--options change a run config, and there is none: give --cfg-path too")
    config = Config()
    path = locate(location, Path(config.env.cache_root).expanduser())
    checkpoint = open_checkpoint(path)
    if checkpoint.kind == "transformers" and checkpoint.config:
        return plan_of_transformers(location, path, checkpoint)
    if "vit_type" in checkpoint.config and not checkpoint.config.get("vit_pretrained"):
        names = {field.name for field in fields(ModelConfig)}
        try:
            model = ModelConfig(**{key: value for key, value in checkpoint.config.items() if key in names})
        except TypeError as error:
            raise UserError(f"--checkpoint {location}: the config in it is none of a model ({error})") from error
        return CaptionPlan(location, replace_sections(config, model, config.run), BlipImageEval(model.image_size))
    geometry = published_geometry({name: checkpoint.shape(name) for name in checkpoint.names()})
    if geometry is None:
        raise UserError(
            f"--checkpoint {location}: nothing beside it or in it says how its model is built, and it is neither BLIP "
            "base nor large; give the run config with --cfg-path"
        )
    return CaptionPlan(location, config, BlipImageEval(geometry.image_size), geometry)


def plan_of_transformers(location: str, folder: Path, checkpoint: Checkpoint) -> CaptionPlan:
    from transformers import BlipImageProcessor

    geometry = geometry_from_transformers_config(checkpoint.config)
    statistics: dict[str, Any] = {}
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        processor = BlipImageProcessor.from_pretrained(folder)
        statistics = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    config = Config(model=ModelConfig(tokenizer=tokenizer, image_size=geometry.image_size))
    plan = CaptionPlan(location, config, BlipImageEval(geometry.image_size, **statistics), geometry)
    generation = folder / "generation_config.json"
    if not generation.is_file():
        return plan
    try:
        stated = json.loads(generation.read_text(encoding="utf-8"))
        decoding = {ours: stated[theirs] for theirs, ours in DECODING_KEYS.items() if theirs in stated}
        return plan.with_decoding(**decoding)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{generation}: {error}") from error


def image_processor_of(config: Config) -> ImageProcessor:
    """The evaluation processor that all datasets of a config share. UserError where their mean or std differ."""
    if not config.datasets:
        return BlipImageEval(config.model.image_size)
    processors = [
        build_image_processor(dataset.vis_processor.eval, config.model.image_size)
        for dataset in config.datasets.values()
    ]
    statistics = {(processor.mean, processor.std) for processor in processors}
    if len(statistics) > 1:
        raise UserError(f"the datasets normalise images with different mean and std ({statistics}); one must be chosen")
    return processors[0]


def run_directory(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is of: <run>/checkpoints/step_N, or the weights file in it."""
    for folder in (checkpoint, checkpoint.parent):
        if folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file():
            return folder.parent.parent
    return None
