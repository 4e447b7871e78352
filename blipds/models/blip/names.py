"""Parameter names: ours (those of the original BLIP checkpoints) and those of transformers, timm and BERT.

Pure functions on strings; reading files is the job of `checkpoints.py`.
"""

import re

from blipds.models.checkpoints import matches

# Tied parameters: the name on the left holds the same values as the one on the right; a file may carry either or both.
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

# What BLIP's and LAVIS's pretraining checkpoints hold beside the captioner (blip_pretrain.py, blip_retrieval.py):
# the momentum copies, the text encoder, the projections, the matching head, the queues and the temperature.
PRETRAINING_ONLY = (
    "visual_encoder_m.*",
    "text_decoder_m.*",
    "text_encoder.*",
    "text_encoder_m.*",
    "vision_proj.*",
    "vision_proj_m.*",
    "text_proj.*",
    "text_proj_m.*",
    "itm_head.*",
    "image_queue",
    "text_queue",
    "idx_queue",
    "queue_ptr",
    "ptr_queue",
    "temp",
)
# What a ViT has behind its last norm (classifier, pooling), and DINOv2's mask token; BERT's pooler, next-sentence head
# and token types (the original BLIP drops all three, too).
VIT_ONLY = ("head.*", "head_dist.*", "pre_logits.*", "attn_pool.*", "fc_norm.*", "mask_token")
BERT_ONLY = ("*pooler.*", "cls.seq_relationship.*", "*embeddings.token_type_embeddings.*")
BUFFERS = ("*.position_ids", "position_ids")

_VISION = "vision_model."
_VISION_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
_BLOCK_NAMES = {
    "layer_norm1": "norm1",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUR_VISION_NAMES = {ours: theirs for theirs, ours in _VISION_NAMES.items()}
_OUR_BLOCK_NAMES = {ours: theirs for theirs, ours in _BLOCK_NAMES.items()}


def from_transformers_name(name: str) -> str | None:
    """Our name of a parameter of `BlipForConditionalGeneration`; None where the captioner has no such parameter."""
    if matches(name, BUFFERS):
        return None
    if name.startswith("text_decoder."):
        return name
    if not name.startswith(_VISION):
        return None
    rest = name.removeprefix(_VISION)
    if rest in _VISION_NAMES:
        return "visual_encoder." + _VISION_NAMES[rest]
    block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", rest)
    if block and block[2] in _BLOCK_NAMES:
        return f"visual_encoder.blocks.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
    return None


def to_transformers_name(name: str) -> str | None:
    """The inverse; None where transformers' BLIP has no such parameter (layer scale, registers, position_ids)."""
    if matches(name, BUFFERS):
        return None
    if name.startswith("text_decoder."):
        return name
    if not name.startswith("visual_encoder."):
        return None
    rest = name.removeprefix("visual_encoder.")
    if rest in _OUR_VISION_NAMES:
        return _VISION + _OUR_VISION_NAMES[rest]
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", rest)
    if block and block[2] in _OUR_BLOCK_NAMES:
        return f"{_VISION}encoder.layers.{block[1]}.{_OUR_BLOCK_NAMES[block[2]]}.{block[3]}"
    return None


def from_bert_name(name: str) -> str:
    """Our name of a BERT's parameter, with or without the prefix `bert.`; LayerNorm.gamma/beta are its oldest names."""
    if name.endswith("LayerNorm.gamma"):
        name = name.removesuffix("gamma") + "weight"
    elif name.endswith("LayerNorm.beta"):
        name = name.removesuffix("beta") + "bias"
    if name.startswith(("embeddings.", "encoder.")):
        name = "bert." + name
    return "text_decoder." + name
