"""A scaling law over training FLOPs C, loss = a + b * C^-c, fitted to the best loss that was reached at each budget.

Its intervals are of a bootstrap: the held-out clips are drawn anew, the same ones for all budgets. From four budgets on
what the curve misses of the losses is drawn, too; three it goes through, and say nothing of how far the next would lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NUMBERS = 3  # a, b and c: as many budgets are needed
SHARE = 0.95  # of the draws within an interval
DRAWS = 1000
SMALLEST_POWER, LARGEST_POWER = 0.001, 3.0
POWERS = 100  # that are tried first, evenly up to the largest
CLOSER, CLOSER_POWERS = 4, 41  # how often, and in how many parts, it is looked closer around the best one


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """a, b and c are not below 0, c not above LARGEST_POWER; `drawn` [draws, 3] has those of every draw."""

    a: float  # the loss that no compute takes away
    b: float
    c: float
    drawn: Array

    def at(self, flops: float) -> Interval:
        """The loss that so many FLOPs reach."""
        a, b, c = self.drawn.T
        return _interval(self.a + self.b * flops**-self.c, a + b * flops**-c)

    def numbers(self) -> dict[str, Interval]:
        return {name: _interval(getattr(self, name), own) for name, own in zip("abc", self.drawn.T, strict=True)}


def fit_law(flops: Array, losses: Array, *, draws: int = DRAWS) -> Law:
    """Least squares for the mean losses.

    `flops`: [budgets], at least NUMBERS of them. `losses`: [budgets, clips] of held-out clips, the same at each budget.
    """
    mean = losses.mean(axis=1)
    a, b, c = _fits(flops, mean[None])[0]
    rng, (budgets, clips) = np.random.default_rng(0), losses.shape
    chosen = rng.integers(clips, size=(draws, clips))
    drawn = losses[:, chosen].mean(axis=2).T  # [draws, budgets]
    if budgets > NUMBERS:
        curve, free = a + b * flops**-c, budgets - NUMBERS
        missed = np.sqrt(((mean - curve) ** 2).sum() / free)
        drawn = drawn - mean + curve + missed * rng.standard_t(free, size=drawn.shape)
    return Law(float(a), float(b), float(c), _fits(flops, drawn))


def _interval(value: float, drawn: Array) -> Interval:
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return Interval(float(value), float(low), float(high))


def _fits(flops: Array, losses: Array) -> Array:
    """a, b and c, [D, 3], of losses [D, N] at FLOPs [N]: for each power the line is known, the power is searched."""
    scale = float(np.exp(np.log(flops).mean()))
    size = LARGEST_POWER / POWERS
    powers = np.broadcast_to(np.linspace(size, LARGEST_POWER, POWERS), (len(losses), POWERS))
    for closer in range(CLOSER + 1):
        a, b, missed = _lines((flops / scale) ** -powers[..., None], losses[:, None])
        best = missed.argmin(axis=1)[:, None]
        a, b, c = (np.take_along_axis(of, best, axis=1) for of in (a, b, powers))
        if closer < CLOSER:
            powers = np.clip(c + size * np.linspace(-1, 1, CLOSER_POWERS), SMALLEST_POWER, LARGEST_POWER)
            size *= 2 / (CLOSER_POWERS - 1)
    return np.concatenate([a, b * scale**c, c], axis=1)


def _lines(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """a, b >= 0 of the nearest y = a + b x over the last axis, and the sum of squares that it misses."""
    middle_x, middle_y = x.mean(axis=-1, keepdims=True), y.mean(axis=-1, keepdims=True)
    b = ((x - middle_x) * (y - middle_y)).sum(axis=-1) / ((x - middle_x) ** 2).sum(axis=-1)
    b = np.maximum(b, 0)
    a = middle_y[..., 0] - b * middle_x[..., 0]
    through_zero = (x * y).sum(axis=-1) / (x**2).sum(axis=-1)
    a, b = np.where(a < 0, 0, a), np.where(a < 0, through_zero, b)
    return a, b, ((y - a[..., None] - b[..., None] * x) ** 2).sum(axis=-1)
