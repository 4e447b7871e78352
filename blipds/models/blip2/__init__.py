"""BLIP-2 (arXiv 2301.12597): a ViT, a Q-Former, and a frozen language model."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from blipds.errors import UserError
from blipds.models.blip2.causal import CausalCaption
from blipds.models.blip2.config import CONFIGS, Blip2Config, OptConfig, T5Config
from blipds.models.blip2.export import export_lavis, export_transformers
from blipds.models.blip2.language_model import build_language_model, language_config
from blipds.models.blip2.model import Blip2Caption, Bridge, transformers_layers
from blipds.models.blip2.t5 import MODEL_TYPES as T5_TYPES
from blipds.models.blip2.t5 import T5Caption, prompt_ids_of
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.protocol import Arch, CheckpointFn, Description, Export
from blipds.models.vision import build_vision_transformer, checkpoint_last
from blipds.registry import ARCHS, PROCESSORS

# BLIP-2 paper, section 3.4: ViT-g/14 of EVA-CLIP and ViT-L/14 of CLIP without their last block and final norm
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "eva_clip_g": ("vit_giant_patch14_224", {"depth": 39}),
    "clip_L": ("vit_large_patch14_clip_quickgelu_224", {"depth": 23}),
}
DECODING = {"num_beams": 5, "max_len": 30, "min_len": 8}  # of the published numbers


@PROCESSORS.register("blip2_image_train")
def image_train(**arguments: Any) -> Any:
    """LAVIS's name of crop_flip."""
    return PROCESSORS["crop_flip"](**arguments)


class Blip2(Arch):
    """What the archs share: all but the language model. Weights from LAVIS and transformers."""

    config: ClassVar[type[Blip2Config]]
    exports: ClassVar[Mapping[str, Callable[[Path, Export], None]]] = {"hf": export_transformers, "blip": export_lavis}

    def build(self, config: Any, checkpoint_fn: CheckpointFn) -> Blip2Caption:
        name, sizes = ENCODERS.get(config.vit_model, (config.vit_model, {}))
        kwargs = {**sizes, "drop_path_rate": config.drop_path_rate, "final_norm": False, **config.vit_kwargs}
        visual_encoder = build_vision_transformer(name, config.image_size, **kwargs)
        language_model = self.build_language_model(config)
        text_width = language_model.get_input_embeddings().embedding_dim
        qformer = build_qformer(config, visual_encoder.embed_dim)
        bridge = Bridge(qformer, config.num_query_token, visual_encoder.embed_dim, text_width)
        model = self.join(visual_encoder, bridge, language_model, config)
        if config.use_grad_checkpoint:
            checkpoint_last([*visual_encoder.blocks, *transformers_layers(model)], None, checkpoint_fn)
        return model

    @abstractmethod
    def build_language_model(self, config: Any) -> Any:
        """The frozen language model of transformers, weights random. UserError for one that the arch cannot read."""

    @abstractmethod
    def join(self, visual_encoder: Any, bridge: Bridge, language_model: Any, config: Any) -> Blip2Caption:
        """The captioner of the parts."""

    @abstractmethod
    def reads(self, model_type: str) -> bool:
        """Whether the arch reads language models of this type of transformers."""

    def describe(self, stored: StoredTensors) -> Description | None:
        """A transformers folder, or a .pth of `launch/export.py` with the model section in it."""
        if stored.config.get("model_type") == "blip-2":
            text = stored.config.get("text_config") or {}
            if not self.reads(text.get("model_type", "opt")):
                return None
            return Description(config_of_folder(self.config, stored), self.build, decoding=DECODING)
        if f"{self.config.LANGUAGE}_model" not in stored.config:
            return None
        names = {field.name for field in fields(self.config)}
        try:
            config = self.config(**{key: value for key, value in stored.config.items() if key in names})
        except TypeError as error:
            raise UserError(f"{stored.location}: the config in it is none of a model ({error})") from error
        return Description(config, self.build, decoding=DECODING)


def model_types(language: str) -> dict[str, Path]:
    """The packaged defaults of an arch, by LAVIS's names."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if language in path.stem}


@ARCHS.register("blip2_opt")
class Blip2Opt(Blip2):
    """BLIP-2 with OPT or another causal language model."""

    config = OptConfig
    model_types: ClassVar[Mapping[str, Path]] = model_types("opt")

    def build_language_model(self, config: OptConfig) -> Any:
        from transformers import AutoModelForCausalLM

        source = config.language_source
        try:
            return build_language_model(AutoModelForCausalLM, language_config(source), self.dtype)
        except ValueError as error:
            raise UserError(f"the language model '{source}': not a causal one ({str(error)[:200]})") from error

    def join(self, visual_encoder: Any, bridge: Bridge, language_model: Any, config: OptConfig) -> CausalCaption:
        model = CausalCaption(visual_encoder, bridge, language_model, config)
        if model.max_positions < config.max_txt_len:
            raise UserError(
                f"model.max_txt_len is {config.max_txt_len}, but the language model has {model.max_positions} "
                f"positions behind the {config.num_query_token} queries"
            )
        return model

    def reads(self, model_type: str) -> bool:
        return model_type not in T5_TYPES


@ARCHS.register("blip2_t5")
class Blip2T5(Blip2):
    """BLIP-2 with Flan-T5 or another T5."""

    config = T5Config
    model_types: ClassVar[Mapping[str, Path]] = model_types("t5")

    def build_language_model(self, config: T5Config) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        stated = language_config(config.language_source)
        if not self.reads(stated.model_type):
            given = f"'{config.language_source}' is a {stated.model_type}"
            raise UserError(f"the language model {given}; allowed: {', '.join(T5_TYPES)}")
        if config.llm is None:
            stated.dense_act_fn = "gelu"  # LAVIS's, where Flan-T5's own config says tanh's approximation of it
        return build_language_model(AutoModelForSeq2SeqLM, stated, self.dtype)

    def join(self, visual_encoder: Any, bridge: Bridge, language_model: Any, config: T5Config) -> T5Caption:
        prompt_ids = prompt_ids_of(config.tokenizer_source, config.prompt)
        return T5Caption(visual_encoder, bridge, language_model, config, prompt_ids=prompt_ids)

    def reads(self, model_type: str) -> bool:
        return model_type in T5_TYPES


def config_of_folder(kind: type[Blip2Config], stored: StoredTensors) -> Blip2Config:
    """The model section that builds what a transformers folder describes."""
    from transformers import AutoConfig

    try:
        stated: Any = AutoConfig.from_pretrained(stored.path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{stored.location}: {' '.join(str(error).split())[:300]}") from error
    vision, qformer = stated.vision_config, stated.qformer_config
    return kind(
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
        llm=str(stored.path),
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
