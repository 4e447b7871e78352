"""The sizes and constants of a captioner: of a built model, of a transformers config, and where the two differ."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from blipds.errors import UserError
from blipds.models.blip.text_decoder import TextConfig
from blipds.models.vision import layer_norm_eps

ORIGINAL_VISION_EPS = 1e-6
VISION_EPS_KEY = "vision_layer_norm_eps"  # in the config that our safetensors and .pth files carry
# What a checkpoint need not share with the model: positions are interpolated, the rest only matters in training.
FREE_FIELDS = (
    "image_size",
    "vision_eps",
    "vision_features",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "label_smoothing",
    "initializer_range",
)


@dataclass(frozen=True)
class BlipGeometry(TextConfig):
    """All sizes and constants that transformers' BLIP needs to compute what our model computes; defaults: BLIP base."""

    image_size: int = 384
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_mlp_dim: int = 3072
    vision_eps: float = ORIGINAL_VISION_EPS
    label_smoothing: float = 0.1
    vision_features: tuple[str, ...] = ()  # what transformers' BLIP lacks: "layer scale", "4 register tokens", ...


# What a config.json calls them in its vision_config, and in its text_config.
VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "vision_width": "hidden_size",
    "vision_depth": "num_hidden_layers",
    "vision_heads": "num_attention_heads",
    "vision_mlp_dim": "intermediate_size",
    "vision_eps": "layer_norm_eps",
}
TEXT_KEYS = [*(field.name for field in fields(TextConfig)), "label_smoothing"]
# transformers' defaults where they are not BLIP's
THEIR_DEFAULTS = {
    "num_attention_heads": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "label_smoothing": 0.0,
}


def geometry_from_transformers_config(config: Mapping[str, Any]) -> BlipGeometry:
    """The geometry that a transformers BLIP config.json (as a dict) describes.

    What the file leaves out has transformers' own default, since that is what transformers would compute with; but for
    the vision epsilon, where that default (1e-5) is not what any of BLIP's weights were trained with.
    """
    if config.get("model_type") != "blip":
        raise UserError(f"a config.json of model_type {config.get('model_type')!r} describes no BLIP captioner")
    vision, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise UserError("config.json has no vision_config or no text_config")
    for name, section in (("vision_config", vision), ("text_config", text)):
        if section.get("hidden_act", "gelu") != "gelu":
            raise UserError(f"config.json: {name}.hidden_act is {section['hidden_act']!r}; BLIP's is 'gelu'")
    defaults = asdict(BlipGeometry()) | THEIR_DEFAULTS
    stated = {name: number(vision, key, defaults[name]) for name, key in VISION_KEYS.items()}
    stated |= {key: number(text, key, defaults[key]) for key in TEXT_KEYS}
    return BlipGeometry(**stated)


def stated_vision_eps(config: Mapping[str, Any]) -> tuple[float, str]:
    """The vision LayerNorm epsilon of a transformers config.json, and a line that says why it is this one."""
    vision = config.get("vision_config")
    if isinstance(vision, Mapping) and "layer_norm_eps" in vision:
        eps = number(vision, "layer_norm_eps", ORIGINAL_VISION_EPS)
        return eps, f"vision LayerNorm epsilon {eps:g}: config.json states it (the original BLIP has 1e-6)"
    return ORIGINAL_VISION_EPS, "vision LayerNorm epsilon 1e-06: no config.json states one, and the original has 1e-6"


def geometry_of(model: Any) -> BlipGeometry:
    """The geometry of a built BlipCaption; on the meta device is enough."""
    vit, text = model.visual_encoder, model.text_decoder.config
    (rows, columns), (height, width) = vit.patch_embed.patch_size, vit.patch_embed.img_size
    attention, mlp = (getattr(vit.blocks[0], part, None) for part in ("attn", "mlp"))
    features = _beyond_blip(vit)
    features += ["patches that are not square"] * (rows != columns) + ["image that is not square"] * (height != width)
    return BlipGeometry(
        image_size=height,
        patch_size=rows,
        vision_width=vit.embed_dim,
        vision_depth=len(vit.blocks),
        vision_heads=getattr(attention, "num_heads", 0),
        vision_mlp_dim=getattr(getattr(mlp, "fc1", None), "out_features", 0),
        vision_eps=layer_norm_eps(vit) or ORIGINAL_VISION_EPS,
        vision_features=tuple(features),
        label_smoothing=model.label_smoothing,
        **asdict(text),
    )


def _beyond_blip(vit: VisionTransformer) -> list[str]:
    """What this encoder has, or lacks, that the ViT in transformers' BLIP cannot be built with."""
    block: Any = vit.blocks[0]
    if type(block) is not Block or type(block.attn) is not Attention:
        return [f"{type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"]

    def used(layer: Any) -> bool:
        return not isinstance(layer, nn.Identity)

    mlp, attention, patches = block.mlp, block.attn, vit.patch_embed
    plain_mlp, act = type(mlp) is Mlp and not used(mlp.norm), getattr(mlp, "act", None)
    found = {
        "layer scale": used(block.ls1),
        f"{vit.num_reg_tokens} register tokens": vit.num_reg_tokens > 0,
        "lack of a class token": not vit.has_class_token,
        "lack of position embeddings": vit.pos_embed is None,
        "class token without a position": vit.pos_embed is not None and vit.has_class_token and vit.no_embed_class,
        "norm before the blocks": used(vit.norm_pre),
        "lack of a final norm": not used(vit.norm),
        f"feed-forward ({type(mlp).__name__})": not plain_mlp,
        f"activation ({type(act).__name__})": plain_mlp and not (type(act) is nn.GELU and act.approximate == "none"),
        "norms inside the attention": used(attention.q_norm) or used(attention.norm),
        "attention without biases": attention.qkv.bias is None,
        "patch embedding": patches.proj.bias is None or used(patches.norm),
        f"norm ({type(block.norm1).__name__})": not isinstance(block.norm1, nn.LayerNorm),
        "norms of different epsilons": isinstance(block.norm1, nn.LayerNorm) and layer_norm_eps(vit) is None,
    }
    return [what for what, there in found.items() if there]


def differences(stated: BlipGeometry, model: BlipGeometry) -> list[str]:
    """Where a checkpoint's geometry is not the model's, a phrase each."""
    return [
        f"{field.name} is {getattr(stated, field.name)} in the checkpoint, {getattr(model, field.name)} in the model"
        for field in fields(BlipGeometry)
        if field.name not in FREE_FIELDS and getattr(stated, field.name) != getattr(model, field.name)
    ]


def number(section: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a config.json states: a whole number above 0 where the default is one, else a number from 0 to 1."""
    value = section.get(key, default)
    if not isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"config.json: {key} is {value!r}, not a number from 0 to 1")
        return float(value)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:  # image_size: [384, 384]
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, not a whole number above 0")
    return value
