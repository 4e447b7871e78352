"""The captioning loss: cross-entropy with label smoothing or with a weight a token, summed over the labelled tokens."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_CHUNK = 16  # rows whose fp32 logits (16 x 30,524 x 4 bytes) stay in a core's cache
GPU_CHUNK = 4096  # rows whose fp32 logits (500 MB) are small beside the activations
# The gradient is kept between -1 and 1 times this in fp16, whose smallest normal number is 6e-5: the share of label
# smoothing, 0.1 / 30,524, would lose most of its bits, and an unlikely word all of them. bf16 has fp32's range.
FP16_SCALE = 2.0**15


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None = None
) -> Tensor:
    """Sum over P tokens of (1 - s) * -log p(label) + s * mean over the vocabulary of -log p, a scalar in fp32.

    With `weights` (P,), of either sign: sum of weight * -log p(label), without smoothing; their gradient is -log p.
    logits (P, V) of any floating type, labels (P,). Equal to F.cross_entropy(logits.float(), ..., reduction="sum"),
    but the gradient takes the place of the logits while they are in the cache: with 30,524 words the logits are the
    largest activation of a caption, and fp32 copies of them would be most of a small model's step. So the logits must
    not be used again. Source of the smoothing: Szegedy et al. 2016, section 7.
    """
    return _SmoothedCrossEntropy.apply(logits, labels, label_smoothing if weights is None else 0.0, weights)


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        uniform = label_smoothing / logits.shape[-1]
        chunk = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
        scale = FP16_SCALE if logits.dtype == torch.float16 else 1.0
        gradient = logits.detach()
        label_log_p = torch.empty_like(labels, dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            rows, targets = gradient[start : start + chunk], labels[start : start + chunk].unsqueeze(-1)
            log_p = rows.log_softmax(-1, dtype=torch.float32)
            picked = log_p.gather(-1, targets)
            label_log_p[start : start + chunk] = picked.squeeze(-1)
            if weights is None:
                loss -= (1 - label_smoothing) * picked.sum() + uniform * log_p.sum()
            else:
                loss -= (weights[start : start + chunk].float().unsqueeze(-1) * picked).sum()
            p = log_p.exp_().sub_(uniform)
            p.scatter_add_(-1, targets, torch.full_like(picked, label_smoothing - 1))
            rows.copy_(p if scale == 1 else p.mul_(scale))
        ctx.save_for_backward(gradient, weights, label_log_p)
        ctx.scale = scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        gradient, weights, label_log_p = ctx.saved_tensors
        of_weights = -label_log_p * grad_outputs[0] if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, of_weights
        factor = grad_outputs[0] / ctx.scale
        if weights is not None:
            factor = weights.float().unsqueeze(-1) * factor
        elif gradient.is_cuda:
            factor = factor.view(1, 1)  # without dimensions CUDA would round it to the precision of the gradient first
        return gradient.mul_(factor), None, None, of_weights
