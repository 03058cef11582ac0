"""Where a video's scenes change, on exactly the frames that a reader will get, and the spans that follow from it.

The frames come from our own decoder, so that a cut is an index in presentation order, whatever the frame rate does. The
default detector is ours (see shots.py): PySceneDetect's frame scores, which can be chosen instead, compare each picture
with the one before without asking whether it has moved, and so cannot tell similar shots from fast motion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.data.video import (
    DecodeError,
    FrameIndex,
    decoded_frames,
    frame_index,
    one_scaling_thread,
    open_video,
)

if TYPE_CHECKING:
    from opensora_repro.data.split.likeness import Picture, Rows

# Thumbnails do not need the filter that smooths block edges, and H.264 and HEVC spend a quarter of their time on it.
DRAFT = {"skip_loop_filter": "all", "flags2": "+fast"}
PLANES = frozenset(f"yuv{kind}{sampling}p" for kind in ("", "j") for sampling in ("420", "422", "444"))  # 8 bits
BATCH = 64  # thumbnails that the detector gets at once
TOGETHER = 8  # of which so many are made at a time: their rows fit into a core's cache
ANALYSIS_WIDTH = 256  # pixels; wider pictures are reduced, which is also PySceneDetect's default
WINDOW = 3  # frames on either side that a frame's change is compared with
MIN_CHANGE = 8.0  # content score below which nothing is a cut
MIN_SCENE = 4  # frames; a second cut within them is taken for a flash, and the scenes stay together
CONTENT_THRESHOLD = 27.0  # PySceneDetect's default


@dataclass(frozen=True)
class Scan:
    """All frames of a video that decode, and the cuts between them."""

    times: tuple[int, ...]  # presentation times since the first frame, in time_base units, strictly ascending
    time_base: Fraction
    cuts: tuple[int, ...]  # index of each new scene's first frame; in the middle of a dissolve or fade
    transitions: tuple[tuple[int, int], ...] = ()  # frames [start, end) of gradual cuts, where the detector tells

    def seconds(self, frame: int) -> float:
        """Return when a frame appears, in seconds since the first; for the frame after the last, when that one ends."""
        if frame < len(self.times):
            return float(self.times[frame] * self.time_base)
        step = self.times[-1] - self.times[-2] if len(self.times) > 1 else 0
        return float((self.times[-1] + step) * self.time_base)


@dataclass(frozen=True)
class Span:
    """Frames [start, end) of a source; `resplit` if either boundary is a length limit instead of a cut."""

    start: int
    end: int
    resplit: bool = False

    def __len__(self) -> int:
        return self.end - self.start


def scan_video(path: str | Path, *, detector: str = "shots", threshold: float | None = None) -> Scan:
    """Decode a whole video and find its cuts.

    "shots" finds hard cuts, dissolves and fades (see shots.py); its threshold is how many times a cut's residual
    exceeds its neighbours', 1.5 by default. PySceneDetect's two find hard cuts: "content" where the content score (mean
    change of hue, saturation and brightness) reaches the threshold; "adaptive" where the score's ratio to its
    neighbours' mean does, by default at a level that follows from how restless the video is (see `restless_threshold`).
    Raises DecodeError for a file that does not decode to the end.
    """
    metrics = Thumbnails(threshold) if detector == "shots" else _Metrics(detector, threshold)
    with open_video(path) as (container, stream), one_core():
        if detector == "shots":
            stream.codec_context.options = DRAFT
        footage = Footage(path, container, stream)
        metrics.add_all(footage)
    return footage.scan(*metrics.finish())


class Footage:
    """All frames of an open video in presentation order; DecodeError where it is damaged or ends early."""

    def __init__(self, path: str | Path, container: Any, stream: Any) -> None:
        self.path, self.container, self.stream = path, container, stream
        self.index = frame_index(path)
        self.time_base, self.rate = Fraction(stream.time_base), Fraction(stream.average_rate or 25)
        self.times: list[int | None] = []

    def __iter__(self) -> Iterator[Any]:
        import av

        try:
            for frame in decoded_frames(self.container, self.stream):
                if frame.is_corrupt:
                    raise DecodeError("")
                self.times.append(frame.pts)
                yield frame
        except (DecodeError, av.FFmpegError) as error:
            raise DecodeError(f"{self.path}: {self.index.ended_early(len(self.times))}") from error
        _check_complete(self.path, self.times, self.index)

    def has_clock(self) -> bool:
        """Whether the newest frame's time is known and after the one before."""
        newest, before = self.times[-1], self.times[-2] if len(self.times) > 1 else None
        return newest is not None and (len(self.times) == 1 or (before is not None and before < newest))

    def scan(self, cuts: tuple[int, ...], transitions: tuple[tuple[int, int], ...]) -> Scan:
        """Return what the frames seen and their cuts make up."""
        time_base = self.time_base
        known = [t for t in self.times if t is not None]
        steady = self.index.times and len(known) == len(self.times)
        if not steady or any(b <= a for a, b in pairwise(known)):
            # no usable clock, or one that starts anew where segments were joined: evenly at the header's rate
            known, time_base = list(range(len(self.times))), 1 / self.rate
        return Scan(tuple(t - known[0] for t in known), time_base, cuts, transitions)


