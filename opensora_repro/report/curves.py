"""Curves as a page's template draws them: points and labels in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 30
MAX_POINTS = 240  # of the line; more says nothing at this width


def smoothed(points: Points, count: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Means of `count` neighbouring groups of points, each at its group's middle step."""
    size = max(1, math.ceil(len(points) / count))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Series:
    """Values by step; `colour` is its number among those of a page, dots are drawn apart."""

    name: str
    points: Points
    colour: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing in pixels, y downwards."""

    title: str
    series: list[Series]
    values: list[tuple[float, str]]  # y and text
    steps: list[tuple[float, str]]  # x and text
    marks: list[float]  # x
    over: str  # what x is
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def chart(
    title: str,
    series: Sequence[Series],
    *,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    over: str = "training step",
    log_x: bool = False,
) -> Chart | None:
    """Lines over one ground; None where there is no point. `log`, `log_x`: powers of ten are evenly far apart.

    Few outlying values over steps are cut off at the edge: they would flatten all others. `over`: what x is.
    """
    drawn = [_drawable(own, log, log_x) for own in series]
    drawn = [own for own in drawn if own.points]
    if not drawn:
        return None
    values = sorted(y for own in drawn for _, y in own.points)
    few, most = (0, len(values) - 1) if log_x else (int(0.01 * len(values)), int(0.98 * len(values)))
    low, high = values[few], values[min(len(values) - 1, most)]
    if from_zero:
        low = min(0.0, low)
    room = 0.06 * (high - low) or max(abs(high), 1e-9) / 10
    low, high = low if from_zero else low - room, high + room
    steps = [x for own in drawn for x, _ in own.points]
    first, last = _span(steps) if log_x else (0.0, max(1.0, *steps))

    def x_of(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    return Chart(
        title=title,
        series=[Series(own.name, [(x_of(x), y_of(y)) for x, y in own.points], own.colour, own.dots) for own in drawn],
        values=[(y_of(value), text) for value, text in (_powers(low, high) if log else _plain(low, high))],
        steps=[
            (x_of(value), text)
            for value, text in (_powers(first, last) if log_x else [(at, f"{at:,g}") for at in ticks(0, last)])
        ],
        marks=[x_of(step) for step in marks if step <= last],
        over=over,
    )


def _plain(low: float, high: float) -> list[tuple[float, str]]:
    return [(value, _short(value)) for value in ticks(low, high)]


def _short(value: float) -> str:
    """As wide as the room beside a curve: 1.5e-4 for 0.00015, 1e9 for a billion."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    factor, power = f"{value:.2e}".split("e")
    return f"{float(factor):g}e{int(power)}"


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Logarithms of round numbers: powers of ten, and what lies between where these are few."""
    for between in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [factor * 10.0**power for power in powers for factor in between]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) > 2:
            break
    if len(found) < 2:
        found = [value for value in ticks(10**low, 10**high) if value > 0]
    return [(math.log10(value), _short(value)) for value in found[:: -(-len(found) // 6) or 1]]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A little more than all of them."""
    room = 0.04 * (max(values) - min(values)) or 0.5
    return min(values) - room, max(values) + room


def _drawable(series: Series, log: bool, log_x: bool) -> Series:
    points = [(x, y) for x, y in series.points if math.isfinite(y) and (y > 0 or not log) and (x > 0 or not log_x)]
    points = [(math.log10(x) if log_x else x, math.log10(y) if log else y) for x, y in points]
    return Series(series.name, points if series.dots else smoothed(points), series.colour, series.dots)
