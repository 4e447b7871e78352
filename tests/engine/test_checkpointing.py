"""Activation checkpointing that keeps its inputs in the host's memory: the same gradients, and nothing left behind."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blipds.engine import checkpointed, checkpointed_on_host


def plain(function, *inputs):
    return function(*inputs)


@pytest.mark.parametrize(("checkpoint_fn", "stays"), [(checkpointed, True), (checkpointed_on_host, False)])
def test_gradients_are_the_same_and_only_a_copy_waits_on_the_host(checkpoint_fn, stays):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)

    def block(x):
        return F.dropout(torch.tanh(layer(torch.tanh(layer(x)))), 0.5)

    gradients = []
    for function in (plain, checkpoint_fn):
        layer.zero_grad()
        torch.manual_seed(1)
        start = torch.arange(12.0).view(3, 4).requires_grad_()
        hidden = start / 7
        device_copy = weakref.ref(hidden)
        output = function(block, hidden)
        del hidden
        assert (device_copy() is not None) == (stays or function is plain)
        output.sum().backward()
        gradients.append((layer.weight.grad.clone(), start.grad))
    for direct, recomputed in zip(*gradients, strict=True):
        assert torch.equal(direct, recomputed)
