"""One HTML file about a dataset: what went through its tools, what came out, what was dropped and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from opensora_repro.data.report.markup import TEMPLATES, number, render, shown
from opensora_repro.data.report.rows import Groups
from opensora_repro.data.report.stages import SOURCES_COUNTED, Counts, SourceCounts
from opensora_repro.data.report.summary import CHARACTERS, WORDS, Numbers, Summary
from opensora_repro.data.report.thumbnails import Strip

MAX_PICTURES = 3_500_000  # bytes of all pictures; what is beyond is named instead of shown
REASONS_SHOWN = 25  # of each stage
SOURCES_SHOWN = 200
LENGTHS = {WORDS: "words", CHARACTERS: "characters"}
COMPARED = re.compile(r"\s*\(?\s*([A-Za-z_]\w*)\s*\)?\s*(?:<=?|>=?|==|!=)")
WIDTH, HEIGHT = 300, 118  # of a histogram, in pixels
LEFT, RIGHT, TOP, BOTTOM = 2, 2, 8, 18
Row = Mapping[str, Any]


@dataclass
class Report:
    """What the page tells; rows are of the tables, with whatever columns these have."""

    stages: list[tuple[str, Counts]]
    rules: dict[str, list[dict[str, Any]]]  # of the stages that filter
    columns: Summary
    columns_of: str  # the stage whose table `columns` tells of
    before: str  # the stage whose rows are drawn behind; "" for none
    clips: list[dict[str, Any]]
    scores: list[str]  # columns to show with every clip
    words: list[tuple[str, int]]
    words_of: int  # captions that were looked at
    duplicates: Groups | None = None
    flags: Groups | None = None
    strips: dict[str, dict[str, Strip]] = field(default_factory=dict)  # of "clips" and "duplicates", by path
    links: dict[str, str] = field(default_factory=dict)  # addresses of the clips, by path
    sources: list[SourceCounts] = field(default_factory=list)  # the most interesting first


def page(report: Report) -> str:
    """Return the page as one HTML document."""
    return render(
        TEMPLATES / "dataset.html",
        {
            "cell": _cell,
            "clock": clock,
            "facts": facts,
            "sources": _sources,
            "drawing": partial(draw, marks=_thresholds(report.rules)),
        },
        title="Dataset report",
        plays_files=True,
        report=report,
        pictures=Room(MAX_PICTURES),
        SOURCES_SHOWN=SOURCES_SHOWN,
        REASONS_SHOWN=REASONS_SHOWN,
        LENGTHS=LENGTHS,
    )


class Room:
    """Room for pictures: the page stays small enough to open anywhere."""

    def __init__(self, size: int) -> None:
        self.left = size

    def has_room(self, code: str) -> bool:
        """Take room for a picture, if there is enough."""
        fits = len(code) <= self.left
        self.left -= len(code) if fits else 0
        return fits


def facts(row: Row, scores: Sequence[str]) -> list[str]:
    """Return a clip's size, length and scores in words."""
    frames, fps, height, width = (_number(row.get(name)) for name in ("num_frames", "fps", "height", "width"))
    parts = [f"{width:.0f}×{height:.0f}"] if height and width else []
    parts += [f"{frames / fps:.1f} s, {number(fps)} fps"] if frames and fps else []
    return parts + [f"{shown(name, 40)} {_cell(row[name], 3)}" for name in scores if row.get(name) is not None]


def _thresholds(rules: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the filters' thresholds by the column they are compared with."""
    found: dict[str, list[float]] = {}
    for rule in (rule for own in rules.values() for rule in own):
        threshold, match = _number(rule.get("threshold")), COMPARED.match(rule["rule"])
        if threshold is not None and match:
            found.setdefault(match[1], []).append(threshold)
    return found


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram, `kind` "now" or "before"."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    told: str


@dataclass(frozen=True)
class Drawing:
    """A histogram in pixels, y downwards."""

    bars: list[Bar]
    marks: list[tuple[float, float]]  # x and value of a threshold
    labels: list[tuple[float, str, float]]  # x, anchor and value
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    floor: int = HEIGHT - BOTTOM


def draw(column: Numbers, marks: Mapping[str, Sequence[float]]) -> Drawing:
    """Return the rows a bin, what was before behind them; `marks` are thresholds by column, lines across."""
    behind = column.before if column.before is not None else 0 * column.counts
    most = max(1, int(column.counts.max()), int(behind.max()))
    edges = [float(edge) for edge in column.edges]
    low, high = edges[0], edges[-1]

    def across(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    bars = []
    for kind, counts in (("before", behind), ("now", column.counts)):
        for left, right, count in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
            if count:
                tall = round(max(1.0, count / most * (HEIGHT - TOP - BOTTOM)), 1)
                wide = round(max(1.0, across(right) - across(left) - 0.8), 1)
                told = f"{number(left)} to {number(right)}: {int(count):,}{' before' if kind == 'before' else ''}"
                bars.append(Bar(kind, across(left), round(HEIGHT - BOTTOM - tall, 1), wide, tall, told))
    lines = [(across(mark), mark) for mark in marks.get(column.name, ()) if low <= mark <= high]
    middle = (low + high) / 2
    labels = [(across(low), "start", low), (across(middle), "middle", middle), (across(high), "end", high)]
    return Drawing(bars, lines, labels)


def _number(value: object) -> float | None:
    """Return a finite number, None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable and isinstance(value, int | float) else None


def _cell(value: object, digits: int = 4) -> str:
    known = _number(value)
    return number(known, digits) if known is not None else shown("" if value is None else value, 60)


def _sources(count: int) -> str:
    return f"over {count:,}" if count >= SOURCES_COUNTED else f"{count:,}" if count else ""


def clock(seconds: float | None) -> str:
    """Return hours, minutes and seconds, as far as they count; "" for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours:,}:{minutes:02d}:{whole % 60:02d} h" if hours else f"{minutes}:{whole % 60:02d} min"
