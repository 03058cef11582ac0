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

from dataclasses import dataclass

import cv2
import numpy as np

from opensora_repro.data.split.likeness import Picture, Recent, changed, distance, residual

DIM = 16.0  # contrast (standard deviation, in grey levels) below which all differences, noise too, are smaller
FLAT = 4.0  # contrast below which a picture shows nothing
BLENDED = 2  # mixed frames that a hard cut may have
CALM = 0.5  # grey levels: a smaller change is its own residual
PURE = 0.25  # how far from the line between two shots their mixture may lie within a hard cut
STRIDE = 4  # frames between two looks for a dissolve
LONGEST = 100  # frames of a dissolve: what overlaps one after so many is left aside
Stretch = tuple[int, int]  # frames [start, end)


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
    """Takes thumbnails in order; `finish` returns the shots.

    On the way, `cuts` and `transitions` hold what is known so far, complete up to frame `settled()`.
    """

    def __init__(self, options: ShotOptions | None = None) -> None:
        self.options = options or ShotOptions()
        self.lag = max(self.options.window, self.options.flash, *self.options.reaches) + 1
        self.recent = Recent(2 * self.lag + 1)
        self.count = self.decided = 0
        self.finished = False
        self.changes: list[float] = []  # mean difference of frames i - 1 and i, a bound of ...
        self.residuals: list[float | None] = []  # ... how badly frame i - 1 explains frame i; None: not asked yet
        self.contrasts: list[float] = []
        self.hard: list[int] = []
        self.blends: list[Stretch] = []
        self.gradual: list[Stretch] = []  # fades and dissolves
        self.valley: int | None = None  # where the picture went flat, while it still is
        self.valleys: list[Stretch] = []  # flat stretches that may be fades
        self.mixed: list[Stretch] = []  # what may be dissolves, or parts of one

    @property
    def num_found(self) -> int:
        return len(self.hard) + len(self.gradual)

    @property
    def cuts(self) -> list[int]:
        return sorted({*self.hard, *((start + end) // 2 for start, end in self.gradual)})

    @property
    def transitions(self) -> list[Stretch]:
        return sorted(self.blends + [t for t in self.gradual if t[1] - t[0] > 1])

    def add(self, picture: Picture) -> None:
        """Take a frame's thumbnail (see `thumbnail`)."""
        before = self.recent[self.count - 1] if self.count else picture
        change = cv2.norm(before[0], picture[0], cv2.NORM_L1) / picture[0].size
        self.changes.append(change)
        self.residuals.append(change if change < CALM else None)
        self.contrasts.append(float(cv2.meanStdDev(picture[0])[1][0, 0]))
        self.recent.add(picture)
        self._follow_valley()
        self.count += 1
        if self.count > self.lag:
            self._decide()
            self._settle()

    def finish(self) -> Shots:
        """Return the shots of all frames taken."""
        while self.decided < self.count:
            self._decide()
        self.finished = True
        self._settle()
        return Shots(tuple(self.cuts), tuple(self.transitions))

    def settled(self) -> int:
        """Return the frame that no cut or transition still to be found can lie before."""
        if self.finished:
            return self.count
        bounds = [self.decided - max(self.options.reaches), *(start for start, _ in self.mixed)]
        bounds += [start - self.options.fade if self._is_short(start, end) else end for start, end in self.valleys]
        if self.valley is not None and self._is_short(self.valley, self.count):
            bounds.append(self.valley - self.options.fade)
        return max(0, min(bounds))

    def _residual(self, frame: int) -> float:
        known = self.residuals[frame]
        if known is None:
            known = self.residuals[frame] = residual(self.recent[frame - 1], self.recent[frame])
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
        dim = min(1.0, max(0.25, contrast / DIM))
        least, floor = o.least * dim, o.floor * dim
        if step < least or (blended and 1.25 * step < o.unlike * contrast):
            return False
        around = self.changes[max(1, first - o.window) : first] + self.changes[frame + 1 : frame + 1 + o.window]
        if around and step < (1 + blended) * sorted(around)[len(around) // 2]:
            return False  # most frames end here, before anything is searched
        near = [i for n in range(1, o.window + 1) for i in (first - n, frame + n) if 0 < i < self.count]
        near = [i for i in near if i not in self.hard[-4:]]
        if blended and not self._is_blend(first - 1, frame):
            return False
        before, after = self.recent[first - 1], self.recent[frame]
        here = residual(before, after) if blended else self._residual(frame)
        if blended or len(near) < 4:  # a small motion, too, looks like a mixture, or has nothing to be compared with
            least = max(least, o.unlike * contrast)
        if here < least or self._restless(near, here / o.ratio - floor):
            return False
        here = min(here, residual(after, before))
        if here < least or self._restless(near, here / o.ratio - floor):
            return False
        steps = range(1, o.flash + 1)
        later = [distance(before, self.recent[min(self.count - 1, frame + i)]) / here for i in steps]
        earlier = [distance(self.recent[max(0, first - 1 - i)], after) / here for i in steps]
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
        off, shares = self.recent.mixture(start, end)
        return bool(off.max() <= PURE) and bool((np.diff(shares) > 0.1).all())

    def _mix(self, frame: int, reach: int) -> None:
        """Remember this frame as a dissolve's middle if the frames around it mix the stretch's two ends."""
        o = self.options
        start, end = frame - reach, frame + reach
        if start < 0 or end >= self.count or any(start < cut <= end for cut in self.hard[-8:]):
            return
        contrast = min(self.contrasts[start], self.contrasts[end])
        if contrast < FLAT:
            return
        one, other = self.recent[start], self.recent[end]
        if cv2.norm(one[0], other[0], cv2.NORM_L1) / one[0].size < o.apart:
            return
        off, shares = self.recent.mixture(start, end)
        worst = 3 * len(off) // 4  # the worst quarter may hold what moves
        if np.partition(off, worst)[worst] > o.mixture or np.diff(shares).max() > o.step:
            return
        if changed(one[0], other[0]) >= 0.5 and distance(one, other) >= o.unlike * contrast:
            inside = np.flatnonzero((shares > 0.05) & (shares < 0.95))
            self.mixed.append((start + int(inside[0]), start + int(inside[-1]) + 1))

    def _follow_valley(self) -> None:
        """Note where the newest picture, frame `count`, goes flat or comes back."""
        flat = self.contrasts[-1] < FLAT
        if flat and self.valley is None:
            self.valley = self.count
        elif not flat and self.valley is not None:
            if self.valley:  # a video that begins flat has nothing that could fade
                self.valleys.append((self.valley, self.count))
            self.valley = None

    def _is_short(self, start: int, end: int) -> bool:
        """Whether a valley is a transition as a whole, and not a scene of its own."""
        return end - start <= self.options.fade

    def _settle(self) -> None:
        """Turn into cuts the valleys and mixtures that no further frame can change."""
        o, finished = self.options, self.finished
        open_valley = [(self.valley, self.count)] if self.valley else []
        pending = []
        for start, end in self.valleys + open_valley:
            if self._is_short(start, end):
                pending.append(start)
            elif self.mixed:  # what goes into a long valley is no dissolve, whatever comes after it
                fall = self._fall(start, end)
                self.mixed = [m for m in self.mixed if fall is None or m[1] <= fall or m[0] >= end]
        known = min([self.decided - max(o.reaches), *(start - o.fade for start in pending)])
        while self.valleys and (finished or self.decided > self.valleys[0][1] + o.fade):
            fade = self._fade(*self.valleys.pop(0))
            if fade and not any(fade[0] <= cut <= fade[1] for cut in [*self.hard, *(end for _, end in self.gradual)]):
                self.gradual.append(fade)
        while self.mixed:
            start, end = self._first_dissolve()
            if end > known and not finished:
                return
            self.mixed = [m for m in self.mixed if m[0] >= end]
            others = [*self.gradual, *((cut, cut + 1) for cut in self.hard)]
            if all(end <= a or start >= b for a, b in others):
                self.gradual.append((start, end))

    def _first_dissolve(self) -> Stretch:
        """Join the mixtures that overlap the first one."""
        (first, last), *others = sorted(self.mixed)
        for start, end in others:
            if start < last and end - first <= LONGEST:
                last = max(last, end)
        return first, last

    def _fade(self, start: int, end: int) -> Stretch | None:
        """Return a flat stretch as [start of the fall, end of the rise); the rise if it is a scene of its own."""
        after = np.array(self.contrasts[end : end + self.options.fade])
        fall = self._fall(start, end)
        if fall is None or min(self.contrasts[start:end]) > self.options.dark * after.max():
            return None
        rise = end + int(np.flatnonzero(after >= 0.95 * after.max())[0])
        return (fall, rise) if self._is_short(start, end) else (end, max(rise, end + 1))

    def _fall(self, start: int, end: int) -> int | None:
        """Return the first frame that is darker on the way into a flat stretch; None if that is no valley."""
        before = np.array(self.contrasts[max(0, start - self.options.fade) : start])
        if min(self.contrasts[start:end]) > self.options.dark * before.max():
            return None
        return start - len(before) + int(np.flatnonzero(before >= 0.95 * before.max())[-1]) + 1
