"""Which tokens see which in a row of captions: what the decoders of all archs are masked by."""

import torch
from torch import Tensor

MASK_ALIGNMENT = 8  # elements; torch/aten's transformers/attention.cpp, preprocess_mask


def visibility(segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of self-attention, (R, 1, T, T): 0 where a token sees another, else -inf.

    segment_ids (R, T): a token sees what is in segment 0, the prompt, and in its own, up to itself. Rows of it start
    at multiples of 8 elements, as CUDA's memory-efficient attention wants them: else each layer would copy it.
    """
    length = segment_ids.shape[-1]
    own = segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2)
    seen = (own | (segment_ids == 0).unsqueeze(-2)).tril()
    aligned = seen.new_zeros(*seen.shape[:-1], -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT, dtype=dtype)
    return aligned[..., :length].masked_fill_(~seen, -torch.inf).unsqueeze(1)
