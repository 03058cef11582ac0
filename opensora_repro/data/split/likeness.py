"""How alike two frames are, and whether some are mixtures of others, judged by thumbnails."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from threading import get_ident

import cv2
import numpy as np
from numpy.lib.stride_tricks import as_strided

WIDTH, HEIGHT = 64, 36  # thumbnail, whatever the picture's shape: a search radius is then a share of the picture
COLOUR_SIZE = (16, 9)  # width and height of either colour plane's thumbnail
SAMPLED = 4  # rows of a picture that a thumbnail's row averages: all of them would take three times as long
BLOCK = 4  # thumbnail pixels a side that move together
RADIUS = 4  # thumbnail pixels that a block may move from frame to frame: a sixteenth of the width
ALIKE = 0.6  # correlation from which a region shows the same at both ends of a dissolve
Picture = tuple[np.ndarray, np.ndarray]  # brightness uint8 [36, 64], colour differences uint8 [18, 16], one below other


def thumbnail(planes: list[np.ndarray]) -> Picture:
    """Reduce a frame's uint8 planes Y [H, W], U and V (of any size) to a Picture."""
    bright, *colours = planes
    return _shrink(bright, WIDTH, HEIGHT), np.concatenate([_shrink(plane, *COLOUR_SIZE) for plane in colours])


def _shrink(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average over areas; of large planes, over evenly spaced rows, and by halving, which OpenCV does fastest."""
    if plane.shape[0] >= SAMPLED * height and plane.shape[1] >= SAMPLED * width:
        plane = plane.take(_spaced(plane.shape[0], SAMPLED * height), axis=0)
        for _ in range(SAMPLED.bit_length() - 1):
            plane = cv2.resize(plane, (plane.shape[1] // 2, plane.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=16)
def _spaced(total: int, count: int) -> np.ndarray:
    """Return `count` of `total` rows, each in the middle of its share."""
    return ((np.arange(count) + 0.5) * total / count).astype(np.intp)


class Recent:
    """The last thumbnails, by frame number."""

    def __init__(self) -> None:
        self.first = self.count = 0
        self.pictures: deque[Picture] = deque()
        # Any stretch of frames is a slice: when there is no room left, the rows still needed move to the front.
        self.origin = 0  # frame in the first row
        self.rows = np.empty((256, (HEIGHT // 2) * (WIDTH // 2)), np.float32)
        self.squares = np.empty(256, np.float32)

    def add(self, picture: Picture) -> None:
        if self.count - self.origin == len(self.rows):
            needed = slice(self.first - self.origin, None)
            grown = 2 * max(128, self.count - self.first)
            rows, squares = self.rows[needed], self.squares[needed]
            self.rows, self.squares = np.empty((grown, rows.shape[1]), np.float32), np.empty(grown, np.float32)
            self.rows[: len(rows)], self.squares[: len(rows)] = rows, squares
            self.origin = self.first
        row = picture[0][::2, ::2].reshape(-1).astype(np.float32) - 128
        self.rows[self.count - self.origin] = row
        self.squares[self.count - self.origin] = row @ row
        self.pictures.append(picture)
        self.count += 1

    def forget(self, frame: int) -> None:
        """Drop what is before a frame."""
        while self.first < frame:
            self.pictures.popleft()
            self.first += 1

    def __getitem__(self, frame: int) -> Picture:
        return self.pictures[frame - self.first]

    def mixture(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 [T]: how far frames start to end (both included) lie from the line between the two, and where.

        Distances are shares of that between the ends; the places on the line go from 0 to 1.
        """
        rows, squares = (a[start - self.origin : end - self.origin + 1] for a in (self.rows, self.squares))
        way = rows[-1] - rows[0]
        length = max(1.0, float(way @ way))  # no frame lies near the line between two that are the same
        # einsum instead of @, which would start threads for this little
        along, from_start = np.einsum("tn,n->t", rows, way), np.einsum("tn,n->t", rows, rows[0])
        shares = (along - along[0]) / length
        moved = (squares - 2 * from_start + squares[0]) / length
        return np.sqrt(np.maximum(0, moved - shares * shares)), shares


def residual(before: Picture, after: Picture) -> float:
    """Return how badly motion explains `after` from `before`, in grey levels; colour adds a quarter at most.

    The limit is for encoders that let the colours of a picture drift and put them right at a key frame.
    """
    bright = unexplained(before[0], after[0], RADIUS, BLOCK)
    return bright + 0.5 * min(unexplained(before[1], after[1], 1, 1), 0.5 * bright)


def distance(one: Picture, other: Picture) -> float:
    """Return the smaller of both residuals: what comes into view or goes out of it is explained one way only."""
    return min(residual(one, other), residual(other, one))


def unexplained(before: np.ndarray, after: np.ndarray, radius: int, block: int) -> float:
    """Return the mean difference that is left of `after` when each block takes its best match within `radius`."""
    height, width = after.shape
    side = 2 * radius + 1
    shifted, copies, apart = _scratch(side * side, height, width, get_ident())
    padded = cv2.copyMakeBorder(before, radius, radius, radius, radius, cv2.BORDER_REPLICATE)
    step = padded.shape[1]
    windows = as_strided(padded, (side, side, height, width), (step, 1, step, 1))
    np.copyto(shifted.reshape(windows.shape), windows)
    np.copyto(copies, after)
    tall = (side * side * height, width)
    left = cv2.absdiff(shifted.reshape(tall), copies.reshape(tall), dst=apart)
    for _ in range(block.bit_length() - 1):  # halving is many times faster than a quarter at once
        left = cv2.resize(left, (left.shape[1] // 2, left.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return float(left.reshape(side * side, -1).min(axis=0).mean())


@lru_cache(maxsize=16)
def _scratch(count: int, height: int, width: int, _thread: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for block matching, kept because getting it anew costs more than the matching itself."""
    shape = (count, height, width)
    return np.empty(shape, np.uint8), np.empty(shape, np.uint8), np.empty((count * height, width), np.uint8)


def changed(one: np.ndarray, other: np.ndarray) -> float:
    """Return the share of the picture, in regions, that shows something else: neither the same nor brighter or darker.

    A title that fades in changes some regions, a dissolve all of them.
    """
    a, b = (np.float32(p).reshape(4, HEIGHT // 4, 4, WIDTH // 4).swapaxes(1, 2).reshape(16, -1) for p in (one, other))
    differ = np.abs(a - b).mean(axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    noise = 1.0  # grey levels squared: so flat regions do not correlate
    likeness = (a * b).mean(axis=1) / (np.sqrt((a * a).mean(axis=1) * (b * b).mean(axis=1)) + noise)
    return float(((likeness < ALIKE) & (differ > 4)).mean())
