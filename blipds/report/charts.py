"""Line charts as plain numbers: page.html draws them as SVG, in the colours of the page."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 240  # in SVG units: about a phone's width, so that text keeps its size
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 22, 34  # margins
MOST_POINTS = 300  # of a line
MOST_EPOCHS = 12  # that are labelled

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A number on an axis, or a dot: where it is drawn, and what it says."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Line:
    name: str
    path: str  # of an SVG polyline
    dots: list[Mark]


@dataclass(frozen=True)
class Chart:
    """`description` says in words what the lines show; `best`: the point to mark."""

    title: str
    description: str
    lines: list[Line]
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    epochs: list[Mark]
    best: Mark | None = None
    width: int = WIDTH
    height: int = HEIGHT
    box: dict[str, int] = field(
        default_factory=lambda: {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    )


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

    `epoch_ends`: (epoch from 1, its last step). Points that are not finite are left out.
    """
    finite = {name: [p for p in points if math.isfinite(p[1])] for name, points in curves.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        return None
    values = [value for points in finite.values() for _, value in points]
    y_ticks = ticks(0.0 if from_zero else min(values), max(values))
    x_ticks = [tick for tick in ticks(0, last_step) if tick <= last_step]
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / max(last_step, 1), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low), 1)

    lines = []
    for name, points in finite.items():
        thin = thinned(points, MOST_POINTS)
        marks = [Mark(x(step), y(value), f"{name} {number(value)} at step {step:,.0f}") for step, value in thin]
        path = " ".join(f"{mark.x:g},{mark.y:g}" for mark in marks)
        lines.append(Line(name, path, marks if dots or len(thin) == 1 else []))
    ends = list(epoch_ends)
    every = math.ceil(len(ends) / MOST_EPOCHS)
    return Chart(
        title,
        "; ".join(in_words(name, points) for name, points in finite.items()),
        lines,
        x_ticks=[Mark(x(tick), 0, short(tick)) for tick in x_ticks],
        y_ticks=[Mark(0, y(tick), number(tick)) for tick in y_ticks],
        epochs=[Mark(x(step), 0, str(epoch)) for epoch, step in ends if epoch % every == 0],
        best=None if best is None else Mark(x(best[0]), y(best[1]), f"best: {number(best[1])}"),
    )


def in_words(name: str, points: Points) -> str:
    values = [value for _, value in points]
    if len(values) == 1:
        return f"{name} {number(values[0])}"
    return (
        f"{name} from {number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, "
        f"highest {number(max(values))}"
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


def thinned(points: Points, most: int) -> Points:
    """At most `most` points, each the mean of neighbours."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def number(value: float) -> str:
    """Four digits, as short as they come."""
    return f"{value:.4g}"


def short(step: float) -> str:
    """12000 -> 12k"""
    return f"{step / 1000:g}k" if step >= 10_000 and step % 100 == 0 else f"{step:g}"
