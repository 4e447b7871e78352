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


def test_fp16_keeps_the_share_of_label_smoothing():
    """Of unlikely words of BERT's vocabulary: p - 0.1 / 30,524 is some millionths, where fp16 has steps of 6e-8."""
    torch.manual_seed(0)
    words, labels, factor = 30524, torch.tensor([7, 30000, 5]), 65536 / 60  # loss scale, and a mean over 60 tokens
    logits = torch.randn(3, words)
    logits[:, 11], logits[:, 12] = 13.0, -60.0
    logits = logits.half()
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1), logits, factor)
    expected = value_and_gradient(
        lambda x: F.cross_entropy(x, labels, label_smoothing=0.1, reduction="sum"), logits.float(), factor
    )
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.float(), expected[1], rtol=2**-10, atol=1e-6)
    assert gradient[0, 12].item() == pytest.approx(-0.1 / words * factor, rel=2**-10)  # by hand: its p is 0


def test_by_hand():
    """Equal logits for 4 words: log 4 a token, whatever the smoothing; p - target is 1/4 - (0.9 + 0.1/4) and so on."""
    loss, gradient = value_and_gradient(
        lambda x: smoothed_cross_entropy(x, torch.tensor([2, 0]), 0.1), torch.zeros(2, 4)
    )
    assert loss.item() == pytest.approx(2 * math.log(4), rel=1e-6)
    expected = [[0.225, 0.225, -0.675, 0.225], [-0.675, 0.225, 0.225, 0.225]]
    torch.testing.assert_close(gradient, torch.tensor(expected))


def test_weights_by_hand():
    """Logits 0 and log 3: p is 1/4 and 3/4. A weight of 2 on the first: 2 log 4, and p - target = (-3/4, 3/4) twice.

    One of -1 on the second: -log(4/3), and (1/4, -1/4) with its sign turned.
    """
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss, gradient = value_and_gradient(
        lambda x: smoothed_cross_entropy(x, torch.tensor([0, 1]), 0.1, torch.tensor([2.0, -1.0])), logits
    )
    assert loss.item() == pytest.approx(2 * math.log(4) - math.log(4 / 3), rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[-1.5, 1.5], [-0.25, 0.25]]))


@pytest.mark.parametrize("tokens", [1, 3 * CPU_CHUNK + 5])
def test_weights_against_torchs_without_smoothing(tokens):
    logits, labels = example(tokens)
    weights = torch.randn(tokens)
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1, weights), logits, 0.25)
    expected = value_and_gradient(
        lambda x: (weights * F.cross_entropy(x, labels, reduction="none")).sum(), logits, 0.25
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-7)


def test_weights_of_one_are_the_loss_without_smoothing():
    logits, labels = example(40, torch.bfloat16)
    ones = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1, torch.ones(40)), logits)
    plain = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.0), logits)
    torch.testing.assert_close(ones[0], plain[0], rtol=1e-6, atol=0)
    assert torch.equal(ones[1], plain[1])


@pytest.mark.parametrize("learns", [True, False])
def test_the_gradient_of_a_weight_is_its_token_s_negative_log_probability(learns):
    logits, labels = example(CPU_CHUNK + 5)
    expected = 0.25 * F.cross_entropy(logits, labels, reduction="none")
    weights = torch.randn(len(labels), requires_grad=True)
    leaf = logits.clone().requires_grad_(learns)
    (0.25 * smoothed_cross_entropy(leaf * 1.0, labels, 0.1, weights)).backward()
    torch.testing.assert_close(weights.grad, expected, rtol=1e-6, atol=1e-6)
    assert (leaf.grad is not None) == learns


def test_no_labels():
    logits, labels = example(0)
    loss, gradient = value_and_gradient(lambda x: smoothed_cross_entropy(x, labels, 0.1), logits)
    assert loss.item() == 0.0
    assert gradient.shape == (0, VOCABULARY)


def test_the_model_weights_each_label(oracle_model):
    """Weights (1, 0) and (0, 3) of a caption's two tokens add up to (1, 3); it is autograd's sum of the parts."""
    rows = caption_rows([[[30522, 1037, 2158, 102]]], [30522, 1037], pad_token_id=0).to(torch.device("cpu"))
    inputs = {**rows, "pixel_values": torch.zeros(1, 3, 96, 96)}
    first, second, both = (
        oracle_model(**inputs, label_weights=torch.tensor(weights)).item() for weights in ((1.0, 0), (0, 3.0), (1.0, 3))
    )
    assert both == pytest.approx(first + second, rel=1e-6)
    assert first > 0 and second > 0


def test_a_batch_without_labels_has_zero_gradients(oracle_model):
    rows = caption_rows([[], []], [30522, 1037], pad_token_id=0).to(torch.device("cpu"))
    loss = oracle_model(**rows, pixel_values=torch.zeros(2, 3, 96, 96))
    gradients = torch.autograd.grad(loss, list(oracle_model.parameters()))
    assert loss.item() == 0.0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients)
