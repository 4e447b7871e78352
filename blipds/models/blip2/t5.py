"""T5 behind the queries of an image (arch blip2_t5): its encoder reads queries and prompt, its decoder writes."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blipds.errors import UserError
from blipds.models.attention import visibility
from blipds.models.blip2.language_model import CachedBeams, cache_argument
from blipds.models.blip2.model import Blip2Caption

MODEL_TYPES = ("t5", "mt5")  # of transformers, with a bias of relative positions in the first layer


class T5Caption(Blip2Caption):
    """prompt_ids (P,): what the encoder reads behind the queries, the tokenizer's end included, as LAVIS feeds it."""

    def __init__(self, *parts: Any, prompt_ids: Sequence[int]) -> None:
        super().__init__(*parts)
        self.register_buffer("prompt_ids", torch.tensor(prompt_ids), persistent=False)

    def context(self, queries: Tensor) -> Tensor:
        """What the encoder makes of queries (I, Q, C) and prompt, (I, Q + P, C): once for all captions of an image."""
        words = self.language_model.get_input_embeddings()(self.prompt_ids)
        embeds = torch.cat([queries, words.expand(len(queries), -1, -1)], dim=1)
        return self.language_model.encoder(inputs_embeds=embeds).last_hidden_state

    def logits(self, queries: Tensor, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        context = self.context(queries)
        bias = position_bias(self.language_model, position_ids, position_ids)
        return decode(self.language_model, input_ids, context, bias, visibility(segment_ids, context.dtype))

    def step_decoder(self, image_embeds: Tensor, max_len: int) -> "CachedT5":
        return CachedT5(self.language_model, self.context(self.bridge(image_embeds)))


def prompt_ids_of(source: str, prompt: str) -> list[int]:
    """The prompt as the tokenizer of a folder or hub name writes it, its end token behind."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)(prompt.rstrip())["input_ids"]
    except (OSError, ValueError) as error:
        raise UserError(f"model.tokenizer '{source}': {' '.join(str(error).split())}") from error


def position_bias(language_model: Any, places: Tensor, of: Tensor) -> Tensor:
    """What the decoder adds to scores of tokens at `places` (..., T) that attend to those `of` places (..., S).

    (..., H, T, S). transformers counts places from 0 in a row; captions of an image share one, each with its own count.
    """
    attention = language_model.decoder.block[0].layer[0].SelfAttention
    buckets = attention._relative_position_bucket(
        of.unsqueeze(-2) - places.unsqueeze(-1),
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).movedim(-1, -3)


def decode(
    language_model: Any, input_ids: Tensor, context: Tensor, bias: Tensor, mask: Tensor, cache: Any = None
) -> Tensor:
    """Logits (R, T, V) behind every token of input_ids (R, T), whose rows read context (R, N, C).

    bias (..., H, T, S) and mask (R, 1, T, S) are added to the scores of attention to the S places that the cache and
    input_ids hold. It is transformers' T5Stack.forward with a bias of ours; layers are entered by calling them. Each
    adds the two up anew: R x H x T x S numbers a layer, which captions of an image pay for sharing a row.
    """
    decoder = language_model.decoder
    hidden = decoder.dropout(decoder.embed_tokens(input_ids))
    cached = cache_argument(inspect.signature(decoder.forward).parameters, cache)
    cross_bias = None
    for block in decoder.block:
        hidden, bias, cross_bias, *_ = block(hidden, mask, bias, context, None, cross_bias, **cached)
    hidden = decoder.dropout(decoder.final_layer_norm(hidden))
    if getattr(language_model.config, "scale_decoder_outputs", False):
        hidden = hidden * language_model.config.d_model**-0.5
    return language_model.lm_head(hidden)


class CachedT5(CachedBeams):
    """The decoder as generation sees it: all beams of an image read one context, whose keys and values are cached."""

    def __init__(self, language_model: Any, context: Tensor) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        super().__init__(EncoderDecoderCache(DynamicCache(), DynamicCache()))
        self.language_model = language_model
        self.context = context

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        self.places = torch.arange(len(prompt_ids), device=prompt_ids.device)  # of every token in the cache
        self.length = len(prompt_ids)
        self.see(len(self.context), beams, self.length, prompt_ids.device)
        input_ids = prompt_ids.expand(len(self.context), -1)
        mask = visibility(torch.zeros_like(input_ids), self.context.dtype)
        return self.decode(input_ids, self.places, mask)[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        places = torch.full_like(tokens[0], self.length)
        self.places = torch.cat([self.places, places])
        self.length += 1
        return self.decode(tokens, places, self.grow(self.context.dtype))

    def decode(self, input_ids: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        bias = position_bias(self.language_model, places, self.places).unsqueeze(0)
        return decode(self.language_model, input_ids, self.context, bias, mask, self.cache)

    def keep(self, images: Tensor) -> None:
        super().keep(images)
        self.context = self.context[images]
