"""Line charts as plain numbers: page.html draws them as SVG, in the colours of the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 354, 184  # of the box between the axes in SVG units: a phone's width, so that text keeps its size
MOST_POINTS = 300  # of a line
MOST_EPOCHS = 12  # that are labelled
MOST_DOTS = 1000  # of a scatter plot, about 100 bytes each

Points = Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """A number on an axis, or a dot: where it is drawn, from the box's upper left corner, and what it says."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Chart:
    """`lines`: {name: its points}. `dots`: those to draw. `description` says in words what the lines show.

    `scattered`: points without a line between them. `labels`: of the axes, across and up, where they are not steps.
    """

    title: str
    description: str
    lines: dict[str, list[Mark]]
    dots: bool
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    epochs: list[Mark]
    best: Mark | None
    scattered: Sequence[Mark] = ()
    labels: tuple[str, str] | None = None


def chart(
    title: str,
    curves: Mapping[str, Points],
    last_step: float,
    epoch_ends: Iterable[tuple[int, float]] = (),
    *,
    best: tuple[float, float] | None = None,
    from_zero: bool = False,
    dots: bool = False,
) -> Chart | None:
    """A chart of {name: [(step, value)]} up to `last_step`; None where no curve has a point.

    `epoch_ends`: (epoch from 1, its last step). `best`: the point to mark. Points that are not finite are left out.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    values = {name: [value for _, value in points] for name, points in finite.items()}
    scale = ticks(0.0 if from_zero else min(map(min, values.values())), max(map(max, values.values())))

    def mark(step: float, value: float, label: str) -> Mark:
        x = WIDTH * step / max(last_step, 1)
        return Mark(round(x, 1), round(HEIGHT * (scale[-1] - value) / (scale[-1] - scale[0]), 1), label)

    ends = list(epoch_ends)
    every = math.ceil(len(ends) / MOST_EPOCHS)
    return Chart(
        title,
        "; ".join(
            f"{name} from {found[0]:.4g} to {found[-1]:.4g}, lowest {min(found):.4g}, highest {max(found):.4g}"
            for name, found in values.items()
        ),
        {
            name: [mark(x, y, f"{name} {y:.4g} at step {x:,}") for x, y in points[:: -(-len(points) // MOST_POINTS)]]
            for name, points in finite.items()
        },
        dots,
        x_ticks=[mark(tick, scale[0], short(tick)) for tick in ticks(0, last_step) if tick <= last_step],
        y_ticks=[mark(0, tick, f"{tick:.4g}") for tick in scale],
        epochs=[mark(step, scale[-1], str(epoch)) for epoch, step in ends if epoch % every == 0],
        best=mark(*best, f"best: {best[1]:.4g}") if best else None,
    )


def scatter(title: str, description: str, points: Sequence[tuple[float, float, str]], across: str, up: str) -> Chart:
    """A chart of (value across, value up, name) without lines, at most `MOST_DOTS` of them, evenly sampled."""
    x_scale = ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))
    y_scale = ticks(min(y for _, y, _ in points), max(y for _, y, _ in points))

    def mark(x: float, y: float, label: str) -> Mark:
        at = WIDTH * (x - x_scale[0]) / (x_scale[-1] - x_scale[0])
        return Mark(round(at, 1), round(HEIGHT * (y_scale[-1] - y) / (y_scale[-1] - y_scale[0]), 1), label)

    return Chart(
        title,
        description,
        lines={},
        dots=True,
        x_ticks=[mark(tick, y_scale[0], f"{tick:.4g}") for tick in x_scale],
        y_ticks=[mark(x_scale[0], tick, f"{tick:.4g}") for tick in y_scale],
        epochs=[],
        best=None,
        scattered=[mark(*point) for point in points[:: -(-len(points) // MOST_DOTS)]],
        labels=(across, up),
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` or below to `high` or above; 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(step: float) -> str:
    """12000 -> 12k"""
    return f"{step / 1000:g}k" if step >= 10_000 and step % 100 == 0 else f"{step:g}"
