"""Gradients that come in another order on each rank are added up by parameter all the same."""

import json

import pytest
from launching import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("gradient_order") / "found.json"
    process = launch(2, "tests/engine/gradient_order.py", output)
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("stage", [1, 2])
def test_each_parameter_gets_its_own_gradient(found, stage):
    assert found[f"({stage}, True, False)"] == {"x": 2, "y": 3, "z": 5}


def test_what_has_no_gradient_holds_nothing_up(found):
    assert found["(2, True, True)"] == {"x": 2, "y": 3, "z": 0}


def test_deepspeed_alone_mixes_them(found):
    """DeepSpeed#2343. When this fails, blipds/engine/gradient_order.py has become superfluous."""
    assert found["(2, False, False)"] == {"x": 2.5, "y": 2.5, "z": 5}
