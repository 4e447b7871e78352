"""BLIP-2's checkpoints: LAVIS's .pth, transformers' folders, and the files of parts that LAVIS's leave out."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.blip import names as vision_names
from blipds.models.blip.checkpoints import interpolate_pos_embed
from blipds.models.blip2.config import Blip2Config
from blipds.models.checkpoint_files import Reader, listed
from blipds.models.checkpoints import CheckpointFormat, StoredTensors, matches

POS_EMBED = "visual_encoder.pos_embed"
# What our names begin with, and what LAVIS's and transformers' do.
LAVIS = {
    "visual_encoder.": "visual_encoder.",
    "bridge.ln_vision.": "ln_vision.",
    "bridge.query_tokens": "query_tokens",
    "bridge.qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "bridge.qformer.encoder.": "Qformer.bert.encoder.",
    "bridge.projection.": "opt_proj.",
    "language_model.": "opt_model.",
}
TRANSFORMERS = {
    "bridge.ln_vision.": "vision_model.post_layernorm.",
    "bridge.query_tokens": "query_tokens",
    "bridge.qformer.": "qformer.",
    "bridge.projection.": "language_projection.",
    "language_model.": "language_model.",
}
# Of the first stage of pretraining: the text side of the Q-Former, the matching and contrastive heads.
FIRST_STAGE = (
    *("Qformer.cls.*", "Qformer.bert.embeddings.*_embeddings.*", "Qformer.bert.embeddings.position_ids"),
    *("Qformer.bert.encoder.layer.*.intermediate.*", "Qformer.bert.encoder.layer.[0-9].output.*"),
    "Qformer.bert.encoder.layer.[0-9][0-9].output.*",
    *("vision_proj.*", "text_proj.*", "itm_head.*", "temp"),
)
ENCODER_ONLY = ("norm.*", "fc_norm.*", "head.*", "mask_token")  # of eva_vit_g.pth: what stands behind its blocks
KINDS = {"eva": "visual_encoder.", "language model": "language_model."}  # of one part
KEYS = {"eva": "model.vit_pretrained", "language model": "model.opt_model"}


class JoinedBias:
    """The bias of a block's queries, keys and values, of which EVA's and LAVIS's files have the first and the last.

    A bias of the keys adds the same to all scores of a query, and so nothing to their softmax.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, queries: tuple[Reader, str], values: tuple[Reader, str]) -> None:
        self.parts = queries, values
        self.path = queries[0].path
        self.names: list[str] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return (3 * self.parts[0][0].shape(self.parts[0][1])[0],)

    def tensor(self, name: str) -> Tensor:
        queries, values = (reader.tensor(stored) for reader, stored in self.parts)
        return torch.cat([queries, torch.zeros_like(queries), values])


