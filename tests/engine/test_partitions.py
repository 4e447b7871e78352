"""A model that ZeRO-3 builds in parts has the numbers of one that is built whole."""

import json

import pytest
import torch
from launching import launch


@pytest.fixture(scope="module")
def result(shared, tmp_path_factory):
    """What two ranks found: tests/engine/partitions.py"""
    output = tmp_path_factory.mktemp("partitions") / "result.json"
    process = launch(2, "tests/engine/partitions.py", shared / "oracle" / "tiny_blip.pth", output)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def stored(shared):
    return torch.load(shared / "oracle" / "tiny_blip.pth", map_location="cpu", weights_only=True)["model"]


def test_stage_3_alone_is_partitioned(result):
    assert not result["whole"]["partitioned"] and result["parts"]["partitioned"]


def test_each_rank_holds_half(result):
    """And padding: a parameter's partitions are equal, so an odd one is held with one number more."""
    all_of_it, _ = result["whole"]["held by each rank"]
    for held in result["parts"]["held by each rank"]:
        assert all_of_it / 2 <= held <= all_of_it / 2 * 1.001


def test_random_weights_are_the_same_numbers(result):
    assert result["after initialise"] == 0


def test_pretrained_weights_are_the_checkpoint_s(result, stored):
    assert result["after loading"] == 0
    words = stored["text_decoder.bert.embeddings.word_embeddings.weight"]
    assert result["word embeddings"] == pytest.approx(words.double().sum().item(), rel=1e-12)


def test_positions_are_interpolated(result, stored):
    positions = stored["visual_encoder.pos_embed"]
    assert positions.shape[1] == 1 + (96 // 16) ** 2
    assert result["positions"][1] == 1 + (128 // 16) ** 2
    assert result["class position"] == pytest.approx(positions[0, 0].double().sum().item(), rel=1e-12)


def test_embeddings_stay_tied_and_frozen_parameters_frozen(result):
    assert result["whole"]["tied"] and result["parts"]["tied"]
    assert result["whole"]["frozen"] == result["parts"]["frozen"] > 0
