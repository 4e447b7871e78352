"""The frozen language model: a causal one of transformers, behind the queries of an image."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from blipds.errors import UserError
from blipds.models.attention import visibility


def language_config(source: str) -> Any:
    """The transformers config of a language model, in a folder or on the hub; of a captioner's folder, its part."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"the language model '{source}': {' '.join(str(error).split())[:300]}") from error
    return getattr(config, "text_config", config)


def build_language_model(source: str) -> Any:
    """The language model of a folder or hub name, frozen, without its weights: every one of them must be written."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = language_config(source)
    try:
        with no_init_weights():  # it costs minutes, and indexes what ZeRO-3 has shared out
            # fp32 as all parts, until the engine rounds them; the config says what the file has
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(f"the language model '{source}': not a causal language model ({str(error)[:200]})") from error
    model.tie_weights()
    for module in model.modules():
        keep_buffers(module)
    return model.requires_grad_(False)


def keep_buffers(module: nn.Module) -> None:
    """Undoes what engines do to buffers: rotary frequencies rounded to bf16 would turn far words by tenths of a radian.

    transformers keeps them in fp32 in every precision.
    """
    exact = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}

    def restore(module: nn.Module, inputs: Any) -> None:
        for name, buffer in exact.items():
            given = module.get_buffer(name)
            if given.dtype != buffer.dtype:
                setattr(module, name, buffer.to(given.device))

    if exact:
        module.register_forward_pre_hook(restore)


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
    parameters = inspect.signature(language_model.forward).parameters
    cached = {"cache" if "cache" in parameters else "past_key_values": cache}  # renamed in transformers 5.2x
    return language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=cache is not None,
        logits_to_keep=kept,
        **cached,
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


class CachedLanguageModel:
    """The language model as generation sees it (`generation.StepDecoder`).

    All beams of an image are one row of the cache: keys and values of queries and prompt are there once, and those of
    every token that any beam has tried stay where they are. `seen` (J, K, S): which of the S places in the cache are of
    beam k. To reorder beams costs a gather of booleans; to keep all tokens, K places a step beside the Q + P shared.
    """

    def __init__(self, language_model: Any, queries: Tensor) -> None:
        from transformers import DynamicCache

        self.language_model = language_model
        self.queries = queries
        self.cache = DynamicCache()

    def start(self, prompt_ids: Tensor, beams: int) -> Tensor:
        words = self.language_model.get_input_embeddings()(prompt_ids)
        embeds = torch.cat([self.queries, words.expand(len(self.queries), -1, -1)], dim=1)
        images, self.length, _ = embeds.shape
        places = torch.arange(self.length, device=embeds.device).expand(images, -1)
        self.seen = places.new_ones(images, beams, self.length, dtype=torch.bool)
        return run(self.language_model, embeds, places, None, 1, self.cache)[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        images, beams = tokens.shape
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).expand(images, -1, -1)
        self.seen = torch.cat([self.seen, itself], dim=-1)
        embeds = self.language_model.get_input_embeddings()(tokens)
        mask = torch.zeros_like(self.seen, dtype=embeds.dtype).masked_fill_(~self.seen, -torch.inf).unsqueeze(1)
        places = torch.full_like(tokens, self.length)
        self.length += 1
        return run(self.language_model, embeds, places, mask, 0, self.cache)

    def reorder(self, parents: Tensor) -> None:
        self.seen = self.seen.gather(1, parents.unsqueeze(-1).expand_as(self.seen))

    def keep(self, images: Tensor) -> None:
        self.cache.batch_select_indices(images)
        self.seen = self.seen[images]
