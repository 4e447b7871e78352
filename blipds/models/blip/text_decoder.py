"""BLIP's text decoder: BERT with causal self-attention and cross-attention to the image (BLIP paper, figure 2).

Parameter names are those of the original checkpoints. Shapes: I images, R rows of T tokens of text (R / I of them for
each image), N image tokens, C width, h heads, d = C / h. In training a row holds all captions of its image, behind one
prompt (`attention.visibility`); in generation it is a beam. The rows of an image share its keys and values:
cross-attention folds them into the query length, so nothing of the image is ever copied.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipds.errors import UserError
from blipds.models.attention import visibility


@dataclass(frozen=True)
class TextConfig:
    """The part of a BERT configuration that shapes the decoder, under BERT's names; defaults: bert-base."""

    vocab_size: int = 30524
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"text decoder: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    @classmethod
    def from_json(cls, path: Path) -> "TextConfig":
        """Reads a BERT-style JSON. What BERT has and this decoder has not (`type_vocab_size`, ...) is left aside."""
        try:
            values = json.loads(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"model.med_config_path {path}: {error}") from error
        if not isinstance(values, dict):
            raise UserError(f"model.med_config_path {path}: expected a JSON object")
        for key, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if values.get(key, only) != only:
                raise UserError(
                    f"model.med_config_path {path}: {key} is '{values[key]}', the decoder has only '{only}'"
                )
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


class LayerCache:
    """Keys and values of one layer while captions are generated.

    `image_keys`, `image_values`: (I, h, N, d), projected once. `keys`, `values`: (R, h, max_length, d), of which the
    first `length` positions are filled.
    """

    def __init__(self, image_keys: Tensor, image_values: Tensor, max_length: int) -> None:
        images, heads, _, head_width = image_keys.shape
        self.image_keys, self.image_values = image_keys, image_values
        self.keys = image_keys.new_empty(images, heads, max_length, head_width)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (R, h, T, d) behind what is there; returns all that is filled."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def expand(self, beams: int) -> None:
        """Gives each image `beams` rows of text; the image's own keys and values stay single."""
        self.keys = self.keys.repeat_interleave(beams, dim=0)
        self.values = self.values.repeat_interleave(beams, dim=0)

    def reorder(self, rows: Tensor) -> None:
        """Row r continues what row `rows[r]` was."""
        self.keys[:, :, : self.length] = self.keys[rows, :, : self.length]
        self.values[:, :, : self.length] = self.values[rows, :, : self.length]

    def keep(self, images: Tensor, rows: Tensor) -> None:
        """Keeps some images and their rows of text."""
        self.image_keys, self.image_values = self.image_keys[images], self.image_values[images]
        self.keys, self.values = self.keys[rows], self.values[rows]


class Attention(nn.Module):
    """Query, key and value projections and the attention between them (`self` in the checkpoints' names)."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, h, S, d)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, source width) -> keys and values (B, h, S, d)"""
        return self.split_heads(self.key(source)), self.split_heads(self.value(source))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) attends to keys and values (B, h, S, d); returns (B, T, C)."""
        queries = self.split_heads(self.query(x))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=is_causal
        )
        return mixed.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """Projection, dropout, and LayerNorm of the sum with the residual (post-norm, as BERT)."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(source_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class AttentionBlock(nn.Module):
    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.self = Attention(config, source_width)
        self.output = Output(config, config.hidden_size)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Causal self-attention, cross-attention to the image, feed-forward."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.hidden_size)
        self.crossattention = AttentionBlock(config, image_width)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(
        self, x: Tensor, image_embeds: Tensor | None, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """x (R, T, C) -> the same shape. The image comes as its tokens (I, N, width) or from the cache.

        mask (R, 1, T, T): `visibility`; without, each token sees what comes before it in its row.
        """
        attention, cross = self.attention.self, self.crossattention.self

        keys, values = attention.keys_values(x)
        if cache is not None:
            keys, values = cache.append(keys, values)
            image_keys, image_values = cache.image_keys, cache.image_values
        else:
            assert image_embeds is not None
            image_keys, image_values = cross.keys_values(image_embeds)
        rows = self.attention.output(attention(x, keys, values, mask, mask is None and x.shape[1] > 1), x)

        folded = rows.reshape(len(image_keys), -1, rows.shape[-1])  # (I, R / I * T, C)
        folded = self.crossattention.output(cross(folded, image_keys, image_values), folded)

        return self.output(self.intermediate(folded), folded).view_as(x)


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(position_ids)))


class Encoder(nn.Module):
    """Only a name in the checkpoints: `bert.encoder.layer.N`."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, image_width) for _ in range(config.num_hidden_layers))


class Bert(nn.Module):
    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, image_width)

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None,
        position_ids: Tensor | None,
        segment_ids: Tensor | None,
        caches: list[LayerCache] | None,
    ) -> Tensor:
        if position_ids is None:
            first = caches[0].length if caches else 0
            position_ids = torch.arange(first, first + input_ids.shape[-1], device=input_ids.device)
        x = self.embeddings(input_ids, position_ids)
        mask = None if segment_ids is None else visibility(segment_ids, x.dtype)
        for index, layer in enumerate(self.encoder.layer):
            x = layer(x, image_embeds, mask, caches[index]) if caches else layer(x, image_embeds, mask)
        return x


class Transform(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Dense, GELU, LayerNorm, and a projection tied to the word embeddings."""

    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = word_embeddings.weight
        self.bias = self.decoder.bias  # the checkpoints name it twice

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class Head(nn.Module):
    """Only a name in the checkpoints: `cls.predictions`."""

    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.predictions = Predictions(config, word_embeddings)


class TextDecoder(nn.Module):
    """Called with token ids and image tokens, gives next-token logits at the positions asked for."""

    def __init__(self, config: TextConfig, image_width: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, image_width)
        self.cls = Head(config, self.bert.embeddings.word_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        label_positions: Tensor | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """input_ids (R, T); image_embeds (I, N, width), or caches that hold its projections.

        position_ids, segment_ids (R, T): of rows that hold several captions (data/caption_rows.py); without them a row
        is one text, which goes on from what the caches hold. Returns logits (P, vocabulary) at `label_positions`,
        indices (P,) into the flattened R x T, or of the last token of every row, (R, vocabulary), where none are given:
        the head is the widest product of the decoder.
        """
        x = self.bert(input_ids, image_embeds, position_ids, segment_ids, caches)
        x = x[:, -1] if label_positions is None else x.flatten(0, 1).index_select(0, label_positions)
        return self.cls.predictions(x)

    def start_caches(self, image_embeds: Tensor, max_length: int) -> list[LayerCache]:
        """Projects the image's keys and values once for all that is generated from it."""
        caches = []
        for layer in self.bert.encoder.layer:
            assert isinstance(layer, Layer)
            image_keys, image_values = layer.crossattention.self.keys_values(image_embeds)
            caches.append(LayerCache(image_keys, image_values, max_length))
        return caches
