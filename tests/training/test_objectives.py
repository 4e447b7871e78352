"""What a step learns from: weights counted by hand, and an objective that a plugin would bring."""

from types import SimpleNamespace

import pytest
import torch

from blipds.config.sections import Config
from blipds.data.caption_rows import caption_rows
from blipds.data.images import Images
from blipds.data.loader import Batch
from blipds.errors import UserError
from blipds.registry import OBJECTIVES
from blipds.training.objectives import CrossEntropy, Objective

PROMPT = [30522, 1037]


@pytest.fixture
def batch():
    """Two images, of which one has two captions of two and of one words, and the other none."""
    rows = caption_rows([[[*PROMPT, 7, 8, 102], [*PROMPT, 9, 102]], []], PROMPT, pad_token_id=0)
    pixels = Images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Batch(pixels, rows, 2, 2, ["a", "b"], [])


@pytest.fixture
def engine():
    """Gives back what the model would get."""
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, loss=lambda inputs: inputs)


def test_cross_entropy_weighs_every_labelled_token_alike(batch, engine):
    objective = OBJECTIVES["cross_entropy"](Config())
    assert objective.weight(batch) == 5  # the words and a [SEP] for each caption
    inputs = objective.loss(engine, batch)
    assert inputs["labels"].tolist() == [7, 8, 102, 9, 102]
    assert inputs["pixel_values"].shape == (2, 3, 4, 4)
    assert "label_weights" not in inputs


def test_an_objective_of_ones_own_weights_labels(batch, engine):
    class ClosingTokenOnly(Objective):
        def weight(self, batch):
            return batch.num_captions

        def loss(self, engine, batch):
            weights = (batch.captions.labels == 102).float()
            return engine.loss(batch.model_inputs(engine.device, engine.dtype) | {"label_weights": weights})

    objective = ClosingTokenOnly(Config())
    assert objective.weight(batch) == 2
    assert objective.loss(engine, batch)["label_weights"].tolist() == [0, 0, 1, 0, 1]


def test_names():
    assert OBJECTIVES["cross_entropy"] is CrossEntropy
    with pytest.raises(UserError, match=r"^unknown run.objective 'cross_entrpy'; did you mean 'cross_entropy'\?"):
        OBJECTIVES["cross_entrpy"]