class Blip2Format(CheckpointFormat):
    """Kinds: 'lavis', 'transformers', 'blipds', and the parts 'eva' (LAVIS's encoder) and 'language model'."""

    def __init__(self, model: Any) -> None:
        self.blocks = len(model.visual_encoder.blocks)
        self.names = {name for name, _ in model.named_parameters()}
        tied = model.language_model.all_tied_weights_keys
        self.tied = {f"language_model.{name}": f"language_model.{owner}" for name, owner in tied.items()}

    def kind(self, stored: StoredTensors) -> str:
        names = list(stored.readers)
        if stored.is_own or any(name.startswith("bridge.") for name in names):
            return "blipds"
        for kind, known in (
            ("transformers", ("vision_model.", "language_projection.")),
            ("lavis", ("Qformer.", "opt_proj.")),
            ("eva", ("patch_embed.proj.",)),
        ):
            if any(name.startswith(known) for name in names):
                return kind
        if any("embed" in name for name in names):
            return "language model"
        raise UserError(
            f"{stored.path}: not a checkpoint of LAVIS's BLIP-2, transformers' BLIP-2, blipds, EVA or a language "
            f"model; its names begin with {listed(names, 3) or 'nothing'}"
        )

    def joined(self, kind: str, readers: Mapping[str, tuple[Reader, str]]) -> Mapping[str, tuple[Reader, str]]:
        found: dict[str, tuple[Reader, str]] = {}
        for name, place in readers.items():
            prefix, _, last = name.rpartition(".")
            if last == "q_bias" and f"{prefix}.v_bias" in readers:
                reader: Any = JoinedBias(place, readers[f"{prefix}.v_bias"])
                found[f"{prefix}.qkv.bias"] = reader, f"{prefix}.qkv.bias"
            elif last != "v_bias" or f"{prefix}.q_bias" not in readers:
                found[name] = place
        return found

    def our_name(self, kind: str, name: str) -> str | None:
        if kind == "lavis":
            return from_lavis_name(name) if self.has_block(name) else None
        if kind == "transformers":
            return from_transformers_name(name)
        if kind == "eva":
            name = f"visual_encoder.{name}"
            return name if self.has_block(name) and not matches(name, [f"*.{p}" for p in ENCODER_ONLY]) else None
        if kind == "language model":
            return self.language_name(name)
        return name

    def has_block(self, name: str) -> bool:
        """False for the 40th block of EVA's encoder, which BLIP-2 leaves out."""
        block = re.match(r"visual_encoder\.blocks\.(\d+)\.", name)
        return block is None or int(block[1]) < self.blocks

    def language_name(self, name: str) -> str:
        """Files of the bare decoder, and those whose names all began with it, lack the model's name for it."""
        known = self.names | self.tied.keys()
        return next((n for n in (f"language_model.{name}", f"language_model.model.{name}") if n in known), name)

    def part(self, kind: str) -> str:
        return KINDS.get(kind, "")

    def part_key(self, kind: str) -> str:
        return KEYS[kind]

    def misfit(self, kind: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        is_grid = len(stored) == 3 and isqrt(stored[1] - 1) ** 2 == stored[1] - 1
        if name == POS_EMBED and is_grid and (stored[0], stored[2]) == (wanted[0], wanted[2]):
            return ""
        if self.holds_words(name) and stored[1:] == wanted[1:] and stored[0] > wanted[0]:
            return ""
        return super().misfit(kind, name, stored, wanted)

    def holds_words(self, name: str) -> bool:
        """The words' embeddings: transformers' folders have rows more than the tokenizer knows, `<image>` for one."""
        return name.endswith("embed_tokens.weight") or name in self.tied

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor, str]:
        if name == POS_EMBED:
            note = f"pos_embed interpolated from {tuple(tensor.shape)} to {wanted}"
            return interpolate_pos_embed(tensor, wanted[1]), note
        return tensor[: wanted[0]], f"{name}: the first {wanted[0]} of {len(tensor)} rows"


def renamed(name: str, pairs: Mapping[str, str]) -> str:
    """The name with the first beginning that `pairs` knows replaced."""
    return next((new + name[len(old) :] for old, new in pairs.items() if name.startswith(old)), name)


def from_lavis_name(name: str) -> str | None:
    """Our name; None: left aside."""
    if matches(name, FIRST_STAGE):
        return None
    ours = renamed(name, {theirs: ours for ours, theirs in LAVIS.items()})
    return ours.replace("attention.self.", "attention.attention.") if ours.startswith("bridge.") else ours


def to_lavis(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names -> as LAVIS writes them, without the language model."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = renamed(name, LAVIS).replace("attention.attention.", "attention.self.")
        if theirs.startswith("visual_encoder.") and theirs.endswith("qkv.bias"):
            prefix = theirs.removesuffix("qkv.bias")
            found[f"{prefix}q_bias"], _, found[f"{prefix}v_bias"] = (part.clone() for part in tensor.chunk(3))
        elif not name.startswith("language_model."):
            found[theirs] = tensor
    return found


def from_transformers_name(name: str) -> str:
    ours = renamed(name, {theirs: ours for ours, theirs in TRANSFORMERS.items()})
    return (vision_names.from_transformers_name(name) or name) if ours == name else ours


def to_transformers_name(name: str) -> str:
    return vision_names.to_transformers_name(name) or renamed(name, TRANSFORMERS)


def completed(
    stored: StoredTensors, layout: Blip2Format, config: Blip2Config, open_other: Callable[[str], StoredTensors]
) -> StoredTensors:
    """LAVIS's file with the encoder and the language model where it has none: it holds what was trained."""
    if layout.kind(stored) != "lavis":
        return stored
    readers: dict[str, Any] = dict(stored.readers)
    for kind, prefix, source in (
        ("eva", "visual_encoder.", config.vit_pretrained),
        ("language model", "opt_model.", config.opt_model if config.load_llm else None),
    ):
        if any(name.startswith(prefix) for name in readers):
            continue
        if source is None:
            raise UserError(f"{stored.location}: holds no {prefix}*, and {KEYS[kind]} names no file that does")
        other = open_other(source)
        if layout.kind(other) != kind:
            raise UserError(f"{KEYS[kind]} {source}: a {layout.kind(other)} checkpoint, not one of kind '{kind}'")
        for name, place in other.readers.items():
            if (ours := layout.our_name(kind, name)) is not None:
                readers[prefix + ours.removeprefix(KINDS[kind])] = place
    return replace(stored, readers=readers)
