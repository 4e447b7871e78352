"""The oracle: a small captioner trained by the original BLIP code, and what that code computes with it."""

import json

import pytest
import torch
from checkpoint_samples import TIED, shapes_of

from blipds.models import build_model
from blipds.models.blip.config import BlipConfig
from blipds.models.weights import load_weights, open_weights


@pytest.fixture(scope="session")
def golden(shared):
    return json.loads((shared / "oracle" / "golden.json").read_text())


@pytest.fixture(scope="session")
def build_oracle(shared):
    """build_oracle() gives a fresh model with the oracle's weights, in evaluation mode."""

    def build():
        config = BlipConfig(
            vit_type="base",
            vit_kwargs={"embed_dim": 96, "depth": 4, "num_heads": 4},
            image_size=96,
            med_config_path=str(shared / "oracle" / "med_config.json"),
        )
        model = build_model(config, checkpoint_fn=lambda function, *inputs: function(*inputs))
        load_weights(model, open_weights(str(shared / "oracle" / "tiny_blip.pth"), shared), say=lambda line: None)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def oracle_model(build_oracle):
    """One model for all tests that only read it."""
    return build_oracle()


@pytest.fixture(scope="session")
def oracle(shared):
    """Its file read by plain torch: all entries."""
    return torch.load(shared / "oracle" / "tiny_blip.pth", weights_only=True)["model"]


@pytest.fixture(scope="session")
def oracle_shapes(oracle):
    """The shapes of a model's named_parameters: ties once, no buffers."""
    skipped = (*dict(TIED), "text_decoder.bert.embeddings.position_ids")
    return shapes_of({name: tensor for name, tensor in oracle.items() if name not in skipped})
