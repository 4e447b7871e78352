"""Models by arch. A builder takes the model section of the run config and gives the bare model, weights random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blipds.config import PACKAGED, ModelConfig
from blipds.errors import UserError
from blipds.models.blip_caption import BlipCaption
from blipds.models.text_decoder import TextConfig, TextDecoder
from blipds.models.vision import build_vision_transformer, checkpoint_last
from blipds.registry import MODELS

__all__ = ["BlipCaption", "build_model", "read_text_config"]


def build_model(config: ModelConfig, checkpoint_fn: Callable[..., Any]) -> BlipCaption:
    """The model of `config.arch`; `checkpoint_fn(function, *inputs)` is what runs checkpointed layers."""
    return MODELS[config.arch](config, checkpoint_fn)


@MODELS.register("blip_caption")
def build_blip_caption(config: ModelConfig, checkpoint_fn: Callable[..., Any]) -> BlipCaption:
    visual_encoder = build_vision_transformer(config.vit_type, config.image_size, **config.vit_kwargs)
    text_decoder = TextDecoder(read_text_config(config.med_config_path), visual_encoder.embed_dim)
    if config.max_txt_len > text_decoder.config.max_position_embeddings:
        positions = text_decoder.config.max_position_embeddings
        raise UserError(f"model.max_txt_len is {config.max_txt_len}, but the text decoder has {positions} positions")
    if config.vit_grad_ckpt:
        checkpoint_last(visual_encoder.blocks, config.vit_ckpt_layer, checkpoint_fn)
    if config.text_grad_ckpt:
        checkpoint_last(text_decoder.bert.encoder.layer, None, checkpoint_fn)
    return BlipCaption(
        visual_encoder, text_decoder, label_smoothing=config.label_smoothing, freeze_vit=config.freeze_vit
    )


def read_text_config(path: str | None) -> TextConfig:
    """A path of the user's, or, as in LAVIS, one inside the package (configs/models/med_config.json)."""
    if path is None:
        return TextConfig()
    given = Path(path).expanduser()
    packaged = PACKAGED.parent / path
    return TextConfig.from_json(packaged if packaged.exists() and not given.exists() else given)
