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
from blipds.models.blip2.language_model import has_own_head
from blipds.models.checkpoint_files import StoredTensors, listed
from blipds.models.checkpoints import CheckpointFormat, lasting, matches, weights_hash

CLS_TOKEN, POS_EMBED = "visual_encoder.cls_token", "visual_encoder.pos_embed"
# What our names begin with, and what LAVIS's and transformers' do; of LAVIS's the language model's (`lavis_names`) too.
LAVIS = {
    "visual_encoder.": "visual_encoder.",
    "bridge.ln_vision.": "ln_vision.",
    "bridge.query_tokens": "query_tokens",
    "bridge.qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.",
    "bridge.qformer.encoder.": "Qformer.bert.encoder.",
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
# Of the files of encoders: what stands behind their blocks.
ENCODER_ONLY = ("norm.*", "fc_norm.*", "head.*", "mask_token", "ln_post.*", "proj")
# Parts of the names of CLIP's encoder, ours and those of LAVIS and OpenAI.
CLIP = (
    ("visual_encoder.cls_token", "visual_encoder.class_embedding"),
    ("visual_encoder.pos_embed", "visual_encoder.positional_embedding"),
    ("visual_encoder.patch_embed.proj.", "visual_encoder.conv1."),
    ("visual_encoder.norm_pre.", "visual_encoder.ln_pre."),
    ("visual_encoder.blocks.", "visual_encoder.transformer.resblocks."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
SOURCE, HASH = "language_model_source", "language_model_hash"  # in the config that our files carry


class Blip2Format(CheckpointFormat):
    """Kinds: 'lavis', 'transformers', 'blipds', and the parts 'image encoder' (LAVIS's files) and 'language model'."""

    def __init__(self, model: Any) -> None:
        language = model.config.LANGUAGE
        self.lavis = lavis_names(language)
        self.parts = {
            "image encoder": ("visual_encoder.", "model.vit_pretrained"),
            "language model": ("language_model.", f"model.llm or model.{language}_model"),
        }
        self.blocks = len(model.visual_encoder.blocks)
        self.names = {name for name, _ in model.named_parameters()}
        ends = (model.language_model.get_input_embeddings(), model.language_model.get_output_embeddings())
        words = {id(end.weight) for end in ends}
        self.words = {name for name, parameter in model.named_parameters() if id(parameter) in words}
        self.has_own_head = has_own_head(model.language_model.config)
        self.ignored = model.language_model._keys_to_ignore_on_load_unexpected or ()
        tied = model.language_model.all_tied_weights_keys
        self.tied = {f"language_model.{name}": f"language_model.{owner}" for name, owner in tied.items()}

    def kind(self, stored: StoredTensors) -> str:
        names = list(stored.tensors)
        if stored.is_own or any(name.startswith("bridge.") for name in names):
            return "blipds"
        for kind, known in (
            ("transformers", ("vision_model.", "language_projection.")),
            ("lavis", ("Qformer.", self.lavis["bridge.projection."])),
            ("image encoder", ("patch_embed.proj.", "conv1.")),
        ):
            if any(name.startswith(known) for name in names):
                return kind
        if any("embed" in name or name == "shared.weight" for name in names):
            return "language model"
        raise UserError(
            f"{stored.path}: not a checkpoint of LAVIS's BLIP-2, transformers' BLIP-2, blipds, an image encoder of "
            f"LAVIS's or a language model; its names begin with {listed(names, 3) or 'nothing'}"
        )

    def our_name(self, kind: str, name: str) -> str | None:
        if kind == "lavis":
            return self.from_lavis_name(name)
        if kind == "transformers":
            return from_transformers_name(name)
        if kind == "image encoder":
            left_aside = matches(name, ENCODER_ONLY)
            return None if left_aside else self.from_lavis_name(f"visual_encoder.{name}")
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

    def from_lavis_name(self, name: str) -> str | None:
        """Our name; None: left aside, as is the last block of the encoder, which BLIP-2 leaves out."""
        if matches(name, FIRST_STAGE):
            return None
        ours = renamed(name, {theirs: ours for ours, theirs in self.lavis.items()})
        if ours.startswith("bridge."):
            return ours.replace("attention.self.", "attention.attention.")
        for mine, theirs in CLIP if ours.startswith("visual_encoder.") else ():
            ours = ours.replace(theirs, mine)
        block = re.match(r"visual_encoder\.blocks\.(\d+)\.", ours)
        return ours if block is None or int(block[1]) < self.blocks else None

    def with_head(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """With a T5's words out, where they were saved as one with its words in; `prefix` stands before its names."""
        words, head = f"{prefix}shared.weight", f"{prefix}lm_head.weight"
        return {head: tensors[words]} | tensors if self.has_own_head and words in tensors else tensors

    def language_name(self, name: str) -> str | None:
        """Files of the bare decoder, and those whose names all began with it, lack the model's name for it.

        None where transformers itself leaves the tensor aside.
        """
        if any(re.search(pattern, name) for pattern in self.ignored):
            return None
        known = self.names | self.tied.keys()
        return next((n for n in (f"language_model.{name}", f"language_model.model.{name}") if n in known), name)

    def fitted(self, kind: str, name: str, tensor: Tensor, wanted: tuple[int, ...]) -> tuple[Tensor | None, str]:
        if name in (CLS_TOKEN, POS_EMBED) and tensor.dim() < 3:  # CLIP's
            tensor = tensor.view(1, -1, tensor.shape[-1])
        stored = tuple(tensor.shape)
        if stored == wanted:
            return tensor, ""
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


def lavis_names(language: str) -> dict[str, str]:
    """LAVIS, with its names of the language model and its projection: opt_model and opt_proj, t5_model and t5_proj."""
    return LAVIS | {"bridge.projection.": f"{language}_proj.", "language_model.": f"{language}_model."}


def to_lavis(tensors: Mapping[str, Tensor], language: str) -> dict[str, Tensor]:
    """Tensors under our names -> as LAVIS writes them, without the language model."""
    found: dict[str, Tensor] = {}
    names, is_clip = lavis_names(language), "visual_encoder.norm_pre.weight" in tensors
    for name, tensor in tensors.items():
        theirs = renamed(name, names).replace("attention.attention.", "attention.self.")
        if is_clip and theirs.startswith("visual_encoder."):
            for ours, clip in CLIP:
                theirs = theirs.replace(ours, clip)
            found[theirs] = tensor[0].squeeze(0) if name in (CLS_TOKEN, POS_EMBED) else tensor
        elif theirs.startswith("visual_encoder.") and theirs.endswith("qkv.bias"):
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
    prefix = {"lavis": layout.lavis["language_model."], "language model": ""}.get(kind, "language_model.")
    if kind == "lavis" and not any(name.startswith("visual_encoder.") for name in tensors):
        if config.vit_pretrained is None:
            raise UserError(f"{stored.location}: holds no encoder, and model.vit_pretrained names no file that does")
        tensors |= layout.tensors_of(open_other(config.vit_pretrained), "visual_encoder.")
    holder = replace(stored, tensors=tensors)
    if kind in ("lavis", "blipds") and config.load_llm and not any(name.startswith(prefix) for name in tensors):
        holder = language_model_of(stored, layout, config.language_source, open_other)
        for name, tensor in layout.tensors_of(holder, "language_model.").items():
            tensors[prefix + name.removeprefix("language_model.")] = tensor
    language = layout.tensors_of(holder, "language_model.")
    found = replace(stored, tensors=layout.with_head(with_joined_biases(tensors), prefix))
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
