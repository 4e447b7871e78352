"""Random weights: timm's and BERT's distributions, and numbers that depend on seed and name alone."""

from functools import partial

import pytest
import torch

from blipds.errors import UserError
from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.vision import build_vision_transformer

KWARGS = {"embed_dim": 192, "depth": 2, "num_heads": 3, "reg_tokens": 4, "init_values": 1e-5}


def captioner(seed=0, **vit_kwargs):
    config = BlipConfig(
        image_size=64,
        vit_kwargs={**KWARGS, **vit_kwargs},
        med_config_path="configs/models/med_config_tiny.json",
    )
    model = build_model(config, checkpoint_fn=lambda function, *inputs: function(*inputs))
    initialise(model, seed, partial(copy_into, model))
    return model


@pytest.fixture(scope="module")
def model():
    return captioner()


def test_the_image_encoder_starts_as_timm_starts_it(model):
    """Each tensor's mean and standard deviation against those of the model as timm builds it."""
    torch.manual_seed(0)
    timms = dict(build_vision_transformer("base", 64, **KWARGS).named_parameters())
    for name, ours in model.visual_encoder.named_parameters():
        ours, theirs = ours.detach(), timms.pop(name).detach()
        if theirs.min() == theirs.max():  # biases, norms, layer scale
            assert torch.equal(ours, theirs), name
            continue
        error = theirs.std().item() / theirs.numel() ** 0.5
        assert ours.std().item() == pytest.approx(theirs.std().item(), abs=5 * error), name
        assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=7 * error), name
        assert not torch.equal(ours, theirs), name
    assert not timms


def test_the_text_decoder_starts_as_bert(model):
    for name, parameter in model.text_decoder.named_parameters():
        if "LayerNorm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:  # normal with standard deviation 0.02 (med_config_tiny.json: initializer_range)
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_numbers_depend_on_seed_and_name_alone(model):
    deeper, other = (dict(m.named_parameters()) for m in (captioner(depth=3), captioner(seed=1)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, deeper[name]), name
        if parameter.min() < parameter.max():
            assert not torch.equal(parameter, other[name]), name


def test_embeddings_stay_tied(model):
    assert (
        model.text_decoder.cls.predictions.decoder.weight is model.text_decoder.bert.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize("key", ["weight_init", "fix_init"])
def test_another_start_is_refused(key):
    with pytest.raises(UserError, match=rf"model\.vit_kwargs\.{key}: random weights have timm's default start"):
        build_vision_transformer("base", 64, **{key: "jax"})
