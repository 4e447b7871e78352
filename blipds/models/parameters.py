"""A model's parameters where they may be partitioned (ZeRO-3): their shapes, and how values get into them."""

import hashlib
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


def fingerprint(module: nn.Module, *parts: object) -> str:
    """A hash of a module's weights, and of what no weight shows (`parts`)."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=16)
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
