"""Write spans of a video as clips that training reads fast: H.264, a key frame every 16 frames, no B-frames.

A clip shows the same pixels at the same times as its source: display orientation, pixel aspect and colour tags are
kept or applied, and the source's clock is kept, so that a variable frame rate stays variable.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.color import BT2020, CENTRED_CHROMA, LEFT_CHROMA, is_hdr, keeps_color, primaries_of, yuv_to_yuv
from opensora_repro.data.split.scenes import DRAFT, Scan, Span
from opensora_repro.data.video import (
    DecodeError,
    Orientation,
    PictureConverter,
    average_rate,
    decoded_frames,
    demux,
    frame_index,
    frames_from,
    open_video,
    orientation,
    pixel_aspect,
)
from opensora_repro.data.write import GOP_SIZE, rgb_to_yuv, steady_options
from opensora_repro.files import beside, put_in_place

TRAINING_SIDE = 256  # pixels
COPYABLE = frozenset(("h264", "hevc", "av1", "vp9"))  # what an mp4 may hold as it is


@dataclass(frozen=True)
class Encoding:
    """How clips are written.

    `short_side` (0: the source's) only ever reduces; `fps` None keeps the source's frame times; `copy` takes packets
    as they are where a span begins and ends at key frames; `fast_decode` leaves out what makes H.264 slow to read.
    """

    crf: int = 18  # x264's quality: 18 is visually lossless, 23 half the size
    preset: str = "veryfast"
    short_side: int = 0
    fps: Fraction | None = None
    audio: bool = False
    copy: bool = False
    fast_decode: bool = False

    @property
    def keeps_frames(self) -> bool:
        return not self.short_side and self.fps is None


def cut_clips(
    path: str | Path, scan: Scan, clips: Sequence[tuple[Span, Path]], how: Encoding, *, seek: bool = False
) -> None:
    """Write the spans (ascending, disjoint) in one pass over the source; a name appears once its clip is verified.

    `seek`: begin at the key frame before the first of them. Raises DecodeError.
    """
    if reason := frame_index(path).damage():
        raise DecodeError(f"{path}: {reason}")
    waiting = [clip for clip in clips if not (how.copy and how.keeps_frames and copy_clip(path, scan, *clip, how))]
    writer: ClipWriter | None = None
    try:
        with open_video(path) as (container, stream):
            to_plain = PlainFrames(path, stream, how.short_side)
            seeks = seek and bool(waiting)
            frames = (
                frames_from(path, container, stream, waiting[0][0].start)
                if seeks
                else enumerate(decoded_frames(container, stream))
            )
            for position, frame in frames:
                if not waiting:
                    break
                span, target = waiting[0]
                if position < span.start:
                    continue
                if writer is None:
                    time_base, shown = frame_times(scan, span, how.fps)
                if writer is None or shown[position - span.start]:
                    plain = to_plain(frame)
                if writer is None:
                    rate = float(how.fps or clip_rate(scan.times, span.start, scan.time_base))
                    writer = ClipWriter(target, plain, time_base, rate, how, to_plain.chroma)
                    writer.add_audio(path, scan, span)
                for time in shown[position - span.start]:
                    writer.add(plain, time)
                if position == span.end - 1:
                    writer.finish()
                    writer = None
                    del waiting[0]
    finally:
        if writer is not None:
            writer.discard()
    if waiting:
        raise DecodeError(f"{path}: the second reading ended before frame {waiting[0][0].end}")


def clip_rate(times: Sequence[int], begin: int, time_base: Fraction) -> float:
    """Return the frames a second that a clip begins with, for the encoder to plan with; 0 where there is one frame."""
    return average_rate(times[begin : begin + GOP_SIZE + 1], time_base)


def frame_times(scan: Scan, span: Span, fps: Fraction | None) -> tuple[Fraction, list[list[int]]]:
    """Return the clip's time base and, for each frame of the span, the times it is written at.

    With `fps`, each tick takes the frame that the source shows at that moment: some frames come twice, others never.
    """
    start = scan.times[span.start]
    if fps is None:
        return scan.time_base, [[time - start] for time in scan.times[span.start : span.end]]
    seconds = [float((time - start) * scan.time_base) for time in scan.times[span.start : span.end]]
    shown: list[list[int]] = [[] for _ in seconds]
    for tick in range(num_written(scan, span, fps)):
        shown[bisect_right(seconds, float(tick / fps) + 1e-6) - 1].append(tick)
    return 1 / fps, shown


def num_written(scan: Scan, span: Span, fps: Fraction | None) -> int:
    """Return how many frames the span's clip has at `fps` (None: those of the source)."""
    if fps is None:
        return len(span)
    return max(1, round((scan.seconds(span.end) - scan.seconds(span.start)) * fps))


def copy_clip(path: str | Path, scan: Scan, span: Span, target: Path, how: Encoding) -> bool:
    """Write a span without decoding it; False where that would not give exactly its frames, upright and square.

    The packets between the key frame that the span begins with and the next one after it (or the file's end) must
    present the span's frames and no others, and the copy must decode to them.
    """
    import av

    index = frame_index(path)
    if not index.times or len(index.times) != len(scan.times) or how.audio:
        return False
    start, offset = index.times[span.start], index.times[0]
    end = index.times[span.end] if span.end < len(index.times) else None
    key = index.key_at(start)
    if key is None or (end is not None and index.key_at(end) is None):
        return False
    unfinished = beside(target)
    try:
        with open_video(path) as (container, stream):
            if stream.codec_context.codec.canonical_name not in COPYABLE or pixel_aspect(stream) != 1:
                return False
            if start > offset:
                container.seek(index.key_seeks[key], stream=stream, backward=True)
            if orientation(next(decoded_frames(container, stream))) != Orientation():
                return False
            container.seek(index.key_seeks[key], stream=stream, backward=True)
            packets = list(_packets_between(container, stream, start, end))
            if sorted(p.pts for p in packets) != list(index.times[span.start : span.end]):
                return False
            with av.open(f"file:{unfinished}", "w", format="mp4", options={"movflags": "faststart"}) as out:
                copied = out.add_stream_from_template(stream, opaque=True)  # no encoder has the name of libdav1d
                for packet in packets:
                    packet.pts, packet.dts = packet.pts - start, packet.dts - start
                    packet.stream = copied
                    out.mux(packet)
        expected = [float((t - start) * scan.time_base) for t in index.times[span.start : span.end]]
        if not np.allclose(decoded_seconds(unfinished), expected, atol=1e-3):
            return False
        put_in_place(unfinished, target)
        return True
    except (DecodeError, av.FFmpegError, ValueError):  # ValueError: not so many frames
        return False
    finally:
        unfinished.unlink(missing_ok=True)


def _packets_between(container: Any, stream: Any, start: int, end: int | None) -> Iterator[Any]:
    """Packets in decoding order from the key frame shown at `start` until the one shown at `end`."""
    begun = False
    for packet in demux(container, stream):
        if not packet.size or packet.pts is None or packet.dts is None:
            continue
        if packet.is_keyframe and packet.pts == end:
            return
        begun = begun or (packet.is_keyframe and packet.pts == start)
        if begun:
            yield packet


def decoded_seconds(path: str | Path) -> list[float]:
    """Return when each frame is shown; DecodeError if not all decode."""
    with open_video(path) as (container, stream):
        stream.codec_context.options = DRAFT
        return [float(frame.pts * frame.time_base) for frame in decoded_frames(container, stream)]


def read_sound(path: str | Path, start: float, end: float) -> tuple[np.ndarray, int] | None:
    """Return float32 samples [channels, N] (one or two) of [start, end) in the file's own seconds, and their rate.

    None for a file without sound; silence where it has none.
    """
    import av

    with open_video(path) as (container, _):
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        rate, channels = stream.rate, min(2, stream.channels)
        sound = np.zeros((channels, max(1, round((end - start) * rate))), np.float32)
        resampler = av.AudioResampler(format="fltp", layout="mono" if channels == 1 else "stereo", rate=rate)
        container.seek(int(max(0.0, start - 0.5) / stream.time_base), stream=stream, backward=True)
        for frame in decoded_frames(container, stream):
            if frame.pts is None or frame.time >= end:
                break
            at = round((frame.time - start) * rate)
            for part in resampler.resample(frame):
                samples = part.to_ndarray()[:, max(0, -at) :]
                begin = max(0, at)
                stop = min(sound.shape[1], begin + samples.shape[1])
                if stop > begin:
                    sound[:, begin:stop] = samples[:, : stop - begin]
                at += part.samples
        return sound, rate


class PlainFrames:
    """Decoded frames to upright yuv420p of even size and square pixels, without a detour through RGB where possible.

    All three colour tags are kept, or set where they are missing: a reduced clip must not be taken for another matrix
    than its source. RGB, HDR (tone-mapped) and full range become BT.709 of limited range.
    """

    def __init__(self, path: str | Path, stream: Any, short_side: int = 0) -> None:
        from av.video.reformatter import VideoReformatter

        self.plain = pixel_aspect(stream) == 1
        self.left_chroma = stream.codec_context.codec.canonical_name in LEFT_CHROMA
        self.short_side = short_side
        self.to_picture = PictureConverter(path, stream, None)
        self.reformatter = VideoReformatter()
        self.size: tuple[int, int] | None = None  # of the first frame as stored, (height, width)
        self.whole = self.written = (0, 0)  # even sizes as displayed: the source's, and the clip's
        self.chroma = ""  # for x264: where the clips' chroma lies, from the first frame on

    def __call__(self, frame: Any) -> Any:
        direct = self.plain and keeps_color(frame) and not (frame.height % 2 or frame.width % 2)
        direct = direct and self.to_picture.turn(frame) == Orientation()
        if self.size is None:
            height, width = self.to_picture.output_size(frame)
            self.size, self.whole = (frame.height, frame.width), (height // 2 * 2, width // 2 * 2)
            self.written = self._reduced(*self.whole)
            untouched = direct and self.written == self.whole and frame.format.name == "yuv420p"
            self.chroma = "" if untouched and self.left_chroma else CENTRED_CHROMA
        changed = (frame.height, frame.width) != self.size
        if direct and not changed:
            return yuv_to_yuv(self.reformatter, frame, *self.written)
        if changed or self.written != self.whole:
            self.to_picture.target = self.written
        return self._through_rgb(frame)

    def _through_rgb(self, frame: Any) -> Any:
        import av

        height, width = self.written
        picture = np.ascontiguousarray(self.to_picture(frame)[:height, :width])
        yuv = rgb_to_yuv(self.reformatter, av.VideoFrame.from_ndarray(picture, format="rgb24"), height, width)
        if primaries_of(frame) == BT2020 and not is_hdr(frame):
            yuv.color_primaries = BT2020  # wide colours that nothing has mapped
        return yuv

    def _reduced(self, height: int, width: int) -> tuple[int, int]:
        """Return the written size: even, its short side at most `short_side`."""
        scale = min(1.0, self.short_side / min(height, width)) if self.short_side else 1.0
        return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


class ClipWriter:
    """Encode frames beside the final name; `finish` verifies and renames, `discard` removes.

    One thread encodes: more would cost more in all, and the clip's bytes would depend on the machine. A full disk and
    the like raise OSError: they say nothing about the source.
    """

    def __init__(
        self, target: Path, first: Any, time_base: Fraction, rate: float, how: Encoding, chroma: str = ""
    ) -> None:
        import av

        self.target = target
        self.unfinished = beside(target)
        self.container = av.open(f"file:{self.unfinished}", "w", format="mp4", options={"movflags": "faststart"})
        options = {"crf": str(how.crf), "preset": how.preset, "g": str(GOP_SIZE), "bf": "0", "sc_threshold": "0"}
        options |= steady_options(*[chroma] * bool(chroma))
        if how.fast_decode:
            options["tune"] = "fastdecode"
        # What x264 plans with; times come from the frames themselves.
        planned = Fraction(rate).limit_denominator(1001) if rate > 0 else Fraction(25)
        stream = self.container.add_stream("libx264", rate=planned, options=options)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        context.time_base = self.time_base = time_base
        context.colorspace, context.color_range = first.colorspace, first.color_range
        context.color_primaries, context.color_trc = first.color_primaries, first.color_trc
        self.stream = stream
        self.with_audio = how.audio
        self.times: list[int] = []

    def add_audio(self, path: str | Path, scan: Scan, span: Span) -> None:
        """Append the span's sound as AAC, if it is wanted and there is any; to be called before `add`."""
        import av

        index = frame_index(path)
        origin = float(index.times[0] * scan.time_base) if index.times else 0.0
        limits = (origin + scan.seconds(span.start), origin + scan.seconds(span.end))
        sound = read_sound(path, *limits) if self.with_audio else None
        if sound is None:
            return
        samples, rate = sound
        layout = "mono" if len(samples) == 1 else "stereo"
        with self._writing():
            stream = self.container.add_stream("aac", rate=rate, layout=layout)
            for at in range(0, samples.shape[1], 1024):
                part = np.ascontiguousarray(samples[:, at : at + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, at, Fraction(1, rate)
                self.container.mux(stream.encode(frame))
            self.container.mux(stream.encode(None))

    def add(self, frame: Any, time: int) -> None:
        """Append a frame shown at `time` (in time_base units since the clip's start)."""
        frame.pts, frame.time_base = time, self.time_base
        self.times.append(time)
        frame.pict_type = 0  # or the encoder would repeat the source's choice of key frames
        with self._writing():
            self.container.mux(self.stream.encode(frame))

    def finish(self, target: Path | None = None) -> None:
        """Flush, verify and rename (to `target` where the clip's name was not known before); DecodeError if damaged."""
        with self._writing():
            self.container.mux(self.stream.encode(None))
            self.container.close()
        wrong = fault(self.unfinished, [float(time * self.time_base) for time in self.times])
        if wrong:
            self.discard()
            raise DecodeError(f"{target or self.target}: {wrong} after writing")
        put_in_place(self.unfinished, target or self.target)

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


def fault(path: Path, seconds: Sequence[float]) -> str:
    """Return what is wrong with a clip that should show a frame at each of `seconds`, "" if nothing is.

    Every frame must be there, at its time, and every key frame must decode. The frames between are not decoded again:
    the encoder made them just now, and what a disk or a crash does to a file shows in the rest.
    """
    expected = -(-len(seconds) // GOP_SIZE)
    with open_video(path) as (container, stream):
        found = [float(time * stream.time_base) for time in frame_index(path).times]
        if len(found) != len(seconds):
            return f"{len(found)} of {len(seconds)} frames are there"
        if not np.allclose(found, seconds, atol=1e-3):
            return "frames are at other times"
        stream.codec_context.skip_frame = "NONKEY"
        stream.codec_context.options = DRAFT
        keys = sum(not frame.is_corrupt for frame in decoded_frames(container, stream))
    return "" if keys == expected else f"{keys} of {expected} key frames decode"
