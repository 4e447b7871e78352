"""The image encoder: any of timm's VisionTransformers, with all its tokens handed to the text decoder."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.layers import LayerScale
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blipds.errors import UserError
from blipds.models.initialisation import (
    Draw,
    RandomWeight,
    constant,
    normal,
    truncated_normal,
    uniform_by_fan_in,
    zeros,
)
from blipds.models.parameters import whole_shape

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
    if refused := sorted({"weight_init", "fix_init"} & vit_kwargs.keys()):
        raise UserError(f"model.vit_kwargs.{refused[0]}: random weights have timm's default start, and no other")
    try:
        vit = timm.create_model(
            name, pretrained=False, num_classes=0, global_pool="", img_size=image_size, **{**defaults, **vit_kwargs}
        )
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"model.vit_type '{vit_type}' with image_size {image_size}, {vit_kwargs}: {error}") from error
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"model.vit_type '{vit_type}' is a {type(vit).__name__}; only VisionTransformers fit here")
    for patch in vit.patch_embed.patch_size:
        if image_size % patch:  # the rows and columns left over would never be looked at
            below = image_size // patch * patch
            raise UserError(
                f"model.image_size is {image_size}, no multiple of the image encoder's patches of {patch} pixels; "
                f"the nearest sizes are {f'{below} and ' * (below > 0)}{below + patch}"
            )
    return vit


def checkpoint_last(blocks: Iterable[nn.Module], count: int | None, checkpoint_fn: Callable[..., Any]) -> None:
    """Recomputes the activations of the last `count` blocks (None: all) in the backward pass.

    `checkpoint_fn(function, *inputs)` runs the function and keeps only its inputs. Replacing `forward`, not the
    module, keeps the parameters' names, and DeepSpeed's hooks on `__call__`, as they are.
    """
    blocks = list(blocks)
    first = 0 if count is None else max(len(blocks) - count, 0)
    for block in blocks[first:]:
        block.forward = partial(_recomputed, checkpoint_fn, block.forward)


def _recomputed(checkpoint_fn: Callable[..., Any], forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    return checkpoint_fn(partial(forward, **named) if named else forward, *inputs)


# What comes before the image encoder's first block; `norm_pre` is CLIP's.
BEFORE_THE_BLOCKS = ("cls_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")


def block_of(name: str) -> int | None:
    """`CaptioningModel.encoder_layer` of a model that calls its VisionTransformer `visual_encoder`.

    As BEiT's and MAE's finetuning count them; the final norm is behind the blocks.
    """
    part = name.removeprefix("visual_encoder.")
    if part == name:
        return None
    if part.startswith("blocks."):
        return int(part.split(".")[1]) + 1
    return 0 if part.startswith(BEFORE_THE_BLOCKS) else None


def random_vision_weights(encoder: VisionTransformer, prefix: str) -> Iterator[RandomWeight]:
    """timm's default start for VisionTransformers (models/vision_transformer.py, init_weights), names from `prefix`."""
    for path, module in encoder.named_modules(prefix=prefix):
        for key, parameter in module.named_parameters(recurse=False):
            draw: Draw | None = None
            if isinstance(module, nn.Linear):
                draw = truncated_normal if key == "weight" else zeros
            elif isinstance(module, nn.Conv2d):
                draw = uniform_by_fan_in(whole_shape(module.weight)[1:].numel())
            elif isinstance(module, LayerScale):  # a constant that bf16 would round
                draw = constant(module.init_values)
            elif path == prefix and key == "pos_embed":
                draw = truncated_normal
            elif path == prefix and key in ("cls_token", "reg_token"):
                draw = normal(1e-6)
            if draw is not None:
                yield f"{path}.{key}", parameter, draw


# --- timm's own weights ----------------------------------------------------------------------------------------------


def pretrained_encoder(vit_type: str, hub_name: str | None = None) -> dict[str, Tensor]:
    """The weights that timm has for the named encoder, or those of a hub repository in timm's layout; timm's names.

    timm finds, downloads and caches them, and renames what other projects wrote; pickles with `weights_only=True`.
    They come at the image size they were trained with. Raises UserError where they cannot be had.
    """
    name = f"hf-hub:{hub_name}" if hub_name else BLIP_ENCODERS.get(vit_type, (vit_type, {}))[0]
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the network, of the hub, of timm's checks: all of them are "not to be had"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"model.vit_pretrained: timm has no weights for '{hub_name or vit_type}' ({reason})") from error


def encoder_mean_std(vit_type: str, hub_name: str | None = None) -> tuple[list[float], list[float]] | None:
    """What pixels are normalised with for timm's weights, by timm's own table; None for a name that it has not.

    hub_name: `timm/<name>.<tag>`, whose mean and std may differ from those of the encoder's default tag. No network.
    """
    names = [hub_name.partition("/")[2]] if hub_name else []
    for name in [*names, BLIP_ENCODERS.get(vit_type, (vit_type, {}))[0]]:
        with suppress(RuntimeError, ValueError):
            if found := get_pretrained_cfg(name):
                return [float(value) for value in found.mean], [float(value) for value in found.std]
    return None


def hub_name_of(source: bool | str | None) -> str | None:
    """owner/name, where that is not a path that exists."""
    if not isinstance(source, str) or "://" in source or source.count("/") != 1 or source[0] in "./~":
        return None
    return None if Path(source).exists() or Path(source).suffix in (".safetensors", ".pth", ".pt", ".bin") else source


# --- LayerNorm epsilon -----------------------------------------------------------------------------------------------


def layer_norm_eps(encoder: nn.Module) -> float | None:
    """The epsilon of all its LayerNorms; None where they differ (or where it has none)."""
    found = {module.eps for module in encoder.modules() if isinstance(module, nn.LayerNorm)}
    return found.pop() if len(found) == 1 else None


def set_layer_norm_eps(encoder: nn.Module, eps: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
