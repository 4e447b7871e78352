"""Where numbers stop being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def first_non_finite(model: nn.Module) -> Iterator[list[str]]:
    """Fills the list with the first place of a forward and backward pass inside where a number is not finite.

    It looks at the output of every module and at the gradients that come back to it: a device sync each, so this is for
    a run that ends anyway.
    """
    found: list[str] = []

    def look(tensor: Tensor, what: str) -> None:
        if not found and not bool(torch.isfinite(tensor).all()):
            found.append(what)

    def watch(name: str, module: nn.Module) -> Any:
        what = f"{name or 'the model'} ({type(module).__name__})"

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    look(tensor, f"the output of {what}")
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: look(gradient, f"the gradient at the output of {what}"))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
