"""A model's parameters where they may be partitioned (ZeRO-3): their shapes, and how values get into them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# write(name, tensor): copies into a parameter, or into its first rows where the tensor has fewer
Write = Callable[[str, Tensor], None]


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter: a partitioned one looks empty, and DeepSpeed notes the true shape on it."""
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def copy_into(model: nn.Module, name: str, tensor: Tensor) -> None:
    """The `Write` of a model whose parameters are whole."""
    parameter = model.get_parameter(name)
    (parameter[: len(tensor)] if tensor.dim() else parameter).copy_(tensor)
