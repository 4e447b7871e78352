"""The captioning loss: cross-entropy with label smoothing, summed over the labelled tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK = 16  # rows whose fp32 logits (16 x 30,524 x 4 bytes) stay in a core's cache
GPU_CHUNK = 4096  # rows whose fp32 logits (500 MB) are small beside the activations


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Sum over P tokens of (1 - s) * -log p(label) + s * mean over the vocabulary of -log p, a scalar in fp32.

    logits (P, V) of any floating type, labels (P,). Equal to F.cross_entropy(logits.float(), ..., reduction="sum"),
    but the gradient takes the place of the logits while they are in the cache: with 30,524 words the logits are the
    largest activation of a caption, and fp32 copies of them would be most of a small model's step. So the logits must
    not be used again. Source of the smoothing: Szegedy et al. 2016, section 7.
    """
    return _SmoothedCrossEntropy.apply(logits, labels, label_smoothing)


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        uniform = label_smoothing / logits.shape[-1]
        chunk = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
        gradient = logits.detach()
        for rows, targets in zip(gradient.split(chunk), labels.split(chunk), strict=True):
            log_p = rows.log_softmax(-1, dtype=torch.float32)
            picked = log_p.gather(-1, targets.unsqueeze(-1))
            loss -= (1 - label_smoothing) * picked.sum() + uniform * log_p.sum()
            p = log_p.exp_().sub_(uniform)
            p.scatter_add_(-1, targets.unsqueeze(-1), torch.full_like(picked, label_smoothing - 1))
            rows.copy_(p)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad_outputs[0]), None, None
