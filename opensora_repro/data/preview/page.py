"""One HTML file on what a run will read: its buckets, samples of each, what is lost and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.preview.samples import EPOCH, Picture
from opensora_repro.data.report.markup import render
from opensora_repro.data.report.page import Room, draw, facts
from opensora_repro.data.report.summary import Numbers, bin_edges
from opensora_repro.data.report.thumbnails import Strip

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.data.preflight import BucketRow, Survey

TEMPLATE = Path(__file__).with_name("templates") / "preview.html"
MAX_PICTURES = 10_000_000  # bytes of all pictures; what is beyond is named instead of shown
TOKENS, FRAMES, RATES = "tokens of a caption", "frames", "frames a second"


@dataclass(frozen=True)
class Sample:
    """A clip that a bucket takes."""

    row: Mapping[str, Any]
    picture: Picture
    reading: Any  # what the text encoder reads of the caption, a `Reading` of frozen/text.py


@dataclass(frozen=True)
class Loss:
    """A reason for which clips are lost: how many, what it means, and some of them."""

    name: str
    count: int
    note: str
    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Preview:
    """What the page tells."""

    config: str
    seed: int
    found: Survey
    buckets: Sequence[tuple[BucketRow, Sequence[Sample]]]
    losses: Sequence[Loss]
    lines: Sequence[str]  # warnings, and what is told of the captions
    not_read: str  # why captions are shown whole
    charts: Sequence[Numbers]
    marks: Mapping[str, Sequence[float]]  # on the charts, by name
    strips: Mapping[str, Strip]  # of the losses' examples, by path


def page(preview: Preview) -> str:
    """Return the page as one HTML document."""
    return render(
        TEMPLATE,
        {"facts": facts, "drawing": partial(draw, marks=preview.marks)},
        title="What training will read",
        plays_files=False,
        preview=preview,
        pictures=Room(MAX_PICTURES),
        EPOCH=EPOCH,
    )


def chart(name: str, values: np.ndarray, usable: np.ndarray) -> list[Numbers]:
    """Return a histogram of finite numbers [N], those of usable clips in front of all; nothing of none."""
    import numpy as np

    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    edges = bin_edges(low, high, values)
    everything, used = (np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] for part in (values, values[usable]))
    mean, median = float(values.mean()), float(np.median(values))
    return [Numbers(name, len(values), 0, low, high, mean, median, edges, used, everything)]