def restless_threshold(ratios: np.ndarray) -> float:
    """Return the adaptive ratio above which a frame is a cut.

    Evenly moving pictures keep their ratios near 1, so a faint cut stands out at little above 2; hand-held cameras,
    fast action and repeated frames spread them, and the level rises with their upper quartile.
    """
    if not len(ratios):
        return 3.0
    return float(np.clip(1.9 + 4.0 * (np.quantile(ratios, 0.75) - 1.0), 2.1, 3.5))


def plan_spans(
    num_frames: int,
    cuts: Sequence[int],
    *,
    min_frames: int = 1,
    max_frames: int = 0,
    transitions: Sequence[tuple[int, int]] = (),
    trim: int | None = None,
) -> list[Span]:
    """Return the scenes, those longer than `max_frames` (0: no limit) divided.

    Evenly; or, where even parts would be shorter than `min_frames`, into parts of `max_frames` and a rest. With `trim`,
    the frames of `transitions` belong to no scene, nor do so many frames on either side of any cut.
    """
    edges = [(0, 0), *gaps(cuts, transitions, trim), (num_frames, num_frames)]
    spans = []
    for (_, start), (end, _) in pairwise(edges):
        if end <= start:
            continue  # trimmed away
        length = end - start
        parts = -(-length // max_frames) if max_frames else 1
        inner = [start + length * i // parts for i in range(parts + 1)]
        if parts > 1 and length // parts < min_frames:
            inner = [*range(start, end, max_frames), end]
        spans += [Span(a, b, parts > 1) for a, b in pairwise(inner)]
    return spans


def gaps(cuts: Sequence[int], transitions: Sequence[tuple[int, int]], trim: int | None) -> list[tuple[int, int]]:
    """Return (end of the scene before, start of the scene after) for each cut; both arguments are in order."""
    if trim is None:
        return [(cut, cut) for cut in cuts]
    gaps, remaining = [], deque(transitions)
    for cut in cuts:
        while remaining and remaining[0][1] < cut:
            remaining.popleft()
        start, end = remaining[0] if remaining and remaining[0][0] <= cut else (cut, cut)
        gaps.append((max(0, start - trim), end + trim))
    return gaps


@contextmanager
def one_core() -> Iterator[None]:
    """Keep OpenCV to one thread: dividing such small pictures among more costs more than it saves."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


class Thumbnails:
    """Our own detector, fed with decoded frames."""

    def __init__(self, threshold: float | None) -> None:
        from av.video.reformatter import VideoReformatter

        from opensora_repro.data.split.shots import ShotDetector, ShotOptions

        self.detector = ShotDetector(ShotOptions() if threshold is None else ShotOptions(ratio=threshold))
        self.reformatter = VideoReformatter()

    def add_all(self, frames: Iterable[Any]) -> None:
        """Take thumbnails of some frames, then look at them: by turns, decoder and detector lose their caches."""
        pictures = self._pictures(map(self._sampled, frames))
        while batch := list(islice(pictures, BATCH)):
            for picture, time in batch:
                self.detector.add(picture, time)

    def add(self, frame: Any) -> None:
        self.add_all([frame])

    def _pictures(self, frames: Iterator[tuple[Rows, float | None]]) -> Iterator[tuple[Picture, float | None]]:
        from opensora_repro.data.split.likeness import thumbnails

        while some := list(islice(frames, TOGETHER)):
            yield from zip(thumbnails([rows for rows, _ in some]), (time for _, time in some), strict=True)

    def _sampled(self, frame: Any) -> tuple[Rows, float | None]:
        from opensora_repro.data.split.likeness import sampled

        time = frame.time
        if frame.format.name not in PLANES:
            frame = self.reformatter.reformat(
                frame, width=256, height=144, format="yuv420p", interpolation="AREA", **one_scaling_thread()
            )
        return sampled([_plane(plane) for plane in frame.planes]), time

    def finish(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        shots = self.detector.finish()
        return shots.cuts, shots.transitions


def _plane(plane: Any) -> np.ndarray:
    """Return a plane's pixels, uint8 [height, width], without a copy."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]


class _Metrics:
    """PySceneDetect's content score and adaptive ratio of every frame."""

    def __init__(self, name: str, threshold: float | None) -> None:
        from av.video.reformatter import VideoReformatter
        from scenedetect import StatsManager
        from scenedetect.detectors import AdaptiveDetector

        self.detector = AdaptiveDetector(window_width=WINDOW, min_content_val=MIN_CHANGE, min_scene_len=1)
        self.detector.stats_manager = self.stats = StatsManager()
        self.name, self.threshold = name, threshold
        self.reformatter = VideoReformatter()
        self.stamps: list[Any] = []

    def add_all(self, frames: Iterable[Any]) -> None:
        for frame in frames:
            self._add(frame)

    def _add(self, frame: Any) -> None:
        factor = max(1, frame.width // ANALYSIS_WIDTH)
        width, height = frame.width // factor, max(1, frame.height // factor)
        small = self.reformatter.reformat(
            frame, width=width, height=height, format="bgr24", interpolation="AREA", **one_scaling_thread()
        )
        self.stamps.append(_stamp(len(self.stamps)))
        self.detector.process_frame(self.stamps[-1], small.to_ndarray())

    def finish(self) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Return the cuts, and no gradual ones."""
        detector, threshold = self.name, self.threshold
        scores, ratios = self._column("content_val"), self._column(self.detector.get_metrics()[-1])
        if detector == "content":
            found = scores >= (CONTENT_THRESHOLD if threshold is None else threshold)
        else:
            level = restless_threshold(ratios[~np.isnan(ratios)]) if threshold is None else threshold
            found = (ratios >= level) & (scores >= MIN_CHANGE)
        cuts: list[int] = []
        for frame in np.flatnonzero(found).tolist():
            if frame >= (cuts[-1] if cuts else 0) + MIN_SCENE:
                cuts.append(frame)
        return tuple(cuts), ()

    def _column(self, name: str) -> np.ndarray:
        """Return a metric of every frame, NaN where it has none (the first and the last ones)."""
        values = (self.stats.get_metrics(stamp, [name])[0] for stamp in self.stamps)
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _stamp(frame: int) -> Any:
    """PySceneDetect's name of a frame: an object from 0.7 on, a number before."""
    import scenedetect

    if tuple(int(part) for part in scenedetect.__version__.split(".")[:2]) < (0, 7):
        return frame
    return scenedetect.FrameTimecode(frame, 25.0)  # the rate is arbitrary: nothing here is measured in seconds


def _check_complete(path: str | Path, times: list[int | None], index: FrameIndex) -> None:
    """Raise DecodeError if the header promises more than the file holds, or frames went missing after the first."""
    if not times:
        raise DecodeError(f"{path}: no frame decodes")
    reason = index.damage_of(times)
    if index.promised > index.num_packets:
        reason = index.ended_early(len(times))
    if reason:
        raise DecodeError(f"{path}: {reason}")
