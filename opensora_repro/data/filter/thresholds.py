"""Where a threshold lies: exact percentiles of more numbers than memory holds, and a picture of the clips beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.storage.addresses import within

Chunks = Callable[[], Iterable[np.ndarray]]  # starts a pass over float64 arrays, always the same ones
DIGIT_BITS = 16
COLLECT = 1 << 18  # so few candidates are sorted instead of counted again
CELL, LABEL, GAP = 192, 18, 4  # pixels: a square for each clip, a line of text, between cells


def percentile(chunks: Chunks, percent: float) -> float | None:
    """Return what numpy's default (linear) method gives; None where there are no numbers. NaN is left out.

    Memory does not grow with the count: a radix select. A float's bits, read as an integer, can be put in the
    float's order, so counting their leading 16 bits tells which numbers can still be the one; at most three further
    passes look at the next bits of those alone, until few enough are left to be sorted.
    """
    total = sum(int(np.count_nonzero(~np.isnan(chunk))) for chunk in chunks())
    if total == 0:
        return None
    position = (total - 1) * (percent / 100)
    lower, following = _select(chunks, math.floor(position))
    if position.is_integer():
        return lower
    upper = _select(chunks, math.floor(position) + 1)[0] if following is None else following
    if lower == upper:
        return lower
    # A multiple of the difference, taken from the nearer end, as numpy does it: equal to the last bit
    share, step = position - math.floor(position), upper - lower
    return upper - step * (1 - share) if share >= 0.5 else lower + step * share


def _select(chunks: Chunks, rank: int) -> tuple[float, float | None]:
    """Return the number of that rank, from 0, and the one after it where it was seen too."""
    prefix, known = 0, 0  # the leading bits found so far, and how many they are
    while known < 64:
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for keys in _candidates(chunks, prefix, known):
            digits = (keys >> np.uint64(64 - known - DIGIT_BITS)) & np.uint64((1 << DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - counts[digit])
        prefix, known = prefix << DIGIT_BITS | digit, known + DIGIT_BITS
        if counts[digit] <= COLLECT:
            keys = np.sort(np.concatenate(list(_candidates(chunks, prefix, known))))
            return _number(int(keys[rank])), _number(int(keys[rank + 1])) if rank + 1 < len(keys) else None
    return _number(prefix), _number(prefix) if rank + 1 < counts[digit] else None


def _candidates(chunks: Chunks, prefix: int, known: int) -> Iterable[np.ndarray]:
    for chunk in chunks():
        keys = _keys(chunk[~np.isnan(chunk)])
        yield keys[keys >> np.uint64(64 - known) == np.uint64(prefix)] if known else keys


def _keys(numbers: np.ndarray) -> np.ndarray:
    """Integers in the numbers' order: the sign bit set for positive ones, all bits turned for negative ones."""
    bits = np.ascontiguousarray(numbers + 0.0, dtype=np.float64).view(np.uint64)  # + 0.0: one zero, not two
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def _number(key: int) -> float:
    sign = 1 << 63
    bits = key ^ sign if key & sign else ~key & (1 << 64) - 1
    return float(np.array(bits, dtype=np.uint64).view(np.float64))


# ---- the clips closest to it on both sides, to judge by eye whether it lies well


@dataclass(frozen=True)
class NearRow:
    """A row near the threshold."""

    value: float
    id: str
    path: str
    num_frames: int


class Nearest:
    """Keeps the `count` rows just below a threshold and the `count` at or just above it; first come, first kept."""

    def __init__(self, threshold: float, count: int) -> None:
        self.threshold, self.count = threshold, count
        self._below: list[NearRow] = []
        self._above: list[NearRow] = []

    def add(self, values: np.ndarray, batch: Any) -> None:
        """Look at a record batch with the columns id and path; `values` is float64 [rows], NaN for missing."""
        self._below = self._merge(self._below, values, values < self.threshold, batch)
        self._above = self._merge(self._above, values, values >= self.threshold, batch)

    def sides(self) -> tuple[list[NearRow], list[NearRow]]:
        """Return the rows below and those above, the closest first."""
        return self._below, self._above

    def _merge(self, known: list[NearRow], values: np.ndarray, side: np.ndarray, batch: Any) -> list[NearRow]:
        rows = np.flatnonzero(side)
        distances = np.abs(values[rows] - self.threshold)
        if len(known) == self.count:  # most batches hold nothing closer
            closer = distances < abs(known[-1].value - self.threshold)
            rows, distances = rows[closer], distances[closer]
        if len(rows) > self.count:
            reach = np.partition(distances, self.count - 1)[self.count - 1]
            close = distances <= reach
            rows, distances = rows[close], distances[close]
        rows = rows[np.argsort(distances, kind="stable")][: self.count]
        merged = [*known, *(_row(batch, int(row), float(values[row])) for row in rows)]
        return sorted(merged, key=lambda row: abs(row.value - self.threshold))[: self.count]


def _row(batch: Any, row: int, value: float) -> NearRow:
    def cell(name: str) -> Any:
        return batch.column(name)[row].as_py() if name in batch.schema.names else None

    return NearRow(value, str(cell("id")), str(cell("path") or ""), int(cell("num_frames") or 1))


Thumbnail = tuple[NearRow, np.ndarray]


def read_thumbnails(rows: list[NearRow], folder: Path, count: int) -> list[Thumbnail]:
    """Return the middle frames, uint8 [CELL, CELL, 3], of the first `count` clips that can be read."""
    from opensora_repro.data.video import DecodeError, read_pictures_at

    found: list[Thumbnail] = []
    for row in rows:
        if len(found) == count:
            break
        try:
            frame = read_pictures_at(within(folder, row.path), [max(0, row.num_frames // 2)])[0]
        except (DecodeError, OSError, ValueError):
            continue
        found.append((row, _fit(frame)))
    return found


def contact_sheet(title: str, below: list[Thumbnail], above: list[Thumbnail]) -> np.ndarray:
    """Return uint8 [H, W, 3]: the clips below the threshold in the first row, those above in the second.

    The nearest to the threshold come first; each has its value and the start of its id.
    """
    columns = max(len(below), len(above))
    width = columns * (CELL + GAP) + GAP
    bands = [_band(title, width, 20)]
    for name, side in (("below", below), ("at or above", above)):
        bands.append(_band(f"{name}, nearest first" if side else f"{name}: none to show", width, 14))
        row = np.full((CELL + LABEL + GAP if side else 0, width, 3), 24, dtype=np.uint8)
        for number, (clip, picture) in enumerate(side):
            left = GAP + number * (CELL + GAP)
            row[:CELL, left : left + CELL] = picture
            row[CELL : CELL + LABEL, left : left + CELL] = _band(f"{clip.value:.4g}  {clip.id}", CELL, 12)
        bands.append(row)
    return np.concatenate(bands)


def _fit(frame: np.ndarray) -> np.ndarray:
    """Scale a picture into a dark square."""
    import cv2

    height, width = frame.shape[:2]
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    square = np.full((CELL, CELL, 3), 24, dtype=np.uint8)
    top, left = (CELL - small.shape[0]) // 2, (CELL - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _band(text: str, width: int, size: int) -> np.ndarray:
    """Light text on a dark line; names are anybody's, so only plain characters are drawn."""
    from PIL import Image, ImageDraw, ImageFont

    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    image = Image.new("RGB", (width, size + 6), (24, 24, 24))
    ImageDraw.Draw(image).text((GAP, 2), plain, fill=(220, 220, 220), font=ImageFont.load_default(size))
    return np.asarray(image).copy()
