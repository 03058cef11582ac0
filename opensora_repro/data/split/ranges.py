"""A long video looked at and cut in ranges, by several workers, with the result of one worker that does all of it.

A range begins at a key frame, and is decoded from some seconds before it on, its lead. Where it begins, the detector's
state is compared with the one in which the range before ended: all that later decisions depend on. Where both are the
same, the ranges' cuts are those of a single pass, one by one. Where they are not, as after a picture that has been
black for long, the range is looked at again with a longer lead, in the end with all that is before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.split.cut import PlainFrames
from opensora_repro.data.split.scenes import DRAFT, Scan, Thumbnails, one_core
from opensora_repro.data.split.shots import JITTER, STRIDE, cuts_of
from opensora_repro.data.split.single_pass import ROOM
from opensora_repro.data.video import FrameIndex, frame_index, frames_from, open_video

RANGES = 4  # of the shortest video that is shared
LEAD, LONGER = 12.0, 6.0  # seconds before a range, and how many times as many where they were too few


@dataclass(frozen=True)
class RangeShots:
    """What a range adds to a video's cuts, in frames of the video, and the detector's state where it begins and ends.

    `alone`: why the video is to be done in one piece; "" where it need not be.
    """

    hard: list[int]
    blends: list[list[int]]
    gradual: list[list[int]]
    begun: str = ""
    ended: str = ""
    alone: str = ""
    size: list[int] | None = None  # of all pictures, height and width


def plan_ranges(path: Path, seconds: float) -> list[int]:
    """Return the first frames of a video's ranges, a quarter of so many seconds each or a little more.

    One, where it is shorter or has to stay whole: a damaged one, or one whose packets do not tell when its frames are
    shown. Raises DecodeError.
    """
    index = frame_index(path)
    starts, base = [0], index.time_base
    shared = bool(index.times) and (index.times[-1] - index.times[0]) * base >= seconds
    if shared and not index.damage() and not index.joined:
        least = seconds / RANGES / base
        for key, time in enumerate(index.key_times):
            if min(time - index.times[starts[-1]], index.times[-1] - time) >= least:
                starts.append(index.key_position(key))
    return starts


def scan_range(
    path: Path, start: int, end: int | None, *, lead: float, threshold: float | None, whole: bool, short_side: int
) -> RangeShots:
    """Find the cuts of frames [start, end) as a single pass would come to them; `end` None: of all from `start` on.

    `whole`: as the pass that writes clips meanwhile, which decodes without `DRAFT` and holds frames of so many pixels.
    """
    index = frame_index(path)
    first = bisect_left(index.times, index.times[start] - lead / index.time_base) if start else 0
    metrics, sizes, held = Thumbnails(threshold), set[tuple[int, int]](), 0
    detector, begun, before = metrics.detector, "", (0, 0, 0)
    with open_video(path) as (container, stream), one_core():
        if not whole:
            stream.codec_context.options = DRAFT
        plain = PlainFrames(path, stream, short_side)
        for position, frame in frames_from(path, container, stream, first):
            if not detector.count:
                first = position
                detector.next_look = _next_look(index, first)
                pixels = plain(frame).width * plain(frame).height
            if position == start:
                begun, before = detector.state(first), _lengths(detector)
            if position == end:
                break
            metrics.add(frame)
            sizes.add((frame.height, frame.width))
            if position >= start:
                held = max(held, detector.count - detector.settled())
    ended = detector.state(first) if end is not None else ""
    if end is None:
        detector.finish()
    alone = "its pictures change their size" if len(sizes) > 1 else ""
    if whole and held * pixels * 3 // 2 > ROOM:
        alone = "one pass cannot hold so large pictures"
    return RangeShots(
        [first + cut for cut in detector.hard[before[0] :]],
        [[first + a, first + b] for a, b in detector.blends[before[1] :]],
        [[first + a, first + b] for a, b in detector.gradual[before[2] :]],
        begun if start else "",
        ended,
        alone,
        list(sizes.pop()) if sizes else None,
    )


def _lengths(detector: Any) -> tuple[int, int, int]:
    return len(detector.hard), len(detector.blends), len(detector.gradual)


def _next_look(index: FrameIndex, first: int) -> float:
    """When a detector that began with the video would look for its next dissolve, had it decided all before a frame."""
    due, base = 0.0, float(index.time_base)
    for time in index.times[:first]:
        if time * base >= due - JITTER:
            due = time * base + STRIDE
    return due


def unlike_before(ranges: Sequence[RangeShots]) -> list[int]:
    """Return the numbers of the ranges that did not begin as the one before ended."""
    return [number for number in range(1, len(ranges)) if ranges[number].begun != ranges[number - 1].ended]


def joined(ranges: Sequence[RangeShots]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return a video's cuts and transitions from those of all of its ranges; see `Scan`."""
    hard = [cut for part in ranges for cut in part.hard]
    blends, gradual = ([(a, b) for part in ranges for a, b in getattr(part, kind)] for kind in ("blends", "gradual"))
    return cuts_of(hard, blends, gradual)


def scan_of(path: Path, cuts: Sequence[int], transitions: Sequence[Sequence[int]]) -> Scan:
    """Return what `scan_video` would, of a video whose cuts are known."""
    index = frame_index(path)
    times = tuple(time - index.times[0] for time in index.times)
    return Scan(times, index.time_base, tuple(cuts), tuple((start, end) for start, end in transitions))
