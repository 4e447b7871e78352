"""Against torch's own cross-entropy, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from blipds.data.caption_rows import caption_rows
from blipds.models.loss import CPU_CHUNK, smoothed_cross_entropy

VOCABULARY = 101


def example(tokens, dtype=torch.float32):
    torch.manual_seed(0)
    logits = (3 * torch.randn(tokens, VOCABULARY)).to(dtype)
    return logits, torch.randint(VOCABULARY, (tokens,))


def value_and_gradient(function, logits, factor=1.0):
    """The function gets a copy: it may write into its logits."""
    leaf = logits.clone().requires_grad_()
    loss = function(leaf * 1.0)  # as after a linear layer: not a leaf
    (loss * factor).backward()
    return loss.detach(), leaf.grad


# less than a chunk of rows, whole chunks, and a rest
@pytest.mark.parametrize("tokens", [1, CPU_CHUNK, 3 * CPU_CHUNK + 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_torchs(tokens, smoothing):
    logits, labels = example(tokens)
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, smoothing), logits, 0.25)
    expected = value_and_gradient(
        lambda x: F.cross_entropy(x, labels, label_smoothing=smoothing, reduction="sum"), logits, 0.25
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-7)


def test_bf16_logits():
    """The sums are in fp32; the gradient is rounded once, to bf16's 8 bits."""
    logits, labels = example(40, torch.bfloat16)
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1), logits)
    expected = value_and_gradient(
        lambda x: F.cross_entropy(x, labels, label_smoothing=0.1, reduction="sum"), logits.float()
    )
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.float(), expected[1], rtol=2**-8, atol=1e-6)


def test_by_hand():
    """Equal logits for 4 words: log 4 a token, whatever the smoothing; p - target is 1/4 - (0.9 + 0.1/4) and so on."""
    loss, gradient = value_and_gradient(
        lambda x: smoothed_cross_entropy(x, torch.tensor([2, 0]), 0.1), torch.zeros(2, 4)
    )
    assert loss.item() == pytest.approx(2 * math.log(4), rel=1e-6)
    expected = [[0.225, 0.225, -0.675, 0.225], [-0.675, 0.225, 0.225, 0.225]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


def test_no_labels():
    logits, labels = example(0)
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1), logits)
    assert loss.item() == 0.0
    assert gradient.shape == (0, VOCABULARY)


def test_a_batch_without_labels_has_zero_gradients(oracle_model):
    rows = caption_rows([[], []], [30522, 1037], pad_token_id=0).to(torch.device("cpu"))
    loss = oracle_model(**rows, pixel_values=torch.zeros(2, 3, 96, 96))
    gradients = torch.autograd.grad(loss, list(oracle_model.parameters()))
    assert loss.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)
