"""The oracle: a small captioner trained by LAVIS's own BLIP-2 code, and what that code computes with it."""

from dataclasses import replace
from functools import partial

import blip2_oracle
import pytest
from safetensors.torch import load_file

from blipds.config.run import load_run_config
from blipds.models import build_model
from blipds.models.initialisation import initialise
from blipds.models.parameters import copy_into
from blipds.models.protocol import keep_activations
from blipds.models.weights import load_weights, open_weights


@pytest.fixture(scope="session")
def golden(shared):
    return blip2_oracle.golden(shared)


@pytest.fixture(scope="session")
def tensors(shared):
    return load_file(shared / "oracle_blip2" / "forward.safetensors")


@pytest.fixture(scope="session")
def run_config(shared, tmp_path_factory):
    return blip2_oracle.write_config(shared, tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="session")
def t5_run_config(run_config, shared):
    """A run config with the T5 in its folder."""
    blip2_oracle.write_t5(shared, run_config.parent / "t5")
    return blip2_oracle.write_t5_config(shared, run_config.parent)


@pytest.fixture(scope="session")
def config(run_config):
    return load_run_config(run_config)[0]


@pytest.fixture(scope="session")
def build(config, shared):
    """build() gives a fresh model with the oracle's weights, in evaluation mode; `keys` of the model section.

    With `part` only that part is loaded, from where the model section says; the others stay random.
    """

    def build(checkpoint_fn=keep_activations, part=None, **keys):
        section = replace(config.model, **keys)
        model = build_model(section, checkpoint_fn)
        source = config.model.finetuned if part is None else section.language_source
        if part is not None:
            initialise(model, 0, partial(copy_into, model))
        load_weights(model, open_weights(source, shared), say=lambda line: None, part=part)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model(build):
    """One model for all tests that only read it."""
    return build()
