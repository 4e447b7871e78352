"""BLIP's captioner: image encoder, text decoder and loss (BLIP paper, arXiv 2201.12086, section 3)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blipds.errors import UserError
from blipds.models.blip.checkpoints import BlipFormat, text_layer_differences
from blipds.models.blip.config import BlipConfig
from blipds.models.blip.cross_attention import cross_attention
from blipds.models.blip.geometry import (
    VISION_EPS_KEY,
    differences,
    geometry_from_transformers_config,
    geometry_of,
    number,
    stated_vision_eps,
)
from blipds.models.blip.text_decoder import TextDecoder
from blipds.models.checkpoint_files import StoredTensors
from blipds.models.checkpoints import Checkpoint
from blipds.models.initialisation import RandomWeight, normal, zeros
from blipds.models.loss import smoothed_cross_entropy
from blipds.models.protocol import CaptioningModel
from blipds.models.vision import (
    block_of,
    hub_name_of,
    layer_norm_eps,
    pretrained_encoder,
    random_vision_weights,
    set_layer_norm_eps,
)


class BlipCaption(CaptioningModel):
    """`label_smoothing`: 0.1 in the paper's code."""

    reads_rows = True
    lora_targets = ("attn.qkv", "self.query", "self.value")

    def __init__(
        self, visual_encoder: VisionTransformer, text_decoder: TextDecoder, *, label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder
        self.label_smoothing = label_smoothing

    @property
    def image_encoder(self) -> VisionTransformer:
        return self.visual_encoder

    @property
    def max_positions(self) -> int:  # type: ignore[override]
        return self.text_decoder.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.text_decoder.config.vocab_size

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
        logits = self.text_decoder(
            input_ids,
            self.encode(pixel_values, image_embeds),
            position_ids=position_ids,
            segment_ids=segment_ids,
            label_positions=label_positions,
        )
        return smoothed_cross_entropy(logits, labels, self.label_smoothing, label_weights)

    def step_decoder(self, image_embeds: Tensor, max_len: int) -> "CachedDecoder":
        return CachedDecoder(self.text_decoder, image_embeds, max_len)

    def layers(self) -> Sequence[nn.Module]:
        return [*self.visual_encoder.blocks, *self.text_decoder.bert.encoder.layer]

    def encoder_layer(self, name: str) -> int | None:
        return block_of(name)

    def random_weights(self) -> Iterator[RandomWeight]:
        """Image encoder as timm's default, text decoder as BERT (normal, `initializer_range`, biases 0)."""
        yield from random_vision_weights(self.visual_encoder, "visual_encoder")
        weights = normal(self.text_decoder.config.initializer_range)
        for path, module in self.text_decoder.named_modules(prefix="text_decoder"):
            if isinstance(module, nn.Linear | nn.Embedding):
                yield f"{path}.weight", module.weight, weights
            if isinstance(module, nn.Linear):
                yield f"{path}.bias", module.bias, zeros

    def checkpoint_format(self) -> BlipFormat:
        encoder: Any = self.visual_encoder
        return BlipFormat(0 if encoder.no_embed_class else encoder.num_prefix_tokens)

    def check_geometry(self, checkpoint: Checkpoint) -> tuple[list[str], str]:
        if checkpoint.kind == "transformers" and checkpoint.config:
            stated = geometry_from_transformers_config(checkpoint.config)
            if wrong := differences(stated, geometry_of(self)):
                raise UserError(f"{checkpoint.location} does not fit the model: {'; '.join(wrong)}")
        if checkpoint.kind == "bert" and (wrong := text_layer_differences(checkpoint.config, self.text_decoder.config)):
            line = f"text_pretrained: its layers do not fit and are left out, {'; '.join(wrong)}"
            return ["text_decoder.bert.encoder.layer.*"], line
        return [], ""

    def load_parts(self, config: BlipConfig, load: Callable[[str | StoredTensors, str], None]) -> None:
        """`vit_pretrained`: true (timm's own weights), a hub name, a path or URL. `text_pretrained`: a BERT."""
        if source := config.vit_pretrained:
            hub_name = hub_name_of(source)
            if source is True or hub_name:
                name, tensors = hub_name or f"timm's {config.vit_type}", pretrained_encoder(config.vit_type, hub_name)
                load(StoredTensors(Path(name), tensors, location=name), "timm")
            else:
                load(source, "timm")
        if config.text_pretrained:
            load(config.text_pretrained, "bert")

    def identity(self) -> str:
        return str(geometry_of(self))

    def constants(self) -> dict[str, float]:
        eps = layer_norm_eps(self.visual_encoder)
        return {} if eps is None else {VISION_EPS_KEY: eps}

    def take_constants(self, checkpoint: Checkpoint) -> str | None:
        if checkpoint.kind == "transformers":
            eps, line = stated_vision_eps(checkpoint.config)
            set_layer_norm_eps(self.visual_encoder, eps)
            return line
        if VISION_EPS_KEY not in checkpoint.config:
            return None
        before, eps = layer_norm_eps(self.visual_encoder), number(checkpoint.config, VISION_EPS_KEY, 0.0)
        set_layer_norm_eps(self.visual_encoder, eps)
        return None if eps == before else f"vision LayerNorm epsilon {eps:g}: the checkpoint says so"

    def cross_attention(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        return cross_attention(self, pixel_values, input_ids)


class CachedDecoder:
    """The text decoder as generation sees it (`generation.StepDecoder`), with the caches of all its layers."""

    def __init__(self, text_decoder: TextDecoder, image_embeds: Tensor, max_length: int) -> None:
        self.text_decoder = text_decoder
        self.images = len(image_embeds)
        self.beams = 1
        self.caches = text_decoder.start_caches(image_embeds, max_length)

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        logits = self.text_decoder(prompt_ids.expand(self.images, -1), caches=self.caches)
        self.beams = beams
        for cache in self.caches:
            cache.expand(beams)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.text_decoder(tokens.reshape(-1, 1), caches=self.caches).view(*tokens.shape, -1)

    def rows(self, images: Tensor) -> Tensor:
        """Rows of text (I * K) that belong to some images."""
        return (images.unsqueeze(-1) * self.beams + torch.arange(self.beams, device=images.device)).flatten()

    def reorder(self, parents: Tensor) -> None:
        first = torch.arange(self.images, device=parents.device).unsqueeze(-1) * self.beams
        for cache in self.caches:
            cache.reorder((first + parents).flatten())

    def keep(self, images: Tensor) -> None:
        rows = self.rows(images)
        self.images = len(images)
        for cache in self.caches:
            cache.keep(images, rows)
