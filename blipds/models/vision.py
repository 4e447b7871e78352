"""The image encoder: any of timm's VisionTransformers, with all its tokens handed to the text decoder."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from blipds.errors import UserError

# BLIP paper, section 4.1: ViT-B/16 and ViT-L/16; the original code drops paths only in the large one.
BLIP_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("vit_base_patch16_224", {}),
    "large": ("vit_large_patch16_224", {"drop_path_rate": 0.1}),
}


def build_vision_transformer(vit_type: str, image_size: int, **vit_kwargs: Any) -> VisionTransformer:
    """Builds `base`, `large` or any timm VisionTransformer name, with random weights.

    Called with pixels (I, 3, image_size, image_size) it gives all tokens after the final norm, (I, N, width).
    `vit_kwargs` override timm's arguments (embed_dim, depth, num_heads, patch_size, drop_path_rate, ...).
    Raises UserError for a name or an argument that timm refuses.
    """
    name, defaults = BLIP_ENCODERS.get(vit_type, (vit_type, {}))
    if not timm.is_model(name):
        raise UserError(f"model.vit_type '{vit_type}' is neither {', '.join(BLIP_ENCODERS)} nor a model of timm's")
    try:
        vit = timm.create_model(
            name, pretrained=False, num_classes=0, global_pool="", img_size=image_size, **{**defaults, **vit_kwargs}
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"model.vit_type '{vit_type}' with image_size {image_size}, {vit_kwargs}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"model.vit_type '{vit_type}' is a {type(vit).__name__}; only VisionTransformers fit here")
    return vit


def checkpoint_last(blocks: Iterable[nn.Module], count: int | None, checkpoint_fn: Callable[..., Any]) -> None:
    """Recomputes the activations of the last `count` blocks (None: all) in the backward pass.

    `checkpoint_fn(function, *inputs)` runs the function and keeps only its inputs. Replacing `forward`, not the
    module, keeps the parameters' names, and DeepSpeed's hooks on `__call__`, as they are.
    """
    blocks = list(blocks)
    first = 0 if count is None else max(len(blocks) - count, 0)
    for block in blocks[first:]:
        block.forward = partial(checkpoint_fn, block.forward)
