"""A captioner: model, tokenizer, image processor and decoding together, and what a checkpoint says about them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipds import distributed
from blipds.captioning.confidence import Caption, confidence_in
from blipds.config.run import load_run_config
from blipds.config.sections import Config, RunConfig
from blipds.data.datasets import build_image_processor
from blipds.data.images import Images
from blipds.data.loader import derive_seed
from blipds.data.processors import BlipImageEval, ImageProcessor
from blipds.data.tokenizer import CaptionTokenizer, caption_tokenizer
from blipds.engine import DTYPES
from blipds.errors import UserError, short_of_memory
from blipds.files.paths import user_path
from blipds.models import build_model
from blipds.models.adapter_files import holds_adapters
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.generation import GenerationConfig
from blipds.models.parameters import fingerprint
from blipds.models.protocol import CaptioningModel, CheckpointFn, keep_activations
from blipds.models.weights import base_of, fill_image_statistics, load_weights, open_base, open_weights
from blipds.registry import ARCHS


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

    def check_model(self, model: CaptioningModel) -> None:
        """UserError where the model cannot hold the captions that are asked for, or the tokenizer's words."""
        longest, beams = self.generation.max_len, self.generation.num_beams
        if model.max_positions is not None and longest > model.max_positions:
            raise UserError(f"run.max_len is {longest}, but the text decoder has {model.max_positions} positions")
        if model.vocab_size is not None and len(self.tokenizer) > model.vocab_size:
            raise UserError(
                f"model.tokenizer knows {len(self.tokenizer):,} tokens, but the text decoder has embeddings for "
                f"{model.vocab_size:,}"
            )
        if model.vocab_size is not None and 2 * beams > model.vocab_size:
            raise UserError(f"run.num_beams is {beams}, more than half of the vocabulary ({model.vocab_size:,} tokens)")

    @classmethod
    def from_config(cls, config: Config, num_captions: int = 1) -> "Captioner":
        names = [field.name for field in fields(GenerationConfig) if field.name != "num_captions"]
        generation = GenerationConfig(num_captions=num_captions, **{name: getattr(config.run, name) for name in names})
        tokenizer = caption_tokenizer(config.model)
        generation = replace(generation, max_len=tokenizer.longest(generation.max_len))
        return cls(tokenizer, generation, config.run.seed)

    def caption(
        self, model: CaptioningModel, images: dict[str, Tensor], names: Sequence[object], lockstep: bool = False
    ) -> list[Caption]:
        """The best caption of each image, with the model's confidence. Arguments as `captions`; collective as that."""
        return [captions[0] for captions in self.captions(model, images, names, lockstep, scores=True)]

    def captions(
        self,
        model: CaptioningModel,
        images: dict[str, Tensor],
        names: Sequence[object],
        lockstep: bool = False,
        scores: bool = False,
    ) -> list[list[Caption]]:
        """`generation.num_captions` captions of each image, best first where they are beams.

        `images`: {"pixel_values": (I, 3, H, W)} or {"image_embeds": (I, N, width)}. `names` seed nucleus sampling,
        image by image. `lockstep`: all ranks call it together, since the model's parameters are partitioned; then it is
        collective. `scores`: with the model's confidence in each.

        UserError where a GPU has too little memory.
        """
        with few_images(len(names)):
            return self._captions(model, images, names, lockstep, scores)

    @torch.no_grad()
    def _captions(
        self,
        model: CaptioningModel,
        images: dict[str, Tensor],
        names: Sequence[object],
        lockstep: bool,
        scores: bool,
    ) -> list[list[Caption]]:
        device = next(iter(images.values())).device
        prompt_ids = torch.tensor(self.tokenizer.prompt_ids, device=device)
        any_rank = distributed.any_rank if lockstep else None
        count = self.generation.num_captions

        def generate(images: dict[str, Tensor], uniform: Tensor | None = None) -> list[Caption]:
            log_probs: list[list[float]] | None = [] if scores else None
            options: dict[str, Any] = {**images, "any_rank": any_rank, "log_probs": log_probs}
            end = self.tokenizer.eos_token_id
            sequences = model.generate(prompt_ids, end, self.generation, uniform, **options)
            texts = [self.tokenizer.decode(sequence) for sequence in sequences]
            if log_probs is None:
                return [Caption(text) for text in texts]
            found = map(partial(confidence_in, self.tokenizer), sequences, log_probs)
            return [Caption(*pair) for pair in zip(texts, found, strict=True)]

        if not self.generation.use_nucleus_sampling:
            captions = generate(images)
            return [captions[first : first + count] for first in range(0, len(captions), count)]
        if "pixel_values" in images:
            images = {"image_embeds": model.image_encoder(images["pixel_values"])}  # once for all draws
        draws = []
        for draw in range(count):
            uniform = self.uniform(names if draw == 0 else [(name, draw) for name in names])
            draws.append(generate(images, uniform.to(device)))
        return [list(captions) for captions in zip(*draws, strict=True)]

    def uniform(self, names: Sequence[object]) -> Tensor:
        """Random numbers (I, max_len) that depend on seed and image only, not on batch or rank."""
        seeds = (derive_seed(self.seed, "sample", name) for name in names)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.rand(self.generation.max_len, generator=generator) for generator in generators])


