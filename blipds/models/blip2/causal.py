"""A causal language model behind the queries of an image: OPT, Llama and the like (arch blip2_opt)."""

import inspect
from typing import Any

import torch
from torch import Tensor

from blipds.models.attention import visibility
from blipds.models.blip2.language_model import CachedBeams, cache_argument
from blipds.models.blip2.model import Blip2Caption


class CausalCaption(Blip2Caption):
    """The language model continues queries and prompt."""

    @property
    def max_positions(self) -> int:  # type: ignore[override]
        return self.language_model.config.max_position_embeddings - self.config.num_query_token

    def logits(self, queries: Tensor, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        return text_logits(self.language_model, queries, input_ids, position_ids, segment_ids)

    def step_decoder(self, image_embeds: Tensor, max_len: int) -> "CachedLanguageModel":
        return CachedLanguageModel(self.language_model, self.bridge(image_embeds))


def run(
    language_model: Any,
    embeds: Tensor,
    position_ids: Tensor,
    mask: Tensor | None,
    kept: int,
    cache: Any = None,
) -> Tensor:
    """Next-token logits (R, kept, V) at the last `kept` positions, 0: all, of embeds (R, T, C).

    position_ids (R, T); mask (R, 1, T, S): added to the scores of attention to the S positions that the cache and
    embeds hold; None: each sees what is before it.
    """
    return language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=cache is not None,
        logits_to_keep=kept,
        **cache_argument(inspect.signature(language_model.forward).parameters, cache),
    ).logits


def text_logits(
    language_model: Any,
    queries: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
) -> Tensor:
    """Logits (I, L, V) behind every token of rows of captions (data/caption_rows.py) of images.

    queries (I, Q, C) stand in front of the rows (I, L): every caption of a row sees them and the prompt, so that they
    are computed once an image. The logits of padding and prompt are computed for nothing.
    """
    count = queries.shape[1]
    places = torch.arange(count, device=input_ids.device).expand(len(queries), -1)
    embeds = torch.cat([queries, language_model.get_input_embeddings()(input_ids)], dim=1)
    segments = torch.cat([torch.zeros_like(places), segment_ids], dim=1)
    positions = torch.cat([places, position_ids + count], dim=1)
    return run(language_model, embeds, positions, visibility(segments, embeds.dtype), input_ids.shape[1])


class CachedLanguageModel(CachedBeams):
    """The language model as generation sees it: keys and values of queries and prompt are in the cache once."""

    def __init__(self, language_model: Any, queries: Tensor) -> None:
        from transformers import DynamicCache

        super().__init__(DynamicCache())
        self.language_model = language_model
        self.queries = queries

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        words = self.language_model.get_input_embeddings()(prompt_ids)
        embeds = torch.cat([self.queries, words.expand(len(self.queries), -1, -1)], dim=1)
        images, self.length, _ = embeds.shape
        self.see(images, beams, self.length, embeds.device)
        places = torch.arange(self.length, device=embeds.device).expand(images, -1)
        return run(self.language_model, embeds, places, None, 1, self.cache)[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        embeds = self.language_model.get_input_embeddings()(tokens)
        mask = self.grow(embeds.dtype)
        places = torch.full_like(tokens, self.length)
        self.length += 1
        return run(self.language_model, embeds, places, mask, 0, self.cache)
