"""Models by arch. The built-in archs are registered by the imports below."""

from collections.abc import Callable
from typing import Any

import torch

from blipds.config.sections import ModelConfig
from blipds.models import adapters, blip, blip2  # noqa: F401
from blipds.models.protocol import CaptioningModel
from blipds.registry import ARCHS


def build_model(
    config: ModelConfig, checkpoint_fn: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> CaptioningModel:
    """The model of `config.arch`, weights random; `checkpoint_fn(function, *inputs)` runs checkpointed layers.

    dtype: what the run will have all weights in. They are in fp32 until then, but for frozen ones that only a file
    sets: a copy of those in fp32 would serve nobody.
    """
    arch = ARCHS[config.arch]()
    arch.dtype = dtype
    model: CaptioningModel = arch.build(config, checkpoint_fn)
    if config.freeze_vit:
        model.freeze_image_encoder()
    return model


def build_trained(
    config: ModelConfig, checkpoint_fn: Callable[..., Any], dtype: torch.dtype = torch.float32
) -> CaptioningModel:
    """The model as training needs it: with the adapters that `model.lora` asks for. Elsewhere they are merged."""
    model = build_model(config, checkpoint_fn, dtype)
    if config.lora is not None:
        adapters.inject(model, config.lora)
    return model