@contextmanager
def few_images(count: int) -> Iterator[None]:
    """UserError where a GPU's memory does not take a batch of `count` images."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = "run.batch_size_eval, or --batch-size of launch/caption.py"
        raise UserError(f"{short_of_memory(error)}: {count} images at once are too many; lower {smaller}") from error


# --- what captions images without a dataset -------------------------------------------------------------------------


@dataclass
class CaptionModel:
    """A model with its weights, on its device, and all that turns image files into captions."""

    model: CaptioningModel
    captioner: Captioner
    image_processor: ImageProcessor
    device: torch.device
    dtype: torch.dtype
    weights: str  # a hash of them: two checkpoints with the same one give the same captions
    scores: bool = False  # whether captions come with the model's confidence in them

    @property
    def num_captions(self) -> int:
        """Of an image, at most."""
        return self.captioner.generation.num_captions

    @torch.inference_mode()
    def captions(self, images: Images, names: Sequence[str]) -> list[list[Caption]]:
        inputs = images.model_inputs(self.device, self.dtype)
        return self.captioner.captions(self.model, inputs, names, scores=self.scores)

    def settings(self) -> dict[str, Any]:
        """All that captions depend on beside the images, as JSON."""
        decoding = self.captioner.generation
        return {
            "weights": self.weights,
            "precision": str(self.dtype).removeprefix("torch."),
            "prompt": self.captioner.tokenizer.prompt,
            **asdict(decoding),
            **({"seed": self.captioner.seed} if decoding.use_nucleus_sampling else {}),
            **({"scores": True} if self.scores else {}),
            "images": repr(self.image_processor),
        }


@dataclass
class CaptionRecipe:
    """An opened checkpoint, and how its captioner is built: `build(config.model, checkpoint_fn)`."""

    stored: StoredTensors
    config: Config
    image_processor: ImageProcessor
    build: Callable[[Any, CheckpointFn], CaptioningModel]

    def with_decoding(self, **given: Any) -> "CaptionRecipe":
        """The same with values of `run` and `model` keys that are not None; UserError as in a run config."""
        names = {field.name for field in fields(RunConfig)}
        run = {key: value for key, value in given.items() if value is not None and key in names}
        model = {key: value for key, value in given.items() if value is not None and key not in names}
        # datasets are left out: what they say about prompts is about their training
        config = Config(replace(self.config.model, **model), run=replace(self.config.run, **run), env=self.config.env)
        return replace(self, config=config)


def load_caption_model(
    recipe: CaptionRecipe,
    num_captions: int,
    device: torch.device,
    precision: str,
    say: Callable[[str], None],
    scores: bool = False,
) -> CaptionModel:
    """Builds what `recipe` describes and loads its checkpoint. `say(line)` tells what was loaded."""
    captioner = Captioner.from_config(recipe.config, num_captions)
    model = recipe.build(recipe.config.model, keep_activations)
    captioner.check_model(model)
    load_weights(model, recipe.stored, say)
    model.eval().requires_grad_(False)
    weights = fingerprint(model, model.identity(), model.constants())
    dtype = DTYPES[precision]
    return CaptionModel(model.to(device, dtype), captioner, recipe.image_processor, device, dtype, weights, scores)


def caption_recipe(
    location: str, cfg_path: Path | None, options: Sequence[str], base: str | None = None
) -> CaptionRecipe:
    """How a checkpoint's captioner is built: by the run config given, else by what lies beside or in the checkpoint.

    A checkpoint of a run: <run>/config.yaml. Others: what an arch knows them by (`Arch.describe`), such as a
    transformers folder or hub name, a .pth of `launch/export.py`, BLIP's and LAVIS's own base and large; of adapters,
    their base (`base`, if it is not where they say). UserError where nothing states the geometry.
    """
    if cfg_path is None and (run_dir := run_directory(user_path(location))):
        cfg_path = run_dir / "config.yaml"
    if cfg_path is not None:
        config, _ = load_run_config(cfg_path, options)
        fill_image_statistics(config)
        stored = open_weights(location, user_path(config.env.cache_root), base or base_of(config.model))
        return CaptionRecipe(stored, config, image_processor_of(config), build_model)
    if options:
        raise UserError("--options change a run config, and there is none: give --cfg-path too")
    stored = open_weights(location, user_path(Config().env.cache_root), base)
    whole = open_base(stored) if holds_adapters(stored) else stored
    found = next(filter(None, (ARCHS[name]().describe(whole) for name in ARCHS.names())), None)
    if found is None:
        raise UserError(
            f"--checkpoint {location}: nothing beside it or in it says how its model is built, and it is neither BLIP "
            "base nor large; give the run config with --cfg-path"
        )
    statistics = {key: value for key, value in (("mean", found.mean), ("std", found.std)) if value is not None}
    processor = BlipImageEval(found.config.image_size, **statistics)
    recipe = CaptionRecipe(stored, Config(model=found.config), processor, found.build)
    try:
        return recipe.with_decoding(**(found.decoding or {}))
    except TypeError as error:
        raise UserError(f"{location}: its decoding settings cannot be used ({error})") from error


def image_processor_of(config: Config) -> ImageProcessor:
    """The evaluation processor that all datasets of a config share. UserError where their mean or std differ."""
    size, datasets = config.model.image_size, config.datasets.values()
    processors = [build_image_processor(dataset.vis_processor.eval, size) for dataset in datasets]
    statistics = {(processor.mean, processor.std) for processor in processors}
    if len(statistics) > 1:
        raise UserError(f"the datasets normalise images with different mean and std ({statistics}); one must be chosen")
    return processors[0] if processors else BlipImageEval(size)


def run_directory(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is of: <run>/checkpoints/step_N, or the weights file in it."""
    for folder in (checkpoint, checkpoint.parent):
        if folder.parent.name == "checkpoints" and (folder.parent.parent / "config.yaml").is_file():
            return folder.parent.parent
    return None
