"""Where the text decoder looks in an image. Only for pictures of it: training and generation never make the weights."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def cross_attention(model: Any, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
    """The share of attention that each token gives to each patch of one image, the mean over all layers and heads.

    pixel_values (1, 3, H, W), input_ids (T,) with [DEC] at position 0; returns (T, rows, columns). Position t is what
    the decoder looked at while it chose token t + 1. The sum over the patches is 1 less what the encoder's prefix
    tokens (class, registers) get.

    Fused attention keeps no weights, so they are made from queries and keys a second time, on the way into each layer.
    """
    encoder, layers = model.visual_encoder, model.text_decoder.bert.encoder.layer
    found: list[Tensor] = []

    def look(attention: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, keys, *_ = inputs
        queries = attention.split_heads(attention.query(x))  # type: ignore[operator]
        scores = queries.float() @ keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5
        found.append(scores.softmax(-1).mean(dim=1).squeeze(0))

    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.crossattention.self.register_forward_pre_hook(look)
            hooks.callback(hook.remove)
        first = torch.zeros(1, dtype=torch.long, device=input_ids.device)  # the head is of no interest here
        model.text_decoder(input_ids.unsqueeze(0), encoder(pixel_values), label_positions=first)
    rows, columns = encoder.patch_embed.grid_size
    patches = torch.stack(found).mean(dim=0)[:, encoder.num_prefix_tokens :]
    return patches.unflatten(-1, (rows, columns))
