"""Where one shot ends and the next begins, from a thumbnail of every frame.

A hard cut is a frame that no motion explains from the one before it, nor the other way round, while its neighbours
explain each other several times better. Three things that a plain frame difference takes for cuts fall away:

- pans, zooms and fast action: small blocks are searched for in the other frame (block matching, as video codecs do it),
  and what remains is compared with what remains at the neighbouring frames, which are as restless;
- flashes, and whatever else is gone again after a few frames: the pictures before and after still explain each other;
- repeated frames (a film at 10 frames a second stored at 30): the neighbourhood is wide enough to hold real changes.

A dissolve is a stretch of frames that are mixtures of the stretch's two ends, in shares that go from one end to the
other, where neither motion nor brightness makes one end of the other. A fade is a valley of the picture's contrast.
Memory is bounded: thumbnails are kept for some seconds, a few numbers for every frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident

import cv2
import numpy as np
from numpy.lib.stride_tricks import as_strided

WIDTH, HEIGHT = 64, 36  # thumbnail, whatever the picture's shape: a search radius is then a share of the picture
COLOUR_SIZE = (16, 9)  # width and height of either colour plane's thumbnail
BLOCK = 4  # thumbnail pixels a side that move together
RADIUS = 4  # thumbnail pixels that a block may move from frame to frame: a sixteenth of the width
FLAT = 4.0  # contrast (standard deviation, in grey levels) below which a picture shows nothing
BLENDED = 2  # mixed frames that a hard cut may have
CALM = 0.5  # grey levels: a smaller change is its own residual
PURE = 0.15  # how far from the line between two shots their mixture may lie within a hard cut
STRIDE = 4  # frames between two looks for a dissolve
ALIKE = 0.6  # correlation from which a region shows the same at both ends of a dissolve
Picture = tuple[np.ndarray, np.ndarray]  # brightness uint8 [36, 64], colour differences uint8 [18, 16], one below other


@dataclass(frozen=True)
class ShotOptions:
    """What counts as a cut. Residuals and contrasts are in grey levels of 0 to 255, lengths in frames."""

    ratio: float = 1.5  # a cut's residual against its neighbours'
    floor: float = 0.75  # added to the neighbours' residual: what noise and compression do to a still picture
    least: float = 1.9  # residual below which nothing is a cut
    window: int = 12  # neighbours on either side
    flash: int = 5  # what is gone after so many frames is no cut
    lasting: float = 0.4  # share of a cut's residual that must remain between the frames around it ...
    growth: float = 1.5  # ... and how much it may grow: two shots are as unlike at once as later, motion adds up
    shortest: int = 3  # frames; a second cut within them is none
    reaches: tuple[int, ...] = (8, 16, 28)  # frames from a dissolve's middle to its ends, tried in turn
    apart: float = 10.0  # mean difference of a dissolve's ends
    mixture: float = 0.35  # how far from the line between the ends frames may lie, in shares of the ends' distance
    step: float = 0.3  # a dissolve's largest step between two frames, in shares of the way
    unlike: float = 0.3  # residual between a dissolve's ends, in shares of their contrast
    dark: float = 0.15  # contrast in a fade's valley, in shares of that on either side
    fade: int = 30  # frames in which a fade's picture comes or goes; a valley longer than that is a scene of its own


@dataclass(frozen=True)
class Shots:
    """Cuts (first frame of each new shot; a gradual one's middle) and the gradual ones' frames [start, end)."""

    cuts: tuple[int, ...]
    transitions: tuple[tuple[int, int], ...]


class ShotDetector:
    """Takes thumbnails in order; `finish` returns the shots."""

    def __init__(self, options: ShotOptions | None = None) -> None:
        self.options = options or ShotOptions()
        self.lag = max(self.options.window, self.options.flash, *self.options.reaches) + 1
        self.recent: deque[Picture] = deque(maxlen=2 * self.lag + 1)
        self.count = self.decided = 0
        self.changes: list[float] = []  # mean difference of frames i - 1 and i, a bound of ...
        self.residuals: list[float | None] = []  # ... how badly frame i - 1 explains frame i; None: not asked yet
        self.contrasts: list[float] = []
        self.hard: list[int] = []
        self.blends: list[tuple[int, int]] = []
        self.mixed: list[tuple[int, int]] = []  # what may be dissolves, or parts of one

    def add(self, picture: Picture) -> None:
        """Take a frame's thumbnail (see `thumbnail`)."""
        change = cv2.norm(self.recent[-1][0], picture[0], cv2.NORM_L1) / picture[0].size if self.recent else 0.0
        self.changes.append(change)
        self.residuals.append(change if change < CALM else None)
        self.contrasts.append(float(cv2.meanStdDev(picture[0])[1][0, 0]))
        self.recent.append(picture)
        self.count += 1
        if self.count > self.lag:
            self._decide()

    def finish(self) -> Shots:
        """Return the shots of all frames taken."""
        while self.decided < self.count:
            self._decide()
        fades = [span for span in self._fades() if not any(span[0] <= cut <= span[1] for cut in self.hard)]
        gradual = fades + self._dissolves(fades)
        middles = [(start + end) // 2 for start, end in gradual]
        transitions = sorted(self.blends + [t for t in gradual if t[1] - t[0] > 1])
        return Shots(tuple(sorted({*self.hard, *middles})), tuple(transitions))

    def _picture(self, frame: int) -> Picture:
        return self.recent[frame - self.count + len(self.recent)]

    def _residual(self, frame: int) -> float:
        known = self.residuals[frame]
        if known is None:
            known = self.residuals[frame] = residual(self._picture(frame - 1), self._picture(frame))
        return known

    def _decide(self) -> None:
        """Look at one more frame, with the frames around it."""
        frame, self.decided = self.decided, self.decided + 1
        if not self.hard or frame - self.hard[-1] >= self.options.shortest:
            for blended in range(BLENDED + 1):
                if self._is_cut(frame, blended):
                    self.hard.append(frame)
                    self.blends += [(frame - blended, frame)] * (blended > 0)
                    break
        if frame % STRIDE == 0:
            for reach in self.options.reaches:
                self._mix(frame, reach)

    def _is_cut(self, frame: int, blended: int) -> bool:
        """Whether no motion explains the step to this frame, it stands out among its neighbours and it lasts.

        `blended` frames before it may be mixtures of both shots, which a change of frame rate leaves behind.
        """
        o, first = self.options, frame - blended
        if first < 1:
            return False
        step = sum(self.changes[first : frame + 1])
        contrast = min(self.contrasts[first - 1], self.contrasts[frame])
        if step < o.least or (blended and 1.25 * step < o.unlike * contrast):
            return False
        around = self.changes[max(1, first - o.window) : first] + self.changes[frame + 1 : frame + 1 + o.window]
        if around and step < (1 + blended) * sorted(around)[len(around) // 2]:
            return False  # most frames end here, before anything is searched
        near = [i for n in range(1, o.window + 1) for i in (first - n, frame + n) if 0 < i < self.count]
        near = [i for i in near if i not in self.hard[-4:]]
        if blended and not self._is_blend(first - 1, frame):
            return False
        before, after = self._picture(first - 1), self._picture(frame)
        here = residual(before, after) if blended else self._residual(frame)
        least = o.least
        if blended or len(near) < 4:  # a small motion, too, looks like a mixture, or has nothing to be compared with
            least = max(least, o.unlike * contrast)
        if here < least or self._restless(near, here / o.ratio - o.floor):
            return False
        here = min(here, residual(after, before))
        if here < least or self._restless(near, here / o.ratio - o.floor):
            return False
        steps = range(1, o.flash + 1)
        later = [distance(before, self._picture(min(self.count - 1, frame + i))) / here for i in steps]
        earlier = [distance(self._picture(max(0, first - 1 - i)), after) / here for i in steps]
        lasts = min(later + earlier) >= o.lasting
        return lasts and bool(max(np.median(later), np.median(earlier)) <= o.growth)

    def _restless(self, frames: list[int], most: float) -> bool:
        """Whether two of the frames, nearest first, leave more than `most` unexplained; one alone may be a cut."""
        found = 0
        for frame in frames:
            if 1.25 * self.changes[frame] > most and self._residual(frame) > most:
                found += 1
                if found > 1:
                    return True
        return False

    def _is_blend(self, start: int, end: int) -> bool:
        off, shares = mixture(np.stack([self._picture(i)[0][::2, ::2] for i in range(start, end + 1)]))
        return off <= PURE and bool((np.diff(shares) > 0.1).all())

    def _mix(self, frame: int, reach: int) -> None:
        """Remember this frame as a dissolve's middle if the frames around it mix the stretch's two ends."""
        o = self.options
        start, end = frame - reach, frame + reach
        if start < 0 or end >= self.count or any(start < cut <= end for cut in self.hard[-8:]):
            return
        one, other = self._picture(start), self._picture(end)
        if min(self.contrasts[start], self.contrasts[end]) < FLAT:
            return
        if cv2.norm(one[0], other[0], cv2.NORM_L1) / one[0].size < o.apart:
            return
        middle = mixture(np.stack([p[0][::2, ::2] for p in (one, self._picture(frame), other)]))[0]
        if 0.75 * middle > o.mixture:
            return
        off, shares = mixture(np.stack([self._picture(i)[0][::2, ::2] for i in range(start, end + 1)]))
        if off > o.mixture or np.diff(shares).max() > o.step:
            return
        contrast = min(self.contrasts[start], self.contrasts[end])
        if changed(one[0], other[0]) >= 0.5 and distance(one, other) >= o.unlike * contrast:
            inside = np.flatnonzero((shares > 0.05) & (shares < 0.95))
            self.mixed.append((start + int(inside[0]), start + int(inside[-1]) + 1))

    def _dissolves(self, fades: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Join what overlaps; none over a cut or a fade."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted(self.mixed):
            if joined and start < joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        others = fades + [(cut, cut + 1) for cut in self.hard]
        return [(start, end) for start, end in joined if all(end <= a or start >= b for a, b in others)]

    def _fades(self) -> Iterator[tuple[int, int]]:
        """Valleys of contrast between pictures: [start of the fall, end of the rise)."""
        o, contrast = self.options, np.array(self.contrasts)
        flat = contrast < FLAT
        edges = np.flatnonzero(np.diff(np.r_[False, flat, False].astype(np.int8)))
        for start, end in edges.reshape(-1, 2).tolist():
            if start == 0 or end == self.count:
                continue
            before, after = contrast[max(0, start - o.fade) : start], contrast[end : end + o.fade]
            if contrast[start:end].min() <= o.dark * min(before.max(), after.max()):
                fall = start - len(before) + int(np.flatnonzero(before >= 0.95 * before.max())[-1])
                rise = end + int(np.flatnonzero(after >= 0.95 * after.max())[0])
                yield (fall + 1, rise) if end - start <= o.fade else (start, start + 1)


def thumbnail(planes: list[np.ndarray]) -> Picture:
    """Reduce a frame's uint8 planes Y [H, W], U and V (of any size) to a Picture."""
    bright, *colours = planes
    return _shrink(bright, WIDTH, HEIGHT), np.concatenate([_shrink(plane, *COLOUR_SIZE) for plane in colours])


def _shrink(plane: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average over areas; large planes are halved first, which OpenCV does many times faster than any other factor."""
    while plane.size > 40_000 and min(plane.shape[0] / height, plane.shape[1] / width) >= 4:
        plane = cv2.resize(plane, (plane.shape[1] // 2, plane.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)


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
    np.copyto(shifted, as_strided(padded, (side, side, height, width), (step, 1, step, 1)).reshape(shifted.shape))
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


def mixture(frames: np.ndarray) -> tuple[float, np.ndarray]:
    """Return how far uint8 [T, H, W] frames lie from the line between the first and the last, and their shares on it.

    The distance is a share of that between the ends, in the worst quarter of the frames; shares go from 0 to 1.
    """
    frames = frames.reshape(len(frames), -1).astype(np.float32)
    way = frames[-1] - frames[0]
    length = float(way @ way)
    moved = frames - frames[0]
    shares = moved @ way / length
    off = np.linalg.norm(moved - shares[:, None] * way, axis=1) / np.sqrt(length)
    return float(np.quantile(off, 0.75)), shares
