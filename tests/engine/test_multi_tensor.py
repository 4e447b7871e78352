"""Calls for lists of tensors against DeepSpeed's loops, in real engines of stages 1 and 2."""

import json

import pytest
from launching import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi_tensor")
    process = launch(2, "tests/engine/multi_tensor.py", folder)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_norms_are_deepspeeds_to_the_bit(found, stage):
    groups = found[f"zero{stage}"]["norms"]
    assert len(groups) == 2  # with weight decay and without
    assert all(ours == deepspeeds > 0 for ours, deepspeeds in groups)


@pytest.mark.parametrize("stage", [1, 2])
def test_finds_inf_and_nan_as_deepspeed_does(found, stage):
    """No bad number; inf; -inf; NaN."""
    assert found[f"zero{stage}"]["not_finite"] == [[False, False], [True, True], [True, True], [True, True]]


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_that_left_the_flat_ones_come_back(found, stage):
    assert found[f"zero{stage}"]["moved_back"]
