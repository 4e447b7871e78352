"""Random weights: each tensor from a generator seeded by its own name.

So the numbers depend on seed and name alone: not on the order of building, nor on how ZeRO-3 partitions the model.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blipds.models.parameters import Write, whole_shape

Draw = Callable[..., object]  # draw(tensor, generator=...) fills the tensor
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
        draw(tensor, generator=generator_for(seed, name))
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


truncated_normal: Draw = partial(nn.init.trunc_normal_, std=0.02)


def normal(std: float) -> Draw:
    return partial(nn.init.normal_, std=std)


def uniform_by_fan_in(fan_in: int) -> Draw:
    """torch's own start for convolutions: uniform within 1 / sqrt(fan_in), weights and biases (nn.Conv2d's docs)."""
    return partial(nn.init.uniform_, a=-(fan_in**-0.5), b=fan_in**-0.5)


def constant(value: float) -> Draw:
    return lambda tensor, generator: tensor.fill_(value)


zeros = constant(0.0)
