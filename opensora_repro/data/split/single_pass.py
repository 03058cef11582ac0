"""Find a video's cuts and write its clips while decoding it once.

Frames wait until the detector has settled what lies before them (some two seconds), then go to the encoder of their
scene, which is closed where the scene ends. What takes a whole scene before its first frame can be written, such as
dividing it evenly, is left to `cut_clips`, which decodes a second time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opensora_repro.data.split.cut import ClipWriter, Encoding, PlainFrames, clip_rate
from opensora_repro.data.split.scenes import Footage, Scan, Span, Thumbnails, gaps, one_core
from opensora_repro.data.video import DecodeError, open_video
from opensora_repro.files import remove_file

if TYPE_CHECKING:
    from opensora_repro.data.split.shots import ShotDetector

ROOM = 512 * 2**20  # bytes that frames waiting for the detector may take


@dataclass(frozen=True)
class SceneOptions:
    """What becomes of the scenes: how they are written, and see `scan_video` and `plan_spans`."""

    encoding: Encoding = field(default_factory=Encoding)
    threshold: float | None = None
    min_frames: int = 1
    trim: int | None = None


def scan_and_cut(path: str | Path, name: Callable[[Span], Path], options: SceneOptions) -> Scan | None:
    """Write each scene of at least `min_frames` to the `name` of its span; return the scan with their cuts.

    None where one pass is not enough: clips are wanted at another rate, with sound or copied, the waiting frames would
    take more than ROOM, or the file has no usable clock. Raises DecodeError. In both cases no clip is left.
    """
    encoding = options.encoding
    if encoding.fps is not None or encoding.audio or encoding.copy:
        return None
    metrics = Thumbnails(options.threshold)
    with open_video(path) as (container, stream), one_core():
        footage = Footage(path, container, stream)
        if reason := footage.index.damage():
            raise DecodeError(f"{path}: {reason}")
        if not footage.index.times:
            return None
        plain = PlainFrames(path, stream, encoding.short_side)
        scenes = Scenes(footage, name, options, plain)
        try:
            for frame in footage:
                metrics.add(frame)
                picture = plain(frame)
                if not footage.has_clock() or picture.width * picture.height * 3 // 2 * len(scenes.waiting) > ROOM:
                    scenes.discard()
                    return None
                scenes.waiting.append(picture)
                scenes.write(metrics.detector)
            scan = footage.scan(*metrics.finish())
            scenes.write(metrics.detector)
            scenes.close(len(scan.times))
        except BaseException:
            scenes.discard()
            raise
    return scan


class Scenes:
    """Frames on their way into the clips of their scenes."""

    def __init__(
        self, footage: Footage, name: Callable[[Span], Path], options: SceneOptions, plain: PlainFrames
    ) -> None:
        self.footage, self.name, self.options, self.plain = footage, name, options, plain
        self.waiting: deque[Any] = deque()
        self.position = 0  # of the first waiting frame
        self.begin = 0  # of the scene that is being written or comes next
        self.gaps: deque[tuple[int, int]] = deque()  # between the scenes ahead: end of one, begin of the next
        self.num_found = self.num_passed = 0
        self.writer: ClipWriter | None = None
        self.written: list[Path] = []

    def write(self, detector: ShotDetector) -> None:
        """Encode the frames for which the detector has settled the scene."""
        if detector.num_found != self.num_found:
            self.num_found = detector.num_found
            self.gaps = deque(gaps(detector.cuts[self.num_passed :], detector.transitions, self.options.trim))
        settled = detector.settled()
        until = settled if settled == detector.count else settled - (self.options.trim or 0)
        while self.position < until:
            while self.gaps and self.gaps[0][0] <= self.position:
                end, begin = self.gaps.popleft()
                self.num_passed += 1
                self.close(end)
                self.begin = max(self.begin, begin)
            frame = self.waiting.popleft()
            if self.position >= self.begin:
                self._encode(frame)
            self.position += 1

    def _encode(self, frame: Any) -> None:
        times = cast(list[int], self.footage.times)
        if self.writer is None:
            time_base = self.footage.time_base
            rate = clip_rate(times, self.begin, time_base)
            unnamed = self.name(Span(self.begin, self.begin))
            self.writer = ClipWriter(unnamed, frame, time_base, rate, self.options.encoding, self.plain.chroma)
        self.writer.add(frame, times[self.position] - times[self.begin])

    def close(self, end: int) -> None:
        """Finish the clip that is being written, or leave it out if it is too short."""
        if self.writer is None:
            return
        span = Span(self.begin, end)
        if len(span) < self.options.min_frames:
            self.writer.discard()
        else:
            self.writer.finish(self.name(span))
            self.written.append(self.name(span))
        self.writer = None

    def discard(self) -> None:
        """Remove all that was written."""
        if self.writer is not None:
            self.writer.discard()
        for path in self.written:
            remove_file(path)
