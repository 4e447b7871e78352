"""What memory really is used for, on a CPU: the allocator's own record, and DeepSpeed's own tensors."""

from contextlib import ExitStack
from itertools import accumulate
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from blipds.engine import checkpointed
from blipds.models import build_model
from blipds.models import loss as loss_module


def flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """The CPU's, which keeps what CUDA's keeps. It has no dropout; CUDA's draws the same numbers again instead."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=attn_mask)[0]


def dropout(x, p=0.5, training=True, inplace=False):
    """The kernel that CUDA takes: its mask is a byte per element; that of `F.dropout` on a CPU is as wide as `x`."""
    return torch.ops.aten.native_dropout(x, p, training)[0] if training and p > 0 else x


def activations_on_cpu(config, shape, dtype):
    """(bytes kept from forward for backward, peak in forward and backward): every allocation of one real step.

    Of the kernels that a GPU would take, where CPUs have them too. As in training the gradient of a parameter goes as
    soon as it is there.
    """
    model = build_model(config.model, checkpointed).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs = shape.inputs(config.model.image_size, dtype, "cpu")
    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", flash_attention))
        stack.enter_context(patch.object(F, "dropout", dropout))
        # the loss takes its logits in smaller pieces on a CPU
        stack.enter_context(patch.object(loss_module, "CPU_CHUNK", loss_module.GPU_CHUNK))
        recorded = stack.enter_context(profile(activities=[ProfilerActivity.CPU], profile_memory=True))
        with record_function("the forward pass"):
            loss = model(**inputs)
        loss.backward()
    events = recorded.profiler.kineto_results.events()
    end = next(event.end_ns() for event in events if event.name() == "the forward pass")
    live = live_bytes(recorded)
    return [size for time, size in live if time <= end][-1], max(size for _, size in live)


def live_bytes(recorded):
    """(time, bytes that are allocated from then on) of a torch profile of the CPU with its memory."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return list(zip([e.start_ns() for e in events], accumulate(e.nbytes() for e in events), strict=True))


def bytes_of(tensors):
    """Of distinct storages: views and shared tensors count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def engine_tensors(engine):
    """All tensors that a DeepSpeed engine holds: parameters, gradients, optimizer states, master copies, buffers."""
    for parameter in engine.model.parameters():
        yield from (parameter.data, parameter.grad, getattr(parameter, "ds_tensor", None))
    optimizer = engine._deepspeed.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    for name, value in vars(optimizer).items():
        # what is filled and emptied in each backward pass is not a state
        if name not in ("ipg_buckets", "previous_reduced_grads"):
            yield from tensors_in(value, depth=3)


def tensors_in(value, depth):
    if torch.is_tensor(value):
        yield from (value, value.grad if value.is_leaf else None)
    elif depth and isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry, depth - 1)
