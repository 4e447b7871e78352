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
from blipds.models.checkpoint_files import StoredTensors, listed
from blipds.models.checkpoints import CheckpointFormat, lasting, matches, weights_hash

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
# Kinds of one part: what its names begin with, and the key that names such a file.
PARTS = {
    "eva": ("visual_encoder.", "model.vit_pretrained"),
    "language model": ("language_model.", "model.llm or model.opt_model"),
}
SOURCE, HASH = "language_model_source", "language_model_hash"  # in the config that our files carry


class Blip2Format(CheckpointFormat):
    """Kinds: 'lavis', 'transformers', 'blipds', and the parts 'eva' (LAVIS's encoder) and 'language model'."""

    parts = PARTS

    def __init__(self, model: Any) -> None:
        self.blocks = len(model.visual_encoder.blocks)
        self.names = {name for name, _ in model.named_parameters()}
        ends = (model.language_model.get_input_embeddings(), model.language_model.get_output_embeddings())
        words = {id(end.weight) for end in ends}
        self.words = {name for name, parameter in model.named_parameters() if id(parameter) in words}
        tied = model.language_model.all_tied_weights_keys
        self.tied = {f"language_model.{name}": f"language_model.{owner}" for name, owner in tied.items()}

    def kind(self, stored: StoredTensors) -> str:
        names = list(stored.tensors)
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

    def transformers_name(self, name: str) -> str:
        return to_transformers_name(name)

    def tensors_of(self, stored: StoredTensors, part: str) -> dict[str, Tensor]:
        """The tensors of a file, under our names, that begin with `part`."""
        kind = self.kind(stored)
        named = {self.our_name(kind, name): tensor for name, tensor in stored.tensors.items()}
        return {name: tensor for name, tensor in named.items() if name and name.startswith(part)}

    def hash_of(self, tensors: Mapping[str, Tensor]) -> str:
        """Tells language models apart."""
        return weights_hash({name: tensor for name, tensor in tensors.items() if name not in self.tied})

    def has_block(self, name: str) -> bool:
        """False for the 40th block of EVA's encoder, which BLIP-2 leaves out."""
        block = re.match(r"visual_encoder\.blocks\.(\d+)\.", name)
        return block is None or int(block[1]) < self.blocks

    def language_name(self, name: str) -> str:
        """Files of the bare decoder, and those whose names all began with it, lack the model's name for it."""
        known = self.names | self.tied.keys()
        return next((n for n in (f"language_model.{name}", f"language_model.model.{name}") if n in known), name)

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor | None, str]:
        stored = tuple(tensor.shape)
        is_grid = len(stored) == 3 and isqrt(stored[1] - 1) ** 2 == stored[1] - 1
        if name == POS_EMBED and is_grid and stored[::2] == wanted[::2]:
            return interpolate_pos_embed(tensor, wanted[1]), f"pos_embed interpolated from {stored} to {wanted}"
        # transformers' folders have rows more than the tokenizer knows, <image> for one
        if name in self.words and stored[1:] == wanted[1:] and stored[0] > wanted[0]:
            return tensor[: wanted[0]], f"{name}: the first {wanted[0]} of {stored[0]} rows"
        return super().fitted(kind, name, tensor, wanted)


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
    return vision_names.from_transformers_name(renamed(name, {theirs: ours for ours, theirs in TRANSFORMERS.items()}))


def to_transformers_name(name: str) -> str:
    return vision_names.to_transformers_name(renamed(name, TRANSFORMERS))


def completed(
    stored: StoredTensors, layout: Blip2Format, config: Blip2Config, open_other: Callable[[str], StoredTensors]
) -> tuple[StoredTensors, dict[str, str]]:
    """A file with the encoder and the language model where it has none: LAVIS's and ours hold what was trained.

    And where the language model's weights come from, with their hash; {} for a file that asks for none.
    """
    kind, tensors = layout.kind(stored), dict(stored.tensors)
    prefix = {"lavis": "opt_model.", "blipds": "language_model."}.get(kind, "")
    if kind == "lavis" and not any(name.startswith("visual_encoder.") for name in tensors):
        if config.vit_pretrained is None:
            raise UserError(f"{stored.location}: holds no encoder, and model.vit_pretrained names no file that does")
        tensors |= layout.tensors_of(open_other(config.vit_pretrained), "visual_encoder.")
    holder = replace(stored, tensors=tensors)
    if prefix and config.load_llm and not any(name.startswith(prefix) for name in tensors):
        holder = language_model_of(stored, layout, config.language_source, open_other)
        for name, tensor in layout.tensors_of(holder, "language_model.").items():
            tensors[prefix + name.removeprefix("language_model.")] = tensor
    language = layout.tensors_of(holder, "language_model.")
    found = replace(stored, tensors=with_joined_biases(tensors))
    if not language:
        return found, {}
    return found, {SOURCE: lasting(holder.location), HASH: layout.hash_of(language)}


def language_model_of(
    stored: StoredTensors, layout: Blip2Format, source: str, open_other: Callable[[str], StoredTensors]
) -> StoredTensors:
    """The file that holds the language model of one that does not: what that one names, else `source`.

    UserError where the weights are not those that it was trained with.
    """
    wanted, named = stored.config.get(HASH), stored.config.get(SOURCE, source)
    try:
        holder = open_other(named)
    except UserError:
        if named == source:
            raise
        holder = open_other(source)  # it may have moved
    if wanted not in (None, layout.hash_of(layout.tensors_of(holder, "language_model."))):
        raise UserError(
            f"{stored.location}: was trained in front of {named} as it was then; {holder.location} has other weights"
        )
    return holder


def with_joined_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases of a block's queries, keys and values as one; EVA's and LAVIS's files have the first and the last.

    A bias of the keys adds the same to all scores of a query, and so nothing to their softmax.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "q_bias" and f"{prefix}.v_bias" in tensors:
            found[f"{prefix}.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), tensors[f"{prefix}.v_bias"]])
        elif last != "v_bias" or f"{prefix}.q_bias" not in tensors:
            found[name] = tensor
    return found
