"""BLIP-2's captioner (arXiv 2301.12597): image encoder, Q-Former, and a frozen language model behind both."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blipds.errors import UserError
from blipds.models.blip2.checkpoints import Blip2Format, completed
from blipds.models.blip2.config import Blip2Config
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.checkpoints import Checkpoint
from blipds.models.initialisation import RandomWeight, constant, normal, uniform_by_fan_in, zeros
from blipds.models.loss import smoothed_cross_entropy
from blipds.models.parameters import whole_shape
from blipds.models.protocol import CaptioningModel
from blipds.models.vision import block_of, random_vision_weights

LN_VISION_EPS = 1e-5  # LAVIS's; transformers' folders have the encoder's 1e-6
LN_VISION_EPS_KEY = "ln_vision_eps"


class Bridge(nn.Module):
    """From the encoder's tokens (I, N, width) to what stands before a caption, (I, Q, width of the language model)."""

    def __init__(self, qformer: Any, num_queries: int, image_width: int, text_width: int) -> None:
        super().__init__()
        width = qformer.config.hidden_size
        self.ln_vision = nn.LayerNorm(image_width, eps=LN_VISION_EPS)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, width))
        self.qformer: Any = qformer
        self.projection = nn.Linear(width, text_width)

    def forward(self, image_embeds: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=self.ln_vision(image_embeds))
        return self.projection(found.last_hidden_state)


class Blip2Caption(CaptioningModel):
    """The language model is frozen; in training it drops out what its config says, as in LAVIS.

    How it reads queries and writes captions is its own: `logits` and `step_decoder`.
    """

    reads_rows = True

    lora_targets = tuple(f"language_model.*.{name}" for name in ("q_proj", "v_proj", "q", "v"))  # T5's are q and v
    lora_train_also = ("bridge.qformer.*", "bridge.projection.*")  # modules, as peft's files want them

    def __init__(
        self, visual_encoder: VisionTransformer, bridge: Bridge, language_model: nn.Module, config: Blip2Config
    ) -> None:
        super().__init__()
        self.visual_encoder: Any = visual_encoder
        self.bridge = bridge
        self.language_model: Any = language_model
        self.config = config
        if config.load_llm:
            self.elsewhere = "language_model."
        self.language: dict[str, str] = {}  # the file that its weights were read from, and their hash

    @property
    def image_encoder(self) -> VisionTransformer:
        return self.visual_encoder

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.language_model.config.vocab_size

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor,
        label_positions: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        label_weights: Tensor | None = None,
    ) -> Tensor:
        queries = self.bridge(self.encode(pixel_values, image_embeds))
        logits = self.logits(queries, input_ids, position_ids, segment_ids)
        logits = logits.flatten(0, 1).index_select(0, label_positions)
        return smoothed_cross_entropy(logits, labels, 0.0, label_weights)

    @abstractmethod
    def logits(self, queries: Tensor, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Logits (I, L, V) behind every token of rows of captions, given what an image's queries (I, Q, C) say."""

    def layers(self) -> Sequence[nn.Module]:
        return [*self.visual_encoder.blocks, *transformers_layers(self)]

    def encoder_layer(self, name: str) -> int | None:
        return block_of(name)

    def random_weights(self) -> Iterator[RandomWeight]:
        """Image encoder as timm's default, Q-Former as BERT, the projection as torch's linear layers.

        The language model only where no file has its weights (`load_llm`).
        """
        yield from random_vision_weights(self.visual_encoder, "visual_encoder")
        parts = [self.bridge, self.language_model] if not self.config.load_llm else [self.bridge]
        own = {id(parameter) for part in parts for parameter in part.parameters()}
        for name, parameter in self.named_parameters():
            if id(parameter) not in own:
                continue
            if name == "bridge.projection.weight":
                yield name, parameter, uniform_by_fan_in(self.bridge.projection.in_features)
            elif len(whole_shape(parameter)) > 1:
                yield name, parameter, normal(0.02)
            else:  # of linear layers and norms
                yield name, parameter, zeros if name.endswith("bias") else constant(1.0)

    def checkpoint_format(self) -> Blip2Format:
        return Blip2Format(self)

    def completed(self, stored: StoredTensors, open_other: Callable[[str], StoredTensors]) -> StoredTensors:
        found, language = completed(stored, self.checkpoint_format(), self.config, open_other)
        self.language = language or self.language
        return found

    def load_parts(self, config: Blip2Config, load: Callable[..., None]) -> None:
        """`vit_pretrained`: an `eva_vit_g.pth`; then the language model."""
        if config.load_finetuned or config.load_pretrained:
            return  # `completed` has taken from them what that checkpoint lacks
        if config.vit_pretrained:
            load(config.vit_pretrained, "image encoder")
        if config.load_llm:
            load(config.language_source, "language model")

    def check_geometry(self, checkpoint: Checkpoint) -> tuple[list[str], str]:
        """Heads show in no tensor; a transformers folder states them."""
        if checkpoint.kind != "transformers":
            return [], ""
        ours = {
            "vision_config": self.visual_encoder.blocks[0].attn.num_heads,
            "qformer_config": self.bridge.qformer.config.num_attention_heads,
            "text_config": self.language_model.config.num_attention_heads,
        }
        for section, heads in ours.items():
            stated = (checkpoint.config.get(section) or {}).get("num_attention_heads", heads)
            if stated != heads:
                raise UserError(
                    f"{checkpoint.location} does not fit the model: {section}.num_attention_heads is {stated} in the "
                    f"checkpoint, {heads} in the model"
                )
        return [], ""

    def identity(self) -> str:
        vit, qformer, language = self.visual_encoder, self.bridge.qformer.config, self.language_model.config
        return f"{vit.blocks[0].attn.num_heads} {qformer.to_json_string()} {language.to_json_string()}"

    def constants(self) -> dict[str, Any]:
        return {LN_VISION_EPS_KEY: self.bridge.ln_vision.eps, **self.language}

    def take_constants(self, checkpoint: Checkpoint) -> str | None:
        eps = checkpoint.config.get(LN_VISION_EPS_KEY, LN_VISION_EPS)
        if checkpoint.kind == "transformers":
            eps = (checkpoint.config.get("vision_config") or {}).get("layer_norm_eps", 1e-6)
        before, self.bridge.ln_vision.eps = self.bridge.ln_vision.eps, float(eps)
        return None if eps == before else f"epsilon of ln_vision {eps:g}: the checkpoint says so"


def transformers_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the parts that transformers made."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
