"""Random weights: each tensor from a generator seeded by its own name.

So the numbers depend on seed and name alone: not on the order of building, nor on how ZeRO-3 partitions the model.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from blipds.models.blip.model import BlipCaption
from blipds.models.parameters import Write, whole_shape

Draw = Callable[[Tensor, torch.Generator], object]


def initialise(model: BlipCaption, seed: int, write: Write) -> None:
    """Draws every random weight anew, on the CPU in fp32, and hands it to `write(name, tensor)`.

    Image encoder as timm's default for VisionTransformers (models/vision_transformer.py, init_weights), text decoder as
    BERT (normal, `initializer_range`, biases 0). LayerNorm stays as modules start it: 1 and 0, which bf16 holds.
    """
    seen: set[int] = set()
    for name, parameter, draw in [*image_encoder_draws(model), *text_decoder_draws(model)]:
        if id(parameter) in seen:  # tied
            continue
        seen.add(id(parameter))
        tensor = torch.empty(whole_shape(parameter), device="cpu")
        draw(tensor, generator_for(seed, name))
        write(name, tensor)


def generator_for(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def image_encoder_draws(model: BlipCaption) -> Iterator[tuple[str, Tensor, Draw]]:
    """(name, parameter, how it is drawn) of what timm draws at random, and of the biases that it sets to 0."""
    for path, module in model.visual_encoder.named_modules(prefix="visual_encoder"):
        for key, parameter in module.named_parameters(recurse=False):
            draw: Draw | None = None
            if isinstance(module, nn.Linear):
                draw = truncated_normal if key == "weight" else zeros
            elif isinstance(module, nn.Conv2d):
                draw = uniform_by_fan_in(whole_shape(module.weight)[1:].numel())
            elif isinstance(module, LayerScale):  # a constant that bf16 would round
                draw = constant(module.init_values)
            elif path == "visual_encoder" and key == "pos_embed":
                draw = truncated_normal
            elif path == "visual_encoder" and key in ("cls_token", "reg_token"):
                draw = normal(1e-6)
            if draw is not None:
                yield f"{path}.{key}", parameter, draw


def text_decoder_draws(model: BlipCaption) -> Iterator[tuple[str, Tensor, Draw]]:
    weights = normal(model.text_decoder.config.initializer_range)
    for path, module in model.text_decoder.named_modules(prefix="text_decoder"):
        if isinstance(module, nn.Linear | nn.Embedding):
            yield f"{path}.weight", module.weight, weights
        if isinstance(module, nn.Linear):
            yield f"{path}.bias", module.bias, zeros


def truncated_normal(tensor: Tensor, generator: torch.Generator) -> object:
    return nn.init.trunc_normal_(tensor, std=0.02, generator=generator)


def normal(std: float) -> Draw:
    return lambda tensor, generator: tensor.normal_(std=std, generator=generator)


def uniform_by_fan_in(fan_in: int) -> Draw:
    """torch's own start for convolutions: uniform within 1 / sqrt(fan_in), weights and biases (nn.Conv2d's docs)."""
    return lambda tensor, generator: tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)


def constant(value: float) -> Draw:
    return lambda tensor, generator: tensor.fill_(value)


def zeros(tensor: Tensor, generator: torch.Generator) -> object:
    return tensor.zero_()
