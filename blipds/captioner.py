"""A captioner: model, tokenizer and decoding together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blipds import distributed
from blipds.config import Config
from blipds.data.loader import derive_seed
from blipds.data.tokenizer import CaptionTokenizer
from blipds.errors import UserError
from blipds.models import BlipCaption
from blipds.models.generation import GenerationConfig


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

    def caption(
        self, model: BlipCaption, images: dict[str, Tensor], names: Sequence[object], lockstep: bool = False
    ) -> list[str]:
        """One caption an image. `images` is {"pixel_values": (I, 3, H, W)} or {"image_embeds": (I, N, width)}.

        `names` seed nucleus sampling, image by image. `lockstep`: all ranks call it together, since the model's
        parameters are partitioned; then it is collective.
        """
        device = next(iter(images.values())).device
        prompt_ids = torch.tensor(self.tokenizer.prompt_ids, device=device)
        uniform = self.uniform(names).to(device) if self.generation.use_nucleus_sampling else None
        any_rank = distributed.any_rank if lockstep else None
        sequences = model.generate(
            prompt_ids, self.tokenizer.eos_token_id, self.generation, uniform, **images, any_rank=any_rank
        )
        return [self.tokenizer.decode(sequence) for sequence in sequences]

    def uniform(self, names: Sequence[object]) -> Tensor:
        """Random numbers (I, max_len) that depend on seed and image only, not on batch or rank."""
        seeds = (derive_seed(self.seed, "sample", name) for name in names)
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.rand(self.generation.max_len, generator=generator) for generator in generators])
