"""BLIP's checkpoints: which kinds there are, what they call our parameters, and what does not fit as it is stored."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blipds.errors import UserError
from blipds.models.blip import names as names_of
from blipds.models.blip.text_decoder import TextConfig
from blipds.models.checkpoint_files import StoredTensors, listed
from blipds.models.checkpoints import CheckpointFormat, matches

POS_EMBED = "visual_encoder.pos_embed"
TEXT_POSITIONS = "text_decoder.bert.embeddings.position_embeddings.weight"
# BERT has no rows for [DEC] and [ENC], the last two of BLIP's vocabulary.
VOCABULARY = names_of.TIED.values()
EXTRA_TOKENS = 2
PARTS = {"timm": ("visual_encoder.", "model.vit_pretrained"), "bert": ("text_decoder.", "model.text_pretrained")}
# Kind -> patterns of names that are left aside, and our name of any other.
NAMES: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "blip": (names_of.PRETRAINING_ONLY, str),
    "blipds": ((), str),
    "transformers": ((), names_of.from_transformers_name),
    "timm": (names_of.VIT_ONLY, names_of.from_timm_name),
    "bert": (names_of.BERT_ONLY, names_of.from_bert_name),
}


@dataclass(frozen=True)
class BlipFormat(CheckpointFormat):
    """Kinds: 'blip' (the original's and LAVIS's), 'transformers', 'blipds', and the parts 'timm' and 'bert'.

    num_prefix_positions: how many positions of `pos_embed` come before the grid (timm: 0 with `no_embed_class`, else
    `num_prefix_tokens`). Of a BERT, embeddings, layers (each whole) and head are taken, as far as they fit; never
    cross-attention.
    """

    num_prefix_positions: int = 1
    tied = names_of.TIED
    parts = PARTS

    def kind(self, stored: StoredTensors) -> str:
        model_type = stored.config.get("model_type")
        if stored.path.is_dir() and model_type not in ("blip", "bert", None):
            raise UserError(f"{stored.path}: config.json says model_type '{model_type}'; 'blip' or 'bert' can be read")
        names = list(stored.tensors)
        if stored.is_own:
            return "blipds"
        if any(name.startswith("vision_model.") for name in names):
            return "transformers"
        if any(name.startswith(("visual_encoder.", "text_decoder.")) for name in names):
            return "blip"
        if "patch_embed.proj.weight" in names:
            return "timm"
        if any(name.removeprefix("bert.") == "embeddings.word_embeddings.weight" for name in names):
            return "bert"
        raise UserError(
            f"{stored.path}: not a checkpoint of BLIP, LAVIS, transformers' BLIP, blipds, a timm ViT or a BERT; "
            f"its names begin with {listed(names, 3) or 'nothing'}"
        )

    def our_name(self, kind: str, name: str) -> str | None:
        aside, ours = NAMES[kind]
        return None if matches(name, [*names_of.BUFFERS, *aside]) else ours(name)

    def transformers_name(self, name: str) -> str:
        return names_of.to_transformers_name(name)

    def optional(self, kind: str, wanted: Collection[str], given: Collection[str]) -> tuple[list[str], list[str]]:
        if kind != "bert":
            return [], []
        ours, theirs = _text_layers(wanted), _text_layers(given)
        may_miss = ["*.crossattention.*", *sorted(ours - theirs)]
        if not any(name.startswith("text_decoder.cls.") for name in given):
            may_miss.append("text_decoder.cls.*")
        return may_miss, sorted(theirs - ours)

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor | None, str]:
        stored, refused = tuple(tensor.shape), super().fitted(kind, name, tensor, wanted)
        if name == POS_EMBED and len(stored) == len(wanted) == 3 and stored[::2] == wanted[::2]:
            for length in (stored[1] - self.num_prefix_positions, wanted[1] - self.num_prefix_positions):
                if length < 1 or isqrt(length) ** 2 != length:
                    return None, f"{refused[1]}: {length} grid positions are not a square"
            resized = interpolate_pos_embed(tensor, wanted[1], self.num_prefix_positions)
            return resized, f"pos_embed interpolated from {stored} to {wanted}"
        if kind == "bert" and stored and stored[1:] == wanted[1:]:
            kept = wanted[0] - stored[0]
            if name == TEXT_POSITIONS or (name in VOCABULARY and kept == EXTRA_TOKENS):
                rows = tensor[: wanted[0]]
                return rows, f"{name}: {len(rows)} rows" + (f", {kept} keep the model's values" if kept > 0 else "")
        return refused


def _text_layers(names: Collection[str]) -> set[str]:
    """One pattern a layer: decoder and BERT may differ in depth, but a layer comes whole or not at all."""
    found = (re.match(r"text_decoder\.bert\.encoder\.layer\.\d+\.", name) for name in names)
    return {match[0] + "*" for match in found if match}


def text_layer_differences(config: Mapping[str, Any], text: TextConfig) -> list[str]:
    """Why a BERT of this config.json has layers that would not compute in our decoder what they do in it."""
    ours = {
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        "hidden_act": "gelu",
    }
    return [
        f"{key} is {config[key]} in the file, {value} in the decoder"
        for key, value in ours.items()
        if config.get(key, value) != value
    ]


def interpolate_pos_embed(pos_embed: Tensor, positions: int, num_prefix_positions: int = 1) -> Tensor:
    """Position embeddings (1, P + g*g, C) for another square grid: (1, positions, C), the first P kept.

    Bicubic without antialiasing, as the original (BLIP models/vit.py, interpolate_pos_embed); in float32.
    """
    prefix, grid = pos_embed[:, :num_prefix_positions], pos_embed[:, num_prefix_positions:]
    old, new = isqrt(grid.shape[1]), isqrt(positions - num_prefix_positions)
    grid = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([prefix, grid.to(pos_embed.dtype)], dim=1)
