"""Charts: where points, ticks and epochs lie."""

import math

import pytest

from blipds.report.charts import chart, short, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (2.87, 8.83, [2, 4, 6, 8, 10]),
        (0, 0.0005, [0, 1e-4, 2e-4, 3e-4, 4e-4, 5e-4]),
        (0.234, 0.413, [0.2, 0.25, 0.3, 0.35, 0.4, 0.45]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_points_lie_between_the_axes():
    """The box is 354 wide and 184 high, from its upper left corner; 1 to 3 has the ticks 1, 1.5, 2, 2.5, 3."""
    drawn = chart("loss", {"loss": [(0, 3.0), (50, 2.0), (100, 1.0)]}, 100, [(1, 50), (2, 100)])
    assert [(mark.x, mark.y) for mark in drawn.lines["loss"]] == [(0, 0), (177, 92), (354, 184)]
    assert [(mark.label, mark.x) for mark in drawn.epochs] == [("1", 177), ("2", 354)]
    assert [(mark.label, mark.y) for mark in drawn.y_ticks][::4] == [("1", 184), ("3", 0)]
    assert drawn.description == "loss from 3 to 1, lowest 1, highest 3"


def test_what_is_not_finite_is_left_out():
    drawn = chart("x", {"a": [(0, 1.0), (1, math.nan), (2, math.inf), (4, 2.0)], "b": [(1, math.nan)]}, 4)
    assert {name: len(line) for name, line in drawn.lines.items()} == {"a": 2}
    assert chart("x", {"b": [(1, math.nan)]}, 4) is None
    assert chart("x", {}, 4) is None


def test_the_best_is_marked_where_its_point_is():
    drawn = chart("CIDEr", {"val": [(10, 0.5)]}, 10, best=(10, 0.5))
    (dot,) = drawn.lines["val"]
    assert dot[:2] == drawn.best[:2]
    assert (dot.label, drawn.best.label) == ("val 0.5 at step 10", "best: 0.5")


def test_long_curves_are_thinned():
    assert len(chart("x", {"a": [(step, 1.0) for step in range(100_000)]}, 100_000).lines["a"]) <= 300


def test_many_epochs_are_not_all_labelled():
    ends = [(epoch, epoch * 10.0) for epoch in range(1, 101)]
    assert [mark.label for mark in chart("x", {"a": [(1, 1.0)]}, 1000, ends).epochs] == [
        str(n) for n in range(9, 101, 9)
    ]


def test_large_steps_are_short():
    assert [short(step) for step in (0, 500, 9000, 20_000, 12_500)] == ["0", "500", "9000", "20k", "12.5k"]
