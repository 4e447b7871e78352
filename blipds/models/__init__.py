"""Models by arch. A builder takes the model section of the run config and gives the bare model, weights random."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from blipds.config.run import PACKAGED, ModelConfig
from blipds.errors import UserError
from blipds.models.blip.geometry import BlipGeometry
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.text_decoder import TextConfig, TextDecoder
from blipds.models.vision import build_vision_transformer, checkpoint_last
from blipds.registry import MODELS

__all__ = ["BlipCaption", "build_from_geometry", "build_model", "read_text_config"]


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


def build_from_geometry(geometry: BlipGeometry) -> BlipCaption:
    """A captioner that a checkpoint describes, weights random."""
    visual_encoder = build_vision_transformer(
        "base",
        geometry.image_size,
        patch_size=geometry.patch_size,
        embed_dim=geometry.vision_width,
        depth=geometry.vision_depth,
        num_heads=geometry.vision_heads,
        mlp_ratio=geometry.vision_mlp_dim / geometry.vision_width,
    )
    shared = {field.name for field in fields(TextConfig)} & asdict(geometry).keys()
    text_config = TextConfig(**{name: getattr(geometry, name) for name in shared})
    return BlipCaption(visual_encoder, TextDecoder(text_config, visual_encoder.embed_dim))


def read_text_config(path: str | None) -> TextConfig:
    """A path of the user's, or, as in LAVIS, one inside the package (configs/models/med_config.json)."""
    if path is None:
        return TextConfig()
    given = Path(path).expanduser()
    packaged = PACKAGED.parent / path
    return TextConfig.from_json(packaged if packaged.exists() and not given.exists() else given)
