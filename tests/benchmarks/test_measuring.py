"""What is measured, on cases small enough to count by hand."""

import itertools

import pytest
import torch
from benchmarks.measuring import SavedBytes, alternate
from benchmarks.quality import Curve, curve_of

CPU = torch.device("cpu")


def test_sides_alternate_and_warm_up_does_not_count():
    calls = []
    ticks = itertools.count(step=2.0)
    sides = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    timings = alternate(sides, rounds=2, device=CPU, warmup=1, clock=lambda: next(ticks))
    assert calls == ["a", "b"] * 3
    assert timings["a"].seconds == [2.0, 2.0]
    assert timings["b"].median == 2.0


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(4, 4))
    x = torch.ones(2, 4, requires_grad=True)
    with SavedBytes([weight]) as saved:
        y = x @ weight  # keeps x (2 x 4 floats) and the parameter
        z = y * y.view(2, 4)  # keeps y once, though it is two tensors
        w = z.exp()  # keeps its own result
    assert saved.total == 3 * (2 * 4 * 4)
    w.sum().backward()
    assert x.grad is not None


def test_a_curve_counts_the_time_of_steps_alone():
    # 10 steps of 6 images at 3 images/s take 20 s, 5 more at 6 images/s take 5 s
    lines = [
        {"kind": "train", "step": 10, "images_per_s": 3.0},
        {"kind": "eval", "step": 10, "CIDEr": 0.1},
        {"kind": "save", "step": 10, "seconds": 9.0},
        {"kind": "train", "step": 15, "images_per_s": 6.0},
        {"kind": "eval", "step": 15, "CIDEr": 0.2},
    ]
    assert curve_of(lines, images_a_step=6) == Curve(seconds=[20.0, 25.0], cider=[0.1, 0.2])


def test_time_to_a_score_is_interpolated():
    curve = Curve(seconds=[10.0, 20.0, 30.0], cider=[0.1, 0.3, 0.2])
    assert curve.time_to(0.2) == pytest.approx(15.0)
    assert curve.time_to(0.05) == 10.0  # where the start stood is not known
    assert curve.time_to(0.31) is None
