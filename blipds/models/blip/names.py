"""Parameter names: ours (those of the original BLIP checkpoints) and those of transformers and BERT."""

# Tied parameters: the name on the left holds the same values as the one on the right; a file may carry either or both.
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}

# What BLIP's and LAVIS's pretraining checkpoints hold beside the captioner (blip_pretrain.py, blip_retrieval.py):
# the momentum copies, the text encoder, the projections, the matching head, the queues and the temperature.
PRETRAINING_ONLY = (
    *("visual_encoder_m.*", "text_decoder_m.*", "text_encoder.*", "text_encoder_m.*"),
    *("vision_proj.*", "vision_proj_m.*", "text_proj.*", "text_proj_m.*", "itm_head.*"),
    *("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", "temp"),
)
# What a ViT has behind its last norm (classifier, pooling), and DINOv2's mask token; BERT's pooler, next-sentence head
# and token types (the original BLIP drops all three, too).
VIT_ONLY = ("head.*", "head_dist.*", "pre_logits.*", "attn_pool.*", "fc_norm.*", "mask_token")
BERT_ONLY = ("*pooler.*", "cls.seq_relationship.*", "*embeddings.token_type_embeddings.*")
BUFFERS = ("*.position_ids", "position_ids")

# Parts of the image encoder's names, ours and those of transformers' BLIP.
RENAMED = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
)


def from_transformers_name(name: str) -> str:
    """Our name of a parameter of `BlipForConditionalGeneration`; other names stay."""
    for ours, theirs in RENAMED if name.startswith("vision_model.") else ():
        name = name.replace(theirs, ours)
    return name


def to_transformers_name(name: str) -> str:
    """The inverse."""
    for ours, theirs in RENAMED if name.startswith("visual_encoder.") else ():
        name = name.replace(ours, theirs)
    return name


def from_bert_name(name: str) -> str:
    """Our name of a BERT's parameter, with or without the prefix `bert.`; LayerNorm.gamma/beta are its oldest names."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return "text_decoder." + ("bert." + name if name.startswith(("embeddings.", "encoder.")) else name)


def from_timm_name(name: str) -> str:
    return "visual_encoder." + name
