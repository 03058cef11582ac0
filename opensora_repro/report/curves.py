"""Loss curves as a page's template draws them: points and labels in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 30
MAX_POINTS = 240  # of the line; more says nothing at this width


@dataclass(frozen=True)
class Curve:
    """A drawing in pixels, y downwards: its frame, its two kinds of points, and the labels with their places."""

    training: list[tuple[float, float]]
    validation: list[tuple[float, float]]
    losses: list[tuple[float, str]]  # y and text
    steps: list[tuple[float, str]]  # x and text
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


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


def loss_curve(training: Points, validation: Points) -> Curve | None:
    """Training loss as a line over the range of single steps, validation as dots; (step, loss) in, None of no step."""
    training = [point for point in training if all(map(math.isfinite, point))]
    validation = [point for point in validation if all(map(math.isfinite, point))]
    if not training:
        return None
    line = smoothed(training)
    low_x, high_x = 0.0, max(x for x, _ in (*training, *validation))
    # The first steps of a fresh model would flatten everything after them.
    shown = sorted(y for _, y in (*line, *validation))
    low_y, high_y = 0.0, 1.1 * max(shown[min(len(shown) - 1, int(0.97 * len(shown)))], 1e-9)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (point[0] - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (min(point[1], high_y) - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    return Curve(
        training=[at(point) for point in line],
        validation=[at(point) for point in validation],
        losses=[(at((low_x, value))[1], f"{value:g}") for value in ticks(low_y, high_y)],
        steps=[(at((value, low_y))[0], f"{value:g}") for value in ticks(low_x, high_x)],
    )
