"""Measure from the pixels of a written video which colour, shape and direction it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.demo.shapes import COLOURS, DIRECTIONS, SHAPES, Motion, signed_distance

FOREGROUND = 128  # a pixel whose brightest channel is above this belongs to the shape
MIN_AREA = 0.01  # of the picture; less is no shape
MIN_OVERLAP = 0.75  # intersection over union with the nearest ideal shape; less is no shape we know
MIN_TRAVEL = 0.25  # of the picture's side, from first to last frame


@dataclass(frozen=True)
class Seen:
    """What a video shows; None where nothing in the language fits."""

    colour: str | None
    shape: str | None
    direction: str | None

    def agrees(self, motion: Motion) -> dict[str, bool]:
        """Return for colour, shape and direction whether the video shows what the caption asked for."""
        return {key: value == getattr(motion, key) for key, value in asdict(self).items()}


def measure(frames: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Seen:
    """Judge uint8 frames [T, H, W, 3]: colour (of `colours`) and shape by majority over frames, direction from first to
    last.
    """
    per_frame = [(mask_of(frame), frame) for frame in frames]
    found = Counter(colour_of(frame, mask, colours) for mask, frame in per_frame)
    shapes = Counter(shape_of(mask) for mask, _ in per_frame)
    direction = direction_of(per_frame[0][0], per_frame[-1][0])
    return Seen(majority(found, len(frames)), majority(shapes, len(frames)), direction)


def measure_file(path: Path, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> Seen:
    """Decode a whole video file and judge it."""
    from opensora_repro.data.video import probe, read_frames

    return measure(np.asarray(read_frames(path, start=0, count=probe(path).num_frames)), colours)


def majority(votes: Counter[str | None], total: int) -> str | None:
    """The name that more than half of the frames show."""
    name, count = votes.most_common(1)[0]
    return name if 2 * count > total else None


def mask_of(frame: np.ndarray) -> np.ndarray:
    return frame.max(axis=-1) > FOREGROUND


def colour_of(frame: np.ndarray, mask: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> str | None:
    """The named colour nearest to the mean of the shape's pixels, by which channels are bright."""
    if mask.mean() < MIN_AREA:
        return None
    mean = frame[mask].mean(axis=0)
    distances = {name: float(np.abs(mean - np.array(rgb)).max()) for name, rgb in colours.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < FOREGROUND / 2 else None


def shape_of(mask: np.ndarray) -> str | None:
    """The name whose ideal outline, fitted to the mask's bounding box, overlaps the mask best."""
    if mask.mean() < MIN_AREA:
        return None
    overlaps = {name: overlap(mask, ideal_mask(name, mask)) for name in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def ideal_mask(shape: str, mask: np.ndarray) -> np.ndarray:
    """Draw `shape` stretched to the bounding box of `mask`."""
    rows, cols = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    y = ((np.arange(mask.shape[0]) + 0.5 - top) / (bottom - top) * 2 - 1)[:, None]
    x = ((np.arange(mask.shape[1]) + 0.5 - left) / (right - left) * 2 - 1)[None, :]
    unit = {"circle": 1.0, "square": 1 / 0.9, "triangle": 1 / 1.1}[shape]  # radius whose box is [-1, 1]
    return signed_distance(shape, x, y, unit) <= 0


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def direction_of(first: np.ndarray, last: np.ndarray) -> str | None:
    """The axis and sign along which the centre travelled most, if it travelled far enough."""
    if min(first.mean(), last.mean()) < MIN_AREA:
        return None
    travel = centre_of(last) - centre_of(first)
    along = {name: float(np.dot(travel, step)) for name, step in DIRECTIONS.items()}
    best = max(along, key=along.__getitem__)
    return best if along[best] >= MIN_TRAVEL else None


def centre_of(mask: np.ndarray) -> np.ndarray:
    """Centre (x, y) of the mask as shares of the picture."""
    rows, cols = np.nonzero(mask)
    return np.array([(cols.mean() + 0.5) / mask.shape[1], (rows.mean() + 0.5) / mask.shape[0]])


def shares(records: list[dict[str, Any]]) -> dict[str, float]:
    """Average the `agrees` entries of records: the share with the right colour, shape and direction."""
    return {key: float(np.mean([r["agrees"][key] for r in records])) for key in ("colour", "shape", "direction")}
