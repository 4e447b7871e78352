"""What memory really is used for, on a CPU: the allocator's own record, and DeepSpeed's own tensors."""

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from blipds.engine import checkpointed
from blipds.models import build_model
from blipds.models import loss as loss_module


def activations_on_cpu(config, shape, dtype):
    """(bytes kept from forward for backward, peak in forward and backward): every allocation of one real step.

    As in training the gradient of a parameter goes as soon as it is there, and flash attention is off in bf16.
    """
    model = build_model(config.model, checkpointed).to(dtype).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    inputs = shape.inputs(config.model.image_size, dtype, "cpu")
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(dtype == torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with record_function("the forward pass"):
            loss = model(**inputs)
        loss.backward()
    torch.backends.cuda.enable_flash_sdp(flash)
    events = recorded.profiler.kineto_results.events()
    end = next(event.end_ns() for event in events if event.name() == "the forward pass")
    live = kept = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
        kept = live if event.start_ns() <= end else kept
    return kept, peak


def plan_for_cpu(monkeypatch):
    """The loss takes its logits in smaller pieces on a CPU: a forecast that is held against one must do so too."""
    monkeypatch.setattr(loss_module, "GPU_CHUNK", loss_module.CPU_CHUNK)


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
