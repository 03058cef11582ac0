"""Write spans of a video as clips that training reads fast: H.264, a key frame every 16 frames, no B-frames.

A clip shows the same pixels at the same times as its source: display orientation, pixel aspect and colour tags are
kept or applied, and the source's clock is kept, so that a variable frame rate stays variable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.files import beside
from opensora_repro.data.scenes import Scan, Span
from opensora_repro.data.video import (
    DecodeError,
    PictureConverter,
    average_rate,
    one_scaling_thread,
    open_video,
    orientation,
    pixel_aspect,
)

BT709, LIMITED_RANGE = 1, 1  # codes of H.273 and of ffmpeg
GOP = 16  # frames between key frames: what a random read decodes in vain at most


def cut_clips(
    path: str | Path,
    scan: Scan,
    clips: Sequence[tuple[Span, Path]],
    *,
    crf: int = 18,
    on_frame: Callable[[], Any] = int,
) -> None:
    """Write the spans (ascending, disjoint) in one pass over the source; a name appears once its clip is verified.

    `crf` is x264's quality: 18 is visually lossless, 23 half the size. Raises DecodeError.
    """
    waiting = list(clips)
    writer: ClipWriter | None = None
    try:
        with open_video(path, threads=0) as (container, stream):
            to_plain = PlainFrames(path, stream)
            for position, frame in enumerate(container.decode(stream)):
                if not waiting:
                    break
                on_frame()
                span, target = waiting[0]
                if position < span.start:
                    continue
                plain = to_plain(frame)
                if writer is None:
                    rate = average_rate(scan.times[span.start : span.end], scan.time_base)
                    writer = ClipWriter(target, plain, scan.time_base, rate, crf)
                writer.add(plain, scan.times[position] - scan.times[span.start])
                if position == span.end - 1:
                    writer.finish(len(span))
                    writer = None
                    del waiting[0]
    finally:
        if writer is not None:
            writer.discard()
    if waiting:
        raise DecodeError(f"{path}: the second reading ended before frame {waiting[0][0].end}")


class PlainFrames:
    """Decoded frames to upright yuv420p of even size and square pixels, without a detour through RGB where possible."""

    def __init__(self, path: str | Path, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        self.plain = pixel_aspect(stream) == 1
        self.to_picture = PictureConverter(path, stream, None)
        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None

    def __call__(self, frame: Any) -> Any:
        import av

        self.size = self.size or (frame.height, frame.width)
        turn = orientation(frame)
        odd = frame.height % 2 or frame.width % 2
        if not self.plain or odd or turn != type(turn)() or (frame.height, frame.width) != self.size:
            picture = self.to_picture(frame)
            height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            return self._from_rgb(frame)
        return self.reformatter.reformat(frame, format="yuv420p", **one_scaling_thread())

    def _from_rgb(self, frame: Any) -> Any:
        """Convert to limited-range BT.709 and say so."""
        from av.video.reformatter import ColorRange, Colorspace

        plain = self.reformatter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation="AREA",
            **one_scaling_thread(),
        )
        plain.colorspace, plain.color_range = BT709, LIMITED_RANGE
        return plain


class ClipWriter:
    """Encode frames beside the final name; `finish` verifies and renames, `discard` removes.

    A full disk and the like raise OSError: they say nothing about the source.
    """

    def __init__(self, target: Path, first: Any, time_base: Fraction, rate: float, crf: int) -> None:
        import av

        self.target = target
        self.unfinished = beside(target)
        self.container = av.open(f"file:{self.unfinished}", "w", format="mp4", options={"movflags": "faststart"})
        options = {"crf": str(crf), "preset": "veryfast", "g": str(GOP), "bf": "0", "sc_threshold": "0"}
        stream = self.container.add_stream("libx264", rate=_encoder_rate(rate), options=options)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        context = stream.codec_context
        context.time_base = self.time_base = time_base
        context.colorspace, context.color_range = first.colorspace, first.color_range
        self.stream = stream

    def add(self, frame: Any, time: int) -> None:
        """Append a frame shown at `time` (in time_base units since the clip's start)."""
        frame.pts, frame.time_base = time, self.time_base
        frame.pict_type = 0  # or the encoder would repeat the source's choice of key frames
        with self._writing():
            self.container.mux(self.stream.encode(frame))

    def finish(self, num_frames: int) -> None:
        """Flush, decode what was written and rename it; DecodeError if it is not `num_frames` long."""
        with self._writing():
            self.container.mux(self.stream.encode(None))
            self.container.close()
        found = count_frames(self.unfinished)
        if found != num_frames:
            self.discard()
            raise DecodeError(f"{self.target}: {found} of {num_frames} frames decode after writing")
        os.replace(self.unfinished, self.target)

    def discard(self) -> None:
        """Close and remove the unfinished file."""
        import av

        with suppress(av.FFmpegError):
            self.container.close()
        self.unfinished.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.FFmpegError as error:
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(self.target)) from error


def count_frames(path: str | Path) -> int:
    """Return how many frames decode; DecodeError if not all do."""
    with open_video(path, threads=0) as (container, stream):
        return sum(1 for _ in container.decode(stream))


def _encoder_rate(rate: float) -> Fraction:
    """The rate that x264 plans with; times come from the frames themselves."""
    return Fraction(rate).limit_denominator(1001) if rate > 0 else Fraction(25)
