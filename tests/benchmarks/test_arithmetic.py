"""Expected numbers: worked by hand, and the figures of the project's reference sheet (GFLOP forward of one image)."""

import pytest
from benchmarks.arithmetic import (
    Linear,
    attention,
    encoder_flops,
    generation_flops,
    image_key_value_linears,
    image_tokens,
    text_flops,
    text_tokens,
    total,
    training_flops,
    training_linears,
)

from blipds.models.blip.geometry import BlipGeometry

TEXT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE = BlipGeometry(
    image_size=224, patch_size=16, vision_width=768, vision_depth=12, vision_heads=12, vision_mlp_dim=3072, **TEXT
)
LARGE = BlipGeometry(
    image_size=384, patch_size=16, vision_width=1024, vision_depth=24, vision_heads=16, vision_mlp_dim=4096, **TEXT
)
# 2 x 2 patches of 1 x 1 pixel and the class token: 5 tokens
SMALL = BlipGeometry(
    image_size=2,
    patch_size=1,
    vision_width=2,
    vision_depth=1,
    vision_heads=1,
    vision_mlp_dim=3,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=6,
    vocab_size=10,
)


def test_by_hand():
    assert Linear(2, 3, 5, count=7).flops == 2 * 2 * 3 * 5 * 7
    assert attention(queries=2, keys=3, width=5) == 2 * (2 * 2 * 3 * 5)  # QK^T and PV
    assert image_tokens(SMALL) == 5
    # patches 4x3x2, qkv 5x2x6, projection 5x2x2, feed-forward twice 5x2x3; attention 5x5x2 twice: all times 2
    encoder = 2 * (24 + 60 + 20 + 60) + 2 * 100
    assert encoder_flops(SMALL, images=1) == encoder
    keys_values = 2 * (2 * 5 * 2 * 4)
    assert total(image_key_value_linears(SMALL, images=1)) == keys_values
    # three captions of four tokens, a prompt of one: it and three times two more are fed, each with a label for its
    # next; six 4x4 projections, feed-forward twice 4x6; seven keys of their own and five of the image
    layer = 2 * 7 * (6 * 16 + 2 * 24) + 4 * 7 * 7 * 4 + 4 * 7 * 5 * 4
    head = 2 * (4 * 4 + 4 * 10)
    assert text_tokens(captions=3, length=4, prompt=1) == 7
    assert text_flops(SMALL, images=1, captions=3, length=4, prompt=1) == layer + 9 * head
    forward = 2 * (encoder + keys_values + layer + 9 * head)
    assert training_flops(SMALL, images=2, captions=3, length=4, prompt=1) == 3 * forward - 2 * 48
    # prompt of two tokens, then one step (the fourth token is chosen, not fed): two beams with three keys each
    prompt = 2 * 2 * (6 * 16 + 2 * 24) + 4 * 2 * 2 * 4 + 4 * 2 * 5 * 4
    step = 2 * (2 * (6 * 16 + 2 * 24) + 4 * 3 * 4 + 4 * 5 * 4 + head)
    assert generation_flops(SMALL, images=1, beams=2, prompt=2, length=4) == (
        encoder + keys_values + prompt + head + step
    )


@pytest.mark.parametrize(("geometry", "encoder", "keys_values"), [(BASE, 35, 5.6), (LARGE, 382, 22)])
def test_figures_of_the_reference_sheet(geometry, encoder, keys_values):
    assert encoder_flops(geometry, 1) / 1e9 == pytest.approx(encoder, rel=0.01)
    assert total(image_key_value_linears(geometry, 1)) / 1e9 == pytest.approx(keys_values, rel=0.01)
    assert text_flops(geometry, 1, 1, length=13, prompt=0) / 1e9 == pytest.approx(3.15, rel=0.05)


def test_linears_are_most_of_a_step():
    shape = {"images": 4, "captions": 5, "length": 12, "prompt": 4}
    share = 3 * total(training_linears(BASE, **shape)) / training_flops(BASE, **shape)
    assert 0.93 < share < 1
