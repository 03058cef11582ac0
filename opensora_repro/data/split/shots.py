"""Where one shot ends and the next begins, from a thumbnail of every frame.

A hard cut is a frame that no motion explains from the one before it, nor the other way round, while its neighbours
explain each other several times better. What a plain frame difference takes for cuts falls away:

- pans, zooms and fast action: small blocks are searched for in the other frame (block matching, as video codecs do it),
  and what remains is compared with what remains at the neighbouring frames, which are as restless;
- repeated frames (a film at 10 frames a second stored at 30): the neighbourhood is wide enough to hold real changes;
- light that changes, whether it stays or not: what lies beside what is the same, only brighter, darker or tinted;
- captions, windows and pictures in pictures: a rectangle changes, and nothing around it;
- pages that are scrolled: most of the picture is there, far above or below;
- flashes, black frames, explosions, interference, what passes close by: within a second the picture before is back;
- the end of a freeze: the picture catches up with what has moved meanwhile.

A dissolve is a stretch of frames that are mixtures of the stretch's two ends, in shares that go from one end to the
other. A fade is a valley of the picture's contrast, and so are cuts to a flat picture and from it. None is a cut where
its ends show the same place, as after a zoom or a blink. Memory is bounded: thumbnails are kept for some seconds, a few
numbers for every frame. All lengths are times, so that the same footage has the same cuts at any frame rate.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from opensora_repro.data.split.likeness import (
    Picture,
    Recent,
    changed,
    distance,
    inset,
    is_detailed,
    is_kept_by_camera,
    kept,
    relit,
    residual,
    scrolled,
)

DIM = 16.0  # contrast (standard deviation, in grey levels) below which all differences, noise too, are smaller
FLAT = 4.0  # contrast below which a picture shows nothing
BLENDED = 2  # mixed frames that a hard cut may have; three and more are enough to be seen as a dissolve
CALM = 0.5  # grey levels: a smaller change is its own residual
REPEATED = 0.1  # grey levels: a smaller change is the same frame, encoded again
PURE = 0.25  # how far from the line between two shots their mixture may lie within a hard cut
STRIDE = 0.13  # seconds between two looks for a dissolve
LONGEST = 3.3  # seconds of a dissolve: what overlaps one after so long is left aside
JITTER = 0.002  # seconds by which times are rounded
Stretch = tuple[int, int]  # frames [start, end)


@dataclass(frozen=True)
class ShotOptions:
    """What counts as a cut. Residuals and contrasts are in grey levels of 0 to 255, lengths in seconds."""

    ratio: float = 1.5  # a cut's residual against its neighbours'
    floor: float = 0.75  # added to the neighbours' residual: what noise and compression do to a still picture
    least: float = 1.9  # residual below which nothing is a cut
    window: float = 0.4  # neighbours on either side
    flash: float = 0.17  # for so long the frames around a cut must stay apart ...
    lasting: float = 0.4  # ... by this share of the cut's residual ...
    growth: float = 1.5  # ... and how much it may grow: two shots are as unlike at once as later, motion adds up
    shortest: float = 0.1  # a second cut within it is none
    same: float = 0.6  # share of regions from which two pictures show one place; unlike ones reach 0.5 by chance
    relit: float = 0.5  # share of regions from which it is the light that has changed
    inset: float = 0.78  # share of the change that a rectangle holds, and of what is around that is kept
    alone: float = 0.93  # share of the change in a rectangle from which nothing around has changed
    scrolled: float = 0.14  # share of the change that a scrolled page leaves at most
    gone: float = 1.0  # what the picture before comes back from had only covered it
    frozen: float = 0.25  # a picture that is repeated for so long was stopped ...
    caught_up: int = 12  # ... and may then jump by so many thumbnail pixels
    reaches: tuple[float, ...] = (0.17, 0.27, 0.53, 0.93)  # from a dissolve's middle to its ends, tried in turn
    apart: float = 10.0  # mean difference of a dissolve's ends
    mixture: float = 0.35  # how far from the line between the ends frames may lie, in shares of the ends' distance
    step: float = 0.3  # a dissolve's largest step between two frames, in shares of the way
    unlike: float = 0.3  # residual between a dissolve's ends, in shares of their contrast
    dark: float = 0.15  # contrast in a fade's valley, in shares of that on either side
    fade: float = 1.0  # in which a fade's picture comes or goes; a valley longer than that is a scene of its own


@dataclass(frozen=True)
class Shots:
    """Cuts (first frame of each new shot; a gradual one's middle) and the gradual ones' frames [start, end)."""

    cuts: tuple[int, ...]
    transitions: tuple[tuple[int, int], ...]


class Valley(NamedTuple):
    """Frames [start, end) in which the picture is flat."""

    start: int
    end: int
    before: Picture  # what was there before


class Mixed(NamedTuple):
    """Frames [start, end) that mix what is on either side, as one look saw them."""

    start: int
    end: int
    part: bool  # the look did not reach beyond both ends
    off: float  # how far from mixtures they are


class ShotDetector:
    """Takes thumbnails in order; `finish` returns the shots.

    On the way, `cuts` and `transitions` hold what is known so far, complete up to frame `settled()`.
    """

    def __init__(self, options: ShotOptions | None = None) -> None:
        self.options = options or ShotOptions()
        self.lag = max(self.options.window, self.options.gone, *self.options.reaches)
        self.recent = Recent()
        self.times: list[float] = []
        self.count = self.decided = 0
        self.finished = False
        self.changes: list[float] = []  # mean difference of frames i - 1 and i, a bound of ...
        self.residuals: list[float | None] = []  # ... how badly frame i - 1 explains frame i; None: not asked yet
        self.contrasts: list[float] = []
        self.hard: list[int] = []
        self.blends: list[Stretch] = []
        self.gradual: list[Stretch] = []  # fades and dissolves
        self.valley: int | None = None  # where the picture went flat, while it still is ...
        self.lowest = 0.0  # ... and the least contrast since
        self.valley_before: Picture | None = None  # ... what was there before it
        self.valleys: list[Valley] = []  # flat stretches that may be fades
        self.next_look = 0.0  # for a dissolve
        self.mixed: list[Mixed] = []  # what may be dissolves, or parts of one

    @property
    def num_found(self) -> int:
        return len(self.hard) + len(self.gradual)

    @property
    def cuts(self) -> list[int]:
        return cuts_of(self.hard, self.blends, self.gradual)[0]

    @property
    def transitions(self) -> list[Stretch]:
        return cuts_of(self.hard, self.blends, self.gradual)[1]

    def add(self, picture: Picture, seconds: float | None = None) -> None:
        """Take a frame's thumbnail (see `thumbnail`) and time; a clock that stands still goes on at its last pace."""
        last, before_last = (self.times[-1], self.times[max(-2, -self.count)]) if self.count else (-0.04, -0.08)
        self.times.append(seconds if seconds is not None and seconds > last else last + max(last - before_last, 0.001))
        before = self.recent[self.count - 1] if self.count else picture
        change = cv2.norm(before[0], picture[0], cv2.NORM_L1) / picture[0].size
        self.changes.append(change)
        self.residuals.append(change if change < CALM else None)
        self.contrasts.append(float(cv2.meanStdDev(picture[0])[1][0, 0]))
        self.recent.add(picture)
        self.count += 1
        self._follow_valley()
        due = bisect_right(self.times, self.times[-1] - self.lag + JITTER)
        if due > self.decided:
            while self.decided < due:
                self._decide()
            self._settle()
            self.recent.forget(self._since(self.decided, LONGEST + self.lag + 2 * self.options.fade))

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
        fade = self.options.fade
        bounds = [self._since(self.decided, self.lag), *(mixed.start for mixed in self.mixed)]
        bounds += [self._since(start, fade) if self._is_short(start, end) else end for start, end, _ in self.valleys]
        if self.valley is not None and self._is_short(self.valley, self.count):
            bounds.append(self._since(self.valley, fade))
        return min(bounds)

    def state(self, first: int) -> str:
        """Return a digest of all that decides about frames to come, `first` being the video's number of frame 0 here.

        Detectors of one state go on alike, whatever frames they began with.
        """
        flat = [valley.start for valley in self.valleys] + [self.valley] * (self.valley is not None)
        begin = min([self.recent.first, *(self._since(start or 0, self.options.fade) for start in flat)])
        told = [
            [first + frame for frame in (self.count, self.decided, self.recent.first, begin)], round(self.next_look, 6),
            [first + cut for cut in self.hard if cut >= begin],
            [(first + start, first + end) for start, end in self.gradual if end >= begin],
            [(first + mixed.start, first + mixed.end, mixed.part, mixed.off) for mixed in self.mixed],
            [(first + valley.start, first + valley.end) for valley in self.valleys],
            None if self.valley is None else (first + self.valley, self.lowest),
        ]  # fmt: skip
        known = hashlib.blake2b(json.dumps(told).encode(), digest_size=16)
        for numbers in (self.times, self.changes, self.contrasts):
            known.update(np.array(numbers[begin:], np.float64).tobytes())
        before = [self.valley_before] if self.valley is not None and self.valley_before else []
        for picture in (*before, *(valley.before for valley in self.valleys), *self.recent.pictures):
            known.update(picture[0].tobytes() + picture[1].tobytes())
        return known.hexdigest()

    def _since(self, frame: int, seconds: float) -> int:
        """Return the first frame at most so long before another."""
        return bisect_left(self.times, self.times[min(frame, self.count - 1)] - seconds - JITTER) if self.count else 0

    def _until(self, frame: int, seconds: float) -> int:
        """Return the last frame at most so long after another."""
        return bisect_right(self.times, self.times[frame] + seconds + JITTER) - 1

    def _residual(self, frame: int) -> float:
        known = self.residuals[frame]
        if known is None:
            known = self.residuals[frame] = residual(self.recent[frame - 1], self.recent[frame])
        return known

    def _decide(self) -> None:
        """Look at one more frame, with the frames around it."""
        frame, self.decided = self.decided, self.decided + 1
        if not self.hard or self.hard[-1] <= self._until(frame, -self.options.shortest):
            for blended in range(BLENDED + 1):
                if self._is_cut(frame, blended):
                    self.hard.append(frame)
                    self.blends += [(frame - blended, frame)] * (blended > 0)
                    break
        if self.times[frame] >= self.next_look - JITTER:
            self.next_look = self.times[frame] + STRIDE
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
        beside = self.changes[first - 1 : first] + self.changes[frame + 1 : frame + 2]
        if blended and o.ratio * max(beside, default=0) > step / (1 + blended):
            return False  # a fade, which goes on as fast
        neighbours = [
            *range(max(1, self._since(first, o.window)), first),
            *range(frame + 1, self._until(frame, o.window) + 1),
        ]
        around = [self.changes[i] for i in neighbours]
        if around and step < (1 + blended) * _middle(around):
            return False  # most frames end here, before anything is searched
        neighbours = sorted({*neighbours} - {*self.hard[-4:]}, key=lambda i: max(first - i, i - frame))
        if blended and not self._is_blend(first - 1, frame):
            return False
        before, after = self.recent[first - 1], self.recent[frame]
        here = residual(before, after) if blended else self._residual(frame)
        if blended or len(neighbours) < 4:  # a small motion looks like a mixture, too, or has nothing to compare with
            least = max(least, o.unlike * contrast)
        if here < least or self._restless(neighbours, here / o.ratio - floor):
            return False
        here = min(here, residual(after, before))
        if here < least or self._restless(neighbours, here / o.ratio - floor):
            return False
        later = [distance(before, self.recent[i]) / here for i in self._spread(frame, self._until(frame, o.flash))]
        earlier = [
            distance(self.recent[i], after) / here for i in self._spread(first - 1, self._since(first - 1, o.flash))
        ]
        lasts = min(later + earlier) >= o.lasting and max(sorted(later)[2], sorted(earlier)[2]) <= o.growth
        return lasts and self._is_elsewhere(first - 1, frame, here)

    def _spread(self, frame: int, last: int) -> list[int]:
        """Return up to five frames after one, or before it, evenly until the last; the frame itself if that is all."""
        return [frame + round((last - frame) * i / 5) for i in range(1, 6)]

    def _is_elsewhere(self, before: int, after: int, here: float) -> bool:
        """Whether the pictures on either side of a jump are two shots, and not one with a new light, inset or cover."""
        o, (one, other) = self.options, (self.recent[before], self.recent[after])
        frozen = self._is_frozen(before, after)
        same = kept(one[0], other[0], *[o.caught_up] * frozen)
        if relit(one, other) >= o.relit:
            return False
        if self._is_inset(before, after):
            return False
        if is_detailed(one[0], other[0]) and scrolled(one[0], other[0]) <= o.scrolled:
            return False
        if same < o.same:
            return not self._is_covered(before, after)
        # One place: a jump in time, unless the picture was stopped, or what it was comes back.
        back = min(distance(self.recent[i], self.recent[j]) for i, j in self._around(before, after))
        return not frozen and back >= o.lasting * here

    def _is_inset(self, before: int, after: int) -> bool:
        share, around = inset(self.recent[before][0], self.recent[after][0])
        return share >= self.options.alone or min(share, around) >= self.options.inset

    def _is_covered(self, before: int, after: int) -> bool:
        """Whether the same place shows again soon after what lies between two frames."""
        flat, other = sorted((self.contrasts[before], self.contrasts[after]))
        if flat < min(FLAT, self.options.dark * other) and self._is_blank(before, after):
            return True
        pairs = self._around(before, after)
        return any(kept(self.recent[i][0], self.recent[j][0]) >= self.options.same for i, j in pairs)

    def _is_blank(self, before: int, after: int) -> bool:
        """Whether the same place is on both sides of the flat stretch that two frames border."""
        first, last = self._since(before, self.options.gone), self._until(after, self.options.gone)
        before = next((i for i in range(before, first, -1) if self.contrasts[i] >= FLAT), first)
        after = next((i for i in range(after, last) if self.contrasts[i] >= FLAT), last)
        return kept(self.recent[before][0], self.recent[after][0], radius=8) >= self.options.same

    def _around(self, before: int, after: int) -> Iterator[tuple[int, int]]:
        """Yield pairs of frames, one before and one after what lies between two, that are `gone` apart or less."""
        for length in (self.options.gone, self.options.gone / 2, self.options.gone / 4):
            for back in (0, length, length / 2):
                yield self._since(before, back), self._until(after, length - back)

    def _is_frozen(self, before: int, after: int) -> bool:
        """Whether the picture before a jump had been stopped."""
        stopped = self._since(after, self.options.frozen)
        return stopped > 0 and all(change < REPEATED for change in self.changes[stopped : before + 1])

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

    def _mix(self, frame: int, reach: float) -> None:
        """Remember what is around this frame as a dissolve if it mixes the pictures at both ends."""
        o = self.options
        start, end = self._since(frame, reach), self._until(frame, reach)
        if min(frame - start, end - frame) < 2 or any(start < cut <= end for cut in self.hard[-8:]):
            return
        contrast = min(self.contrasts[start], self.contrasts[end])
        if contrast < FLAT:
            return
        one, other = self.recent[start], self.recent[end]
        if cv2.norm(one[0], other[0], cv2.NORM_L1) / one[0].size < o.apart:
            return
        off, shares = self.recent.mixture(start, end)
        worst = float(np.partition(off, 3 * len(off) // 4)[3 * len(off) // 4])  # the worst quarter may hold what moves
        if worst > o.mixture or np.diff(shares).max() > o.step:
            return
        if changed(one[0], other[0]) >= 0.5 and distance(one, other) >= o.unlike * contrast:
            first, last = _ramp(shares)
            margin = 0.15 * len(shares)  # within a dissolve shares go from end to end, but for what moves
            part = bool(first < margin or last > len(shares) - 1 - margin)
            first, last = max(1, round(first)), min(len(shares) - 1, round(last))
            self.mixed.append(Mixed(start + first, start + max(first + 1, last), part, worst))

    def _follow_valley(self) -> None:
        """Note where the newest picture goes flat, but for a caption or logo that stays, or comes back."""
        frame, contrast = self.count - 1, self.contrasts[-1]
        if self.valley is None:
            limit = max(FLAT, self.options.dark * max(self.contrasts[self._since(frame, self.options.fade) :]))
            if contrast < limit and (not frame or self.contrasts[-2] >= limit):
                self.valley, self.lowest = frame, contrast
                self.valley_before = self.recent[self._since(frame, self.options.fade)]
        elif contrast < self.lowest + FLAT:
            self.lowest = min(self.lowest, contrast)
        else:
            if self.valley and self.valley_before:  # a video that begins flat has nothing that could fade
                self.valleys.append(Valley(self.valley, frame, self.valley_before))
            self.valley = None

    def _is_short(self, start: int, end: int) -> bool:
        """Whether a valley is a transition as a whole, and not a scene of its own."""
        return self.times[min(end, self.count - 1)] - self.times[start] <= self.options.fade + JITTER

    def _settle(self) -> None:
        """Turn into cuts the valleys and mixtures that no further frame can change."""
        o, finished = self.options, self.finished
        open_valley = [(self.valley, self.count)] if self.valley else []
        pending = []
        for start, end in [valley[:2] for valley in self.valleys] + open_valley:
            if self._is_short(start, end):
                pending.append(start)
            elif self.mixed:  # what goes into a long valley is no dissolve, whatever comes after it
                fall = self._fall(start, end)
                self.mixed = [m for m in self.mixed if fall is None or m[1] <= fall or m[0] >= end]
        known = min([self._since(self.decided, self.lag), *(self._since(start, o.fade) for start in pending)])
        while self.valleys and (finished or self.decided > self._until(self.valleys[0][1], o.fade)):
            self._take_fade(self._fade(self.valleys.pop(0)))
        while self.mixed:
            (start, end), last = self._first_dissolve()
            if last > known and not finished:
                return
            self.mixed = [m for m in self.mixed if m.start >= last]
            others = [*self.gradual, *((cut, cut + 1) for cut in self.hard)]
            if all(end <= a or start >= b for a, b in others) and not self._is_same(start - 1, end):
                self.gradual.append((start, end))

    def _take_fade(self, fade: Stretch | None) -> None:
        """Note a fade; cuts to a flat picture and from it are one, but a cut on one side alone says where it is."""
        if fade is None or any(fade[0] <= end <= fade[1] for _, end in self.gradual):
            return
        within = [cut for cut in self.hard if fade[0] <= cut <= fade[1]]
        if not within or _middle(self.contrasts[within[0] : within[-1]] or [FLAT]) < FLAT:
            self.gradual.append((fade[0], max([fade[1], *(cut + 1 for cut in within)])))

    def _first_dissolve(self) -> tuple[Stretch, int]:
        """Return the first dissolve, and where the last look at it ends.

        Of the mixtures that overlap, the purest one that was seen as a whole tells where it is: others hold the motion
        before and after, or a part. If none was, what they cover together is.
        """
        first, *others = sorted(self.mixed)
        last, looks = first.end, [first]
        for mixed in others:
            if mixed.start < last and mixed.end <= self._until(first.start, LONGEST):
                last = max(last, mixed.end)
                looks.append(mixed)
        best = min(looks, key=lambda mixed: (mixed.part, mixed.off))
        return ((first.start, last) if best.part else (best.start, best.end)), last

    def _is_same(self, before: int, after: int) -> bool:
        """Whether a gradual change ends where it began, but for the camera's motion, or is gone again."""
        before, after = max(0, before), min(after, self.count - 1)
        same = is_kept_by_camera(self.recent[before][0], self.recent[after][0], self.options.same)
        return same or self._is_covered(before, after)

    def _fade(self, valley: Valley) -> Stretch | None:
        """Return a flat stretch as [start of the fall, end of the rise); the rise if it is a scene of its own."""
        start, end, before = valley
        fall, rise = self._fall(start, end), self._rise(start, end)
        if fall is None or rise is None or kept(before[0], self.recent[rise][0]) >= self.options.same:
            return None
        if self._is_short(start, end):
            return None if self._is_same(fall - 1, rise) else (fall, rise)
        return end, max(rise, end + 1)

    def _fall(self, start: int, end: int) -> int | None:
        """Return the first frame that is darker on the way into a flat stretch; None if that is no valley.

        Fades are even: they began as long before half of the contrast was left as all of it was lost after that.
        """
        since = self._since(start, self.options.fade)
        before = np.array(self.contrasts[since:start])
        if min(self.contrasts[start:end]) > self.options.dark * before.max():
            return None
        half = since + int(np.flatnonzero(before >= before.max() / 2)[-1]) + 1
        return max(since, 2 * half - start)

    def _rise(self, start: int, end: int) -> int | None:
        """Return the first frame that is as bright as later, likewise."""
        until = self._until(end, self.options.fade)
        after = np.array(self.contrasts[end : until + 1])
        if min(self.contrasts[start:end]) > self.options.dark * after.max():
            return None
        half = end + int(np.flatnonzero(after >= after.max() / 2)[0])
        return min(until, 2 * half - end + 1)


def cuts_of(
    hard: Sequence[int], blends: Sequence[Stretch], gradual: Sequence[Stretch]
) -> tuple[list[int], list[Stretch]]:
    """Return cuts and transitions: a hard cut within a gradual one, as to black and from it, is a part of that."""
    stretches = sorted(gradual)
    starts = [start for start, _ in stretches]

    def alone(cut: int) -> bool:
        at = bisect_right(starts, cut) - 1
        return at < 0 or cut >= stretches[at][1]

    cuts = {*filter(alone, hard), *((start + end) // 2 for start, end in gradual)}
    lasting = [stretch for stretch in gradual if stretch[1] - stretch[0] > 1]
    return sorted(cuts), sorted([blend for blend in blends if alone(blend[1])] + lasting)


def _middle(values: list[float]) -> float:
    """Return the median, the upper one of two."""
    return sorted(values)[len(values) // 2]


def _ramp(shares: np.ndarray) -> tuple[float, float]:
    """Return where the shares of a mixture leave 0 and reach 1.

    From where they pass a quarter and three quarters: dissolves are even, and what moves before or after one shifts
    the ends by little.
    """
    quarter, three_quarters = (int(np.flatnonzero(shares >= level)[0]) for level in (0.25, 0.75))
    low, high = (
        i - (shares[i] - level) / max(1e-6, shares[i] - shares[i - 1])
        for i, level in ((quarter, 0.25), (three_quarters, 0.75))
    )
    return low - (high - low) / 2, high + (high - low) / 2
