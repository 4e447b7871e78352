"""A captioner: model, tokenizer and decoding together, and the weights that it starts from."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from blipds.config import Config, ModelConfig
from blipds.data.loader import derive_seed
from blipds.data.tokenizer import CaptionTokenizer
from blipds.download import fetch
from blipds.errors import UserError
from blipds.models import BlipCaption
from blipds.models.checkpoints import load_into, open_checkpoint
from blipds.models.generation import GenerationConfig


class Captioner:
    """Turns pixels into captions. The model comes with each call: during training it is the engine's."""

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
    def from_config(cls, config: Config) -> "Captioner":
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
        )
        tokenizer = CaptionTokenizer(config.model.tokenizer, config.model.prompt, config.model.max_txt_len)
        return cls(tokenizer, generation, run.seed)

    def caption(self, model: BlipCaption, pixel_values: Tensor, names: Sequence[object]) -> list[str]:
        """One caption an image, pixel_values (I, 3, H, W). `names` seed nucleus sampling, image by image."""
        device = pixel_values.device
        prompt_ids = torch.tensor(self.tokenizer.prompt_ids, device=device)
        uniform = self.uniform(names).to(device) if self.generation.use_nucleus_sampling else None
        sequences = model.generate(pixel_values, prompt_ids, self.tokenizer.eos_token_id, self.generation, uniform)
        return [self.tokenizer.decode(sequence) for sequence in sequences]

    def uniform(self, names: Sequence[object]) -> Tensor:
        """Random numbers (I, max_len) that depend on seed and image only, not on batch or rank."""
        seeds = (derive_seed(self.seed, "sample", name) for name in names)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.rand(self.generation.max_len, generator=generator) for generator in generators])


def initial_weights(config: ModelConfig) -> str | None:
    """Where the weights come from, as in LAVIS: `finetuned` if load_finetuned, else `pretrained` if load_pretrained."""
    for wanted, key in ((config.load_finetuned, "finetuned"), (config.load_pretrained, "pretrained")):
        if wanted:
            location: str | None = getattr(config, key)
            if location is None:
                raise UserError(f"model.load_{key} is true, but model.{key} names no checkpoint; give it, or say false")
            return location
    return None


def load_weights(model: BlipCaption, location: str, cache_root: Path, say: Callable[[str], None]) -> None:
    """Loads a checkpoint of any kind, from a path, a URL or a hub name, strictly: each tensor finds its parameter."""
    checkpoint = open_checkpoint(locate(location, cache_root))
    parameters = dict(model.named_parameters())

    def write(name: str, tensor: Tensor) -> None:
        with torch.no_grad():
            parameters[name][: len(tensor)].copy_(tensor) if tensor.dim() else parameters[name].copy_(tensor)

    encoder = model.visual_encoder
    report = load_into(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        checkpoint,
        write,
        num_prefix_positions=0 if encoder.no_embed_class else encoder.num_prefix_tokens,
    )
    say(f"weights: {report.kind} checkpoint {location}, {len(report.written)} tensors")
    for note in report.notes:
        say(f"  {note}")


def locate(location: str, cache_root: Path) -> Path:
    """A path as it is; a URL downloaded once; a hub name (owner/name) by huggingface_hub's cache."""
    if "://" in location or Path(location).expanduser().exists() or location.count("/") != 1:
        return fetch(location, cache_root / "checkpoints")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(location, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{location}: no such file, and not to be had from the hub ({reason})") from error
