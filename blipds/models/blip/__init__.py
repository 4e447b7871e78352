"""BLIP (arXiv 2201.12086): a ViT, and a BERT that attends to it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.blip.checkpoints import POS_EMBED, BlipFormat
from blipds.models.blip.config import CONFIGS, BlipConfig, read_text_config
from blipds.models.blip.export import export_blip, export_transformers
from blipds.models.blip.geometry import BlipGeometry, geometry_from_transformers_config
from blipds.models.blip.model import BlipCaption
from blipds.models.blip.text_decoder import TextConfig, TextDecoder
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.checkpoints import Checkpoint
from blipds.models.protocol import Arch, CheckpointFn, Description, Export, keep_activations
from blipds.models.vision import build_vision_transformer, checkpoint_last, encoder_mean_std, hub_name_of
from blipds.registry import ARCHS

# What a transformers folder's generation_config.json calls the run config's keys.
DECODING_KEYS = {
    "num_beams": "num_beams",
    "max_length": "max_len",
    "min_length": "min_len",
    "length_penalty": "length_penalty",
    "repetition_penalty": "repetition_penalty",
    "do_sample": "use_nucleus_sampling",
    "top_p": "top_p",
    "temperature": "temperature",
}


@ARCHS.register("blip_caption")
class Blip(Arch):
    """BLIP's captioner, base, large, or with any timm ViT; weights from LAVIS and BLIP, transformers, timm, BERT."""

    config = BlipConfig
    model_types: ClassVar[Mapping[str, Path]] = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    exports: ClassVar[Mapping[str, Callable[[Path, Export], None]]] = {"hf": export_transformers, "blip": export_blip}

    def build(self, config: BlipConfig, checkpoint_fn: CheckpointFn) -> BlipCaption:
        visual_encoder = build_vision_transformer(config.vit_type, config.image_size, **config.vit_kwargs)
        text_decoder = TextDecoder(read_text_config(config.med_config_path), visual_encoder.embed_dim)
        positions = text_decoder.config.max_position_embeddings
        if config.max_txt_len > positions:
            raise UserError(
                f"model.max_txt_len is {config.max_txt_len}, but the text decoder has {positions} positions"
            )
        if config.vit_grad_ckpt:
            checkpoint_last(visual_encoder.blocks, config.vit_ckpt_layer, checkpoint_fn)
        if config.text_grad_ckpt:
            checkpoint_last(text_decoder.bert.encoder.layer, None, checkpoint_fn)
        return BlipCaption(visual_encoder, text_decoder, label_smoothing=config.label_smoothing)

    def image_statistics(self, config: BlipConfig) -> tuple[list[float], list[float]] | None:
        """Those of the encoder that `vit_pretrained` names, by timm's table. No network."""
        if not config.vit_pretrained:
            return None
        return encoder_mean_std(config.vit_type, hub_name_of(config.vit_pretrained))

    def describe(self, stored: StoredTensors) -> Description | None:
        """A transformers folder, a .pth of `launch/export.py` with the model section in it, BLIP's base and large."""
        if stored.config.get("model_type") == "blip":
            return describe_transformers(stored)
        if "vit_type" in stored.config:
            if stored.config.get("vit_pretrained"):  # its mean and std are nowhere in the file
                return None
            return describe_section(stored)
        config = published(Checkpoint(stored, BlipFormat()).tensors)
        return None if config is None else Description(config, self.build)


def published(tensors: Mapping[str, Tensor]) -> BlipConfig | None:
    """BLIP base or large, at any image size, by the shapes of its tensors; None for anything else."""
    positions = tensors.get(POS_EMBED, torch.empty(0))
    if positions.dim() != 3 or positions.shape[1] < 2:
        return None
    for vit_type in ("base", "large"):
        config = BlipConfig(vit_type=vit_type, image_size=16 * isqrt(positions.shape[1] - 1))
        with torch.device("meta"):
            parameters = Blip().build(config, keep_activations).named_parameters()
        if all(name in tensors and tensors[name].shape == parameter.shape for name, parameter in parameters):
            return config
    return None


def describe_section(stored: StoredTensors) -> Description:
    """By the model section of the run config that the file carries."""
    names = {field.name for field in fields(BlipConfig)}
    try:
        config = BlipConfig(**{key: value for key, value in stored.config.items() if key in names})
    except TypeError as error:
        raise UserError(f"{stored.location}: the config in it is none of a model ({error})") from error
    return Description(config, Blip().build)


def describe_transformers(stored: StoredTensors) -> Description:
    """By config.json, the image processor's, the tokenizer's and generation_config.json."""
    from transformers import BlipImageProcessor

    folder = stored.path
    given: dict[str, Any] = {}
    if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        processor = BlipImageProcessor.from_pretrained(folder)
        given |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    generation = folder / "generation_config.json"
    if generation.is_file():
        try:
            stated = json.loads(generation.read_text(encoding="utf-8"))
            given["decoding"] = {ours: stated[theirs] for theirs, ours in DECODING_KEYS.items() if theirs in stated}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{generation}: {error}") from error
    tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    geometry = geometry_from_transformers_config(stored.config)
    config = BlipConfig(tokenizer=tokenizer, image_size=geometry.image_size)
    return Description(config, lambda config, checkpoint_fn: build_from_geometry(geometry), **given)


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
    text_config = TextConfig(**{field.name: getattr(geometry, field.name) for field in fields(TextConfig)})
    return BlipCaption(visual_encoder, TextDecoder(text_config, visual_encoder.embed_dim))
