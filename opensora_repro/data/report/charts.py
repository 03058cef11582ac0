"""Histograms as inline SVG: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT = 300, 118
LEFT, RIGHT, TOP, BOTTOM = 2, 2, 8, 18

STYLE = """
svg .now { fill: var(--accent); } svg .before { fill: var(--quiet); opacity: .3; }
svg .mark { stroke: var(--second); stroke-width: 1.5; stroke-dasharray: 3 2; }
"""


def number(value: float, digits: int = 4) -> str:
    """Return a number for people: the digits that count, thousands apart."""
    whole = value == round(value) or abs(value) >= 10**digits
    return f"{value:,.0f}" if whole and abs(value) < 1e12 else f"{value:.{digits}g}"


def histogram(
    edges: np.ndarray, counts: np.ndarray, *, before: np.ndarray | None = None, marks: Sequence[float] = ()
) -> str:
    """Return the SVG of rows a bin; `before` are drawn behind, `marks` (thresholds) as lines across."""
    behind = np.zeros_like(counts) if before is None else before
    most = max(1, int(counts.max()), int(behind.max()))
    low, high = float(edges[0]), float(edges[-1])
    plot, floor = HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM

    def across(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram">']
    for kind, heights in (("before", behind), ("now", counts)):
        for index in np.flatnonzero(heights).tolist():
            left, right = across(float(edges[index])), across(float(edges[index + 1]))
            tall = max(1.0, float(heights[index]) / most * plot)
            told = f"{number(float(edges[index]))} to {number(float(edges[index + 1]))}: {int(heights[index]):,}"
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{floor - tall:.1f}" width="{max(1.0, right - left - 0.8):.1f}"'
                f' height="{tall:.1f}"><title>{told}{" before" if kind == "before" else ""}</title></rect>'
            )
    for mark in marks:
        if low <= mark <= high:
            x = across(mark)
            parts.append(
                f'<path class="mark" d="M{x:.1f} {TOP}V{floor}"><title>threshold {number(mark)}</title></path>'
            )
    parts.append(f'<path class="grid" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    for value, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{number(value)}</text>')
    return "".join([*parts, "</svg>"])
