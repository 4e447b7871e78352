"""Random weights: each tensor from a generator seeded by its own name.

So the numbers depend on seed and name alone: not on the order of building, nor on how ZeRO-3 partitions the model.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from blipds.models.parameters import Write, whole_shape

Draw = Callable[[Tensor, torch.Generator], object]
RandomWeight = tuple[str, Tensor, Draw]  # (name, parameter, how it is drawn)


def initialise(model: Any, seed: int, write: Write) -> None:
    """Draws every random weight of a CaptioningModel anew, on the CPU in fp32, and hands it to `write(name, tensor)`.

    LayerNorm stays as modules start it: 1 and 0, which bf16 holds.
    """
    seen: set[int] = set()
    for name, parameter, draw in model.random_weights():
        if id(parameter) in seen:  # tied
            continue
        seen.add(id(parameter))
        tensor = torch.empty(whole_shape(parameter), device="cpu")
        draw(tensor, generator_for(seed, name))
        write(name, tensor)


def generator_for(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def default_random_weights(model: nn.Module) -> Iterator[RandomWeight]:
    """Matrices by their fan-in, as torch starts linear layers; biases 0; the rest (norms) as it is."""
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) > 1:
            yield name, parameter, uniform_by_fan_in(shape[1:].numel())
        elif "bias" in name.rpartition(".")[2]:
            yield name, parameter, zeros


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
