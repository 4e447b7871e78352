"""`model:` of the archs blip2_opt and blip2_t5, under LAVIS's names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from blipds.config.sections import ModelConfig, limited
from blipds.errors import UserError

CONFIGS = Path(__file__).with_name("configs")
EVA_VIT_G = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth"


@dataclass
class Blip2Config(ModelConfig):
    """vit_kwargs: of timm, qformer_kwargs: of transformers' Blip2QFormerConfig, over the sizes of the paper.

    vit_pretrained: encoder for files that hold none. llm: any language model of transformers that the arch can read, a
    folder or hub name, in the place of LAVIS's. load_llm: false leaves the language model's weights random.
    """

    LANGUAGE: ClassVar[str]  # what LAVIS's names of the language model begin with, in configs and files

    CHECKPOINTING: ClassVar[tuple[dict[str, Any], ...]] = (
        {"use_grad_checkpoint": False},
        {"use_grad_checkpoint": True},
    )
    REPLACED: ClassVar[dict[str, str]] = {
        "vit_precision": "precision is set in the DeepSpeed JSON (bf16, fp16), for all parts",
        "apply_lemmatizer": "it changes answers to questions; captions are never lemmatized",
    }

    prompt: str = "a photo of "
    max_txt_len: int = limited(32, "2 or more")
    vit_model: str = "eva_clip_g"
    vit_kwargs: dict[str, Any] = field(default_factory=dict)
    vit_pretrained: str | None = EVA_VIT_G
    drop_path_rate: float = limited(0.0, "0 or more, below 1")
    use_grad_checkpoint: bool = False
    num_query_token: int = limited(32, "1 or more")
    qformer_kwargs: dict[str, Any] = field(default_factory=dict)
    llm: str | None = None
    load_llm: bool = True

    @property
    def tokenizer_source(self) -> str:
        return self.tokenizer or self.language_source

    @property
    def language_source(self) -> str:
        """The folder or hub name of the language model."""
        return self.llm or getattr(self, f"{self.LANGUAGE}_model")

    @property
    def hidden_size(self) -> int:
        from blipds.models.blip2.language_model import language_config

        return language_config(self.language_source).hidden_size

    def check_precision(self, precision: str) -> None:
        if precision == "fp16" and not self.freeze_vit:
            raise UserError(
                "fp16 in the DeepSpeed JSON, and an image encoder that learns: its numbers overflow (NaN); take bf16, "
                "or model.freeze_vit=true"
            )

    def facts(self) -> list[tuple[str, str]]:
        return [("Image encoder", self.vit_model), ("Language model", self.language_source)]

    def parts(self) -> dict[str, str]:
        given = {
            "image encoder": self.vit_pretrained,
            "language model": self.language_source if self.load_llm else None,
        }
        return {part: source for part, source in given.items() if source}

    @property
    def encoder_name(self) -> str:
        return f"{self.vit_model} {sorted(self.vit_kwargs.items())}"

    def __post_init__(self) -> None:
        if self.prompt.strip():  # LAVIS writes it with and without the space
            self.prompt = self.prompt.rstrip() + " "
        super().__post_init__()


@dataclass
class OptConfig(Blip2Config):
    """`model:` of blip2_opt."""

    LANGUAGE: ClassVar[str] = "opt"
    TEXT: ClassVar[str] = "causal"

    arch: str = "blip2_opt"
    model_type: str | None = "caption_coco_opt2.7b"
    opt_model: str = "facebook/opt-2.7b"


@dataclass
class T5Config(Blip2Config):
    """`model:` of blip2_t5."""

    LANGUAGE: ClassVar[str] = "t5"
    TEXT: ClassVar[str] = "seq2seq"

    arch: str = "blip2_t5"
    model_type: str | None = "caption_coco_flant5xl"
    t5_model: str = "google/flan-t5-xl"

    def check_precision(self, precision: str) -> None:
        if precision == "fp16":
            raise UserError("fp16 in the DeepSpeed JSON: T5's numbers overflow in it (NaN); take bf16")
