"""BLIP-2 (arXiv 2301.12597): a ViT, a Q-Former, and a frozen language model."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from blipds.errors import UserError
from blipds.models.blip2.config import CONFIGS, Blip2Config
from blipds.models.blip2.export import export_lavis, export_transformers
from blipds.models.blip2.language_model import build_language_model
from blipds.models.blip2.model import Blip2Caption, Bridge, transformers_layers
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.protocol import Arch, CheckpointFn, Description, Export
from blipds.models.vision import build_vision_transformer, checkpoint_last
from blipds.registry import ARCHS, PROCESSORS

# BLIP-2 paper, section 3.4: EVA-CLIP's ViT-g/14 without its last block and final norm
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {"eva_clip_g": ("vit_giant_patch14_224", {"depth": 39})}
DECODING = {"num_beams": 5, "max_len": 30, "min_len": 8}  # of the published numbers


@PROCESSORS.register("blip2_image_train")
def image_train(**arguments: Any) -> Any:
    """LAVIS's name of crop_flip."""
    return PROCESSORS["crop_flip"](**arguments)


@ARCHS.register("blip2_opt")
class Blip2Opt(Arch):
    """BLIP-2 with OPT or another causal language model; weights from LAVIS and transformers."""

    config = Blip2Config
    model_types: ClassVar[Mapping[str, Path]] = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    exports: ClassVar[Mapping[str, Callable[[Path, Export], None]]] = {"hf": export_transformers, "blip": export_lavis}

    def build(self, config: Blip2Config, checkpoint_fn: CheckpointFn) -> Blip2Caption:
        name, sizes = ENCODERS.get(config.vit_model, (config.vit_model, {}))
        kwargs = {**sizes, "drop_path_rate": config.drop_path_rate, "final_norm": False, **config.vit_kwargs}
        visual_encoder = build_vision_transformer(name, config.image_size, **kwargs)
        language_model = build_language_model(config.language_source)
        text_width = language_model.get_input_embeddings().embedding_dim
        qformer = build_qformer(config, visual_encoder.embed_dim)
        bridge = Bridge(qformer, config.num_query_token, visual_encoder.embed_dim, text_width)
        model = Blip2Caption(visual_encoder, bridge, language_model, config)
        if model.max_positions < config.max_txt_len:
            raise UserError(
                f"model.max_txt_len is {config.max_txt_len}, but the language model has {model.max_positions} "
                f"positions behind the {config.num_query_token} queries"
            )
        if config.use_grad_checkpoint:
            checkpoint_last([*visual_encoder.blocks, *transformers_layers(model)], None, checkpoint_fn)
        return model

    def describe(self, stored: StoredTensors) -> Description | None:
        """A transformers folder, or a .pth of `launch/export.py` with the model section in it."""
        if stored.config.get("model_type") == "blip-2":
            return Description(*described(config_of_folder(stored)), decoding=DECODING)
        if "vit_model" not in stored.config:
            return None
        names = {field.name for field in fields(Blip2Config)}
        try:
            config = Blip2Config(**{key: value for key, value in stored.config.items() if key in names})
        except TypeError as error:
            raise UserError(f"{stored.location}: the config in it is none of a model ({error})") from error
        return Description(*described(config), decoding=DECODING)


def described(config: Blip2Config) -> tuple[Blip2Config, Callable[[CheckpointFn], Blip2Caption]]:
    return config, partial(Blip2Opt().build, config)


def config_of_folder(stored: StoredTensors) -> Blip2Config:
    """The model section that builds what a transformers folder describes."""
    from transformers import AutoConfig

    try:
        stated: Any = AutoConfig.from_pretrained(stored.path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{stored.location}: {' '.join(str(error).split())[:300]}") from error
    vision, qformer = stated.vision_config, stated.qformer_config
    return Blip2Config(
        image_size=vision.image_size,
        vit_kwargs={
            "patch_size": vision.patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": (vision.intermediate_size + 0.5) / vision.hidden_size,  # timm cuts off what follows the point
        },
        num_query_token=stated.num_query_tokens,
        qformer_kwargs={name: getattr(qformer, name) for name in QFORMER_SIZES},
        opt_model=str(stored.path),
    )


QFORMER_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "cross_attention_frequency"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def build_qformer(config: Blip2Config, image_width: int) -> Any:
    """transformers' Q-Former of the sizes asked for, without its weights."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel
    from transformers.initialization import no_init_weights

    if strange := sorted(config.qformer_kwargs.keys() - set(QFORMER_SIZES)):
        raise UserError(f"model.qformer_kwargs.{strange[0]}: unknown; allowed: {', '.join(QFORMER_SIZES)}")
    with no_init_weights():
        return Blip2QFormerModel(Blip2QFormerConfig(**config.qformer_kwargs, encoder_hidden_size=image_width))
