"""How far results are from what they should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Skip(Exception):
    """A check cannot run here; the message says what it lacks."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def rms_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def require(error: float, tolerance: float, what: str) -> float:
    """Return the error, rounded for the report; NaN never passes."""
    assert error <= tolerance, f"{what}: {error:.2e} is above {tolerance:.0e}"
    return float(f"{error:.2e}")
