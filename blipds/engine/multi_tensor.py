"""What DeepSpeed's ZeRO 1 and 2 do tensor by tensor, in calls that take a list of tensors.

For the 615 tensors of BLIP large the loops cost a third of the processor time of a step, and 7,000 kernels on a GPU,
which starts to work only when Python has launched them (tests/benchmarks/README.md, "On a GPU").
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def use_multi_tensor_calls(optimizer: Any) -> None:
    """Replaces DeepSpeed's loops in an optimizer of stage 1 or 2; any other stays as it is."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.has_overflow_partitioned_grads_serial = partial(any_not_finite, optimizer)
        optimizer.get_grad_norm_direct = partial(gradient_norm, optimizer)
        optimizer._update_model_bit16_weights = partial(point_into_flat_weights, optimizer)


def any_not_finite(optimizer: Any) -> Tensor:
    """Whether a gradient of this rank's share holds inf or NaN: (1,), a bool on the device."""
    shares = (optimizer.averaged_gradients[group] for group in range(len(optimizer.bit16_groups)))
    gradients = [gradient for share in shares for gradient in share if gradient is not None]
    if not gradients:
        return torch.zeros(1, dtype=torch.bool, device=optimizer.device)
    # the largest magnitude: a sum of squares overflows where no gradient does
    largest = torch.stack(torch._foreach_norm(gradients, float("inf")))
    return torch.isfinite(largest).all().logical_not().view(1)


def gradient_norm(
    optimizer: Any, gradients: Iterable[Tensor], parameters: Sequence[nn.Parameter], norm_type: float = 2
) -> Tensor:
    """The Euclidean norm of a group's gradients over all ranks, a scalar; -1 where it is not finite. Collective."""
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace
    from deepspeed.runtime.zero.utils import get_norm_dtype

    assert norm_type == 2
    of_parameters = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    if of_parameters:
        norms = torch._foreach_norm(of_parameters, 2, dtype=get_norm_dtype())
        total = torch.stack(norms).square().sum().float()
    else:
        total = torch.zeros((), device=optimizer.device)
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    total = total.sqrt()
    mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
    return total


def point_into_flat_weights(optimizer: Any, group: int) -> None:
    """Makes parameters views of their group's flat weights, which almost always they are already."""
    flat, size = optimizer.bit16_groups_flat[group], optimizer.bit16_groups_flat[group].element_size()
    parameters, offsets = optimizer.round_robin_bit16_groups[group], optimizer.round_robin_bit16_offsets[group]
    start = flat.data_ptr()
    if any(p.data_ptr() != start + offset * size for p, offset in zip(parameters, offsets, strict=True)):
        type(optimizer)._update_model_bit16_weights(optimizer, group)
