"""BLIP's checkpoints: which kinds there are, what they call our parameters, and what does not fit as it is stored."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blipds.errors import UserError
from blipds.models.blip import names as names_of
from blipds.models.blip.text_decoder import TextConfig
from blipds.models.checkpoint_files import listed
from blipds.models.checkpoints import CheckpointFormat, StoredTensors, matches

POS_EMBED = "visual_encoder.pos_embed"
# Kinds of checkpoints that hold one part: the rest of the model is not asked of them; and the keys that name them.
PART_PREFIX = {"timm": "visual_encoder.", "bert": "text_decoder."}
PART_KEY = {"timm": "model.vit_pretrained", "bert": "model.text_pretrained"}
# BERT has no rows for [DEC] and [ENC], the last two of BLIP's vocabulary.
VOCABULARY = (
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.bias",
    *names_of.TIED,
)
EXTRA_TOKENS = 2
TEXT_POSITIONS = "text_decoder.bert.embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class BlipFormat(CheckpointFormat):
    """Kinds: 'blip' (the original's and LAVIS's .pth), 'transformers', 'blipds', and the parts 'timm' and 'bert'.

    num_prefix_positions: how many positions of `pos_embed` come before the grid (timm: 0 with `no_embed_class`, else
    `num_prefix_tokens`). Of a BERT, embeddings, layers (each whole) and head are taken, as far as they fit; never
    cross-attention.
    """

    num_prefix_positions: int = 1
    tied = names_of.TIED

    def kind(self, stored: StoredTensors) -> str:
        model_type = stored.config.get("model_type")
        if stored.path.is_dir() and model_type not in ("blip", "bert", None):
            raise UserError(f"{stored.path}: config.json says model_type '{model_type}'; 'blip' or 'bert' can be read")
        names = list(stored.readers)
        if stored.is_own:
            return "blipds"
        if any(name.startswith("vision_model.") for name in names):
            return "transformers"
        if any(name.startswith(("visual_encoder.", "text_decoder.")) for name in names):
            return "blip" if stored.is_pickle else "blipds"
        if "patch_embed.proj.weight" in names:
            return "timm"
        if any(name.removeprefix("bert.") == "embeddings.word_embeddings.weight" for name in names):
            return "bert"
        raise UserError(
            f"{stored.path}: not a checkpoint of BLIP, LAVIS, transformers' BLIP, blipds, a timm ViT or a BERT; "
            f"its names begin with {listed(names, 3) or 'nothing'}"
        )

    def our_name(self, kind: str, name: str) -> str | None:
        if matches(name, names_of.BUFFERS):
            return None
        if kind == "transformers":
            return names_of.from_transformers_name(name) or name
        if kind == "timm":
            return None if matches(name, names_of.VIT_ONLY) else "visual_encoder." + name
        if kind == "bert":
            return None if matches(name, names_of.BERT_ONLY) else names_of.from_bert_name(name)
        return None if matches(name, names_of.PRETRAINING_ONLY) else name

    def part(self, kind: str) -> str:
        return PART_PREFIX.get(kind, "")

    def part_key(self, kind: str) -> str:
        return PART_KEY[kind]

    def optional(self, kind: str, wanted: Sequence[str], given: Sequence[str]) -> tuple[list[str], list[str]]:
        if kind != "bert":
            return [], []
        ours, theirs = _text_layers(wanted), _text_layers(given)
        may_miss = ["*.crossattention.*", *sorted(ours - theirs)]
        if not any(name.startswith("text_decoder.cls.") for name in given):
            may_miss.append("text_decoder.cls.*")
        return may_miss, sorted(theirs - ours)

    def misfit(self, kind: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        same_rows = stored and wanted and stored[1:] == wanted[1:]
        if name == POS_EMBED and len(stored) == len(wanted) == 3 and (stored[0], stored[2]) == (wanted[0], wanted[2]):
            for length in (stored[1] - self.num_prefix_positions, wanted[1] - self.num_prefix_positions):
                if stored != wanted and (length < 1 or isqrt(length) ** 2 != length):
                    return f"{stored} in the file, {wanted} in the model: {length} grid positions are not a square"
            return ""
        if kind == "bert" and name in VOCABULARY and same_rows and wanted[0] - stored[0] == EXTRA_TOKENS:
            return ""
        if kind == "bert" and name == TEXT_POSITIONS and same_rows:
            return ""
        return super().misfit(kind, name, stored, wanted)

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, str]:
        if name == POS_EMBED:
            note = f"pos_embed interpolated from {tuple(tensor.shape)} to {wanted}"
            return interpolate_pos_embed(tensor, wanted[1], self.num_prefix_positions), note
        rows = tensor[: wanted[0]]
        kept = wanted[0] - len(rows)
        return rows, f"{name}: {len(rows)} rows" + (f", {kept} keep the model's values" if kept else "")


def _text_layers(names: Iterable[str]) -> set[str]:
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
