"""The frozen language model: one of transformers, from a folder or the hub, without its weights."""

from typing import Any

import torch
from torch import Tensor, nn

from blipds.errors import UserError


def language_config(source: str) -> Any:
    """The transformers config of a language model, in a folder or on the hub; of a captioner's folder, its part."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"the language model '{source}': {' '.join(str(error).split())[:300]}") from error
    return getattr(config, "text_config", config)


def build_language_model(auto_model: Any, config: Any, dtype: torch.dtype) -> Any:
    """The language model of a config, frozen, without its weights: every one of them must be written.

    auto_model: one of transformers' Auto classes. dtype: what the weights are held in from the start, since a whole
    copy in fp32 would cost twice the memory. ValueError where the class has no model of such a config.
    """
    from transformers.initialization import no_init_weights, no_tie_weights

    with no_init_weights(), no_tie_weights():  # to draw them costs minutes, and indexes what ZeRO-3 has shared out
        model: Any = auto_model.from_config(config, dtype=dtype)
    if has_own_head(config):
        model.all_tied_weights_keys.pop("lm_head.weight", None)
    model.tie_weights(recompute_mapping=False)
    for module in model.modules():
        keep_buffers(module)
    return model.requires_grad_(False)


def has_own_head(config: Any) -> bool:
    """Whether a T5's words out are not its words in: T5 1.1, Flan-T5 and mT5, of which transformers 5 ties all."""
    return config.is_encoder_decoder and not getattr(config, "scale_decoder_outputs", False)


def keep_buffers(module: nn.Module) -> None:
    """Undoes what engines do to buffers: rotary frequencies rounded to bf16 would turn far words by tenths of a radian.

    transformers keeps them in fp32 in every precision.
    """
    exact = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}

    def restore(module: nn.Module, inputs: Any) -> None:
        for name, buffer in exact.items():
            given = module.get_buffer(name)
            if given.dtype != buffer.dtype:
                setattr(module, name, buffer.to(given.device))

    if exact:
        module.register_forward_pre_hook(restore)


class CachedBeams:
    """What decoders with a cache share: all beams of an image are one row of it (`generation.StepDecoder`).

    What stands before the captions is there once, and what every token that any beam has tried left in the cache stays
    where it is. `seen` (J, K, S): which of the S places are of beam k. To reorder beams costs a gather of booleans; to
    keep all tokens, K places a step.
    """

    seen: Tensor

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def see(self, images: int, beams: int, length: int, device: torch.device) -> None:
        """All beams see the `length` places that are in the cache."""
        self.seen = torch.ones(images, beams, length, dtype=torch.bool, device=device)

    def grow(self, dtype: torch.dtype) -> Tensor:
        """A token more of every beam, which it alone sees; what is added to scores of attention, (J, 1, K, S)."""
        images, beams, _ = self.seen.shape
        itself = torch.eye(beams, dtype=torch.bool, device=self.seen.device).expand(images, -1, -1)
        self.seen = torch.cat([self.seen, itself], dim=-1)
        return torch.zeros_like(self.seen, dtype=dtype).masked_fill_(~self.seen, -torch.inf).unsqueeze(1)

    def reorder(self, parents: Tensor) -> None:
        self.seen = self.seen.gather(1, parents.unsqueeze(-1).expand_as(self.seen))

    def keep(self, images: Tensor) -> None:
        self.cache.batch_select_indices(images)
        self.seen = self.seen[images]


def cache_argument(parameters: Any, cache: Any) -> dict[str, Any]:
    """The cache under its name among the `parameters` of a call: transformers 5.2x renamed it."""
    return {"cache" if "cache" in parameters else "past_key_values": cache}
