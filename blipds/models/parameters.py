"""A model's parameters where they may be partitioned (ZeRO-3): their shapes, and how values get into them."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blipds.models.vision import layer_norm_eps

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


def fingerprint(encoder: nn.Module, name: str) -> str:
    """A hash of the encoder's weights, name and LayerNorm epsilon."""
    digest = hashlib.blake2b(f"{name} {layer_norm_eps(encoder)}".encode(), digest_size=16)
    for parameter_name, parameter in encoder.named_parameters():
        digest.update(f"{parameter_name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
