"""Exactly the frames that are asked for, from any file PyAV can open.

Frame i is the i-th frame that is shown, whatever the frame rate does and wherever the clock starts: what an edit list
hides does not count, nor what lies before the first frame that decodes. A pass over the packets lists the presentation
times (nothing is decoded but the head of a stream that begins between key frames); a read then seeks to the key frame
before the first wanted frame, and again wherever another one lies between two wanted ones, and decodes forward what the
wanted frames need, checking every decoded time against that list. Where packets carry no usable times, or the list and
the decoder disagree, frames are counted from the start of the file instead.

Frames come out as a player shows them: the display matrix (rotation, mirroring) and the pixel aspect are applied, a
mirrored or rotated EXIF orientation of a picture too; HDR is tone-mapped (see color.py). Interlaced frames are returned
woven, as stored.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.data.color import to_rgb
from opensora_repro.data.h264 import FieldPairs, is_spare, length_size_of
from opensora_repro.errors import UserError
from opensora_repro.storage.addresses import OBJECTS, address_of
from opensora_repro.storage.scratch import fetched

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
DEFAULT, ATTACHED_PICTURE = 0x1, 0x400  # ffmpeg's AV_DISPOSITION_DEFAULT, _ATTACHED_PIC: cover art is not the video
# Seconds between two frames of an MPEG-TS from which on its clock was set anew: what ffmpeg takes for that, and where
# segments were joined the longest time without a time stamp that the standard allows (ISO/IEC 13818-1, 2.7.4).
CLOCK_GAP, JOINED_GAP = 10.0, 0.7
PROGRESSIVE = 1  # ffmpeg's AV_FIELD_PROGRESSIVE
MAX_STREAMS = 16
LISTS = frozenset(("concat", "hls", "dash", "imf"))  # ffmpeg's formats of texts that name other files
WORTH_A_SEEK = 2  # frames before a key frame that nobody wants: fewer are sooner decoded than passed over
Size = tuple[int, int]  # height, width


class DecodeError(UserError):
    """A file, or a part of it, cannot be read; the message is one line with the path and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. `num_frames` counts presented frames; `fps` is their average rate, 0 for an image."""

    num_frames: int
    fps: float
    height: int  # as displayed, in square pixels
    width: int


@dataclass(frozen=True)
class FrameIndex:
    """Presentation times (in time-base units, ascending) and key frames of a stream, from its packets.

    A header's count of frames is no promise: an edit list hides some, and recorders leave some out. Promised are the
    packets that the file's own table places at some bytes, and the whole of an AVI that ends before its size.
    """

    times: tuple[int, ...]  # empty where packets have no usable times
    key_times: tuple[int, ...]
    key_seeks: tuple[int, ...]  # where to seek for each key frame: its decoding time
    num_packets: int
    promised: int  # packets that should be there, 0 if the file does not say
    broken: tuple[int, ...] = ()  # numbers, in decoding order, of packets that have lost bytes
    joined: bool = False  # segments of MPEG-TS one after the other: only decoding tells whether all is there
    time_base: Fraction = Fraction(1)  # seconds a unit

    def damage(self, more_broken: Collection[int] = ()) -> str:
        """Return what the packets show to be wrong, "" if nothing; `more_broken` as `broken`, found otherwise."""
        if self.promised > self.num_packets:
            return f"damaged: holds {self.num_packets} of {self.promised} frames"
        broken = {*self.broken, *more_broken}
        if not broken:
            return ""
        return (
            f"damaged: {len(broken)} of {self.num_packets} frames are broken, the first is number {min(broken) + 1}"
            " as stored"
        )

    def damage_of(self, times: Sequence[int | None]) -> str:
        """Return what the presentation times of all decoded frames show to be wrong, "" if nothing.

        Frames before the first key frame are no loss.
        """
        known = {time for time in times if time is not None}
        one_a_field = len(self.times) in (2 * len(times), 2 * len(times) - 1)  # where no syntax tells second fields
        begin = min(known, default=0)
        lost = [time for time in self.times if known and time > begin and time not in known]
        has_clock = len(known) == len(times)
        if times and not (lost and has_clock and not one_a_field):
            return ""
        return self.ended_early(len(times))

    def runs(self, indices: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Split ascending frames where a seek saves decoding: each part with the key frame to begin at.

        Key frame 0 stands for the start of the file, whatever lies there.
        """
        runs: list[tuple[int, list[int]]] = []
        for frame in indices:
            key = max(0, bisect_right(self.key_times, self.times[frame]) - 1)
            if not runs or self.key_position(key) - runs[-1][1][-1] > WORTH_A_SEEK:
                runs.append((key, []))
            runs[-1][1].append(frame)
        return runs

    def key_position(self, key: int) -> int:
        """Return which frame a key frame is."""
        return bisect_left(self.times, self.key_times[key]) if key else 0

    def key_at(self, time: int) -> int | None:
        """Return which key frame is shown at a time, None if none is."""
        key = bisect_left(self.key_times, time)
        return key if key < len(self.key_times) and self.key_times[key] == time else None

    def ended_early(self, decoded: int) -> str:
        """Return what is wrong with a file of which only so many frames decode."""
        if decoded < (known := max(self.promised, len(self.times))):
            return f"damaged: {decoded} of {known} frames decode"
        return f"damaged: what follows after {decoded} frames does not decode"


@dataclass(frozen=True)
class Orientation:
    """How stored pixels become displayed ones: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an [H, W, C] image; returns a view."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.mirror_x:
            image = image[:, ::-1]
        return image[::-1] if self.mirror_y else image


def read_frames(path: str | Path, *, start: int, count: int, step: int = 1, size: Size | None = None) -> torch.Tensor:
    """Return frames start, start + step, ... as uint8 [count, H, W, 3] in display orientation.

    `size` (height, width): scale the frames, keeping their aspect, to the smallest size that covers it. Raises
    DecodeError if the file cannot be read or ends early.
    """
    return read_frames_at(path, range(start, start + count * step, step), size=size)


def read_frames_at(path: str | Path, indices: Sequence[int], *, size: Size | None = None) -> torch.Tensor:
    """Return the frames of the given strictly ascending indices as uint8 [T, H, W, 3]; see `read_frames`.

    In memory a video's frames are [T, 3, H, W]: what comes after them is fastest so.
    """
    import torch

    return torch.from_numpy(_read_at(path, indices, size))


def read_pictures_at(path: str | Path, indices: Sequence[int], *, size: Size | None = None) -> np.ndarray:
    """Return what `read_frames_at` does as a contiguous array: a process that only looks at pictures needs no torch."""
    return np.ascontiguousarray(_read_at(path, indices, size))


def _read_at(path: str | Path, indices: Sequence[int], size: Size | None) -> np.ndarray:
    if not indices or indices[0] < 0 or any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"frame indices must be non-negative and ascending, got {list(indices)[:8]}")
    if is_image(path):
        if indices[-1] > 0:
            raise DecodeError(_short(path, 1 if indices[0] == 0 else 0, indices, 1))
        return _read_image(path, size)[None]
    index = frame_index(path)
    with open_video(path, by_header=True) as (container, stream):
        if index.times and indices[-1] >= len(index.times):
            available = sum(i < len(index.times) for i in indices)
            raise DecodeError(_short(path, available, indices, len(index.times)))
        to_picture = PictureConverter(path, stream, size)
        pictures = _read_by_time(container, stream, index, indices, to_picture) if index.times else None
    if pictures is None:
        with open_video(path) as (container, stream):
            pictures = _read_by_count(container, stream, indices, to_picture)
    if len(pictures) < len(indices):
        raise DecodeError(_short(path, len(pictures), indices, None))
    return np.stack([picture.transpose(2, 0, 1) for picture in pictures]).transpose(0, 2, 3, 1)


def probe(path: str | Path) -> VideoInfo:
    """Return frame count, average rate and display size; decodes one frame. Raises DecodeError."""
    if is_image(path):
        return VideoInfo(1, 0.0, *_image_size(path))
    with open_video(path) as (container, stream):
        index = frame_index(path)
        frames = decoded_frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise DecodeError(f"{path}: no frame decodes")
        height, width = PictureConverter(path, stream, None).output_size(first)
        rate = average_rate(index.times, stream.time_base) or float(stream.average_rate or 0)
        num_frames = len(index.times) or 1 + sum(1 for _ in frames)
        return VideoInfo(num_frames, rate, height, width)


def average_rate(times: Sequence[int], time_base: Fraction) -> float:
    """Return frames a second over the given presentation times; 0 where they span nothing."""
    span = times[-1] - times[0] if times else 0
    return (len(times) - 1) / float(span * time_base) if span > 0 else 0.0


def is_image(path: str | Path) -> bool:
    """True for a still picture, by its extension: a video of one frame."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def cover_size(height: int, width: int, size: Size) -> Size:
    """Return the smallest (height, width) of the given aspect that covers `size`."""
    scale = max(Fraction(size[0], height), Fraction(size[1], width))
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


@contextmanager
def open_video(path: str | Path, *, by_header: bool = False) -> Iterator[tuple[Any, Any]]:
    """Open a file's video: yields (container, stream) and closes both; PyAV's errors become DecodeError.

    Of several streams it is the default one, then the largest (cover art is none). One thread decodes: training reads
    in many processes, and PyAV 17.1 was seen not to come back from closing several. `by_header`: of MP4, believe the
    header, and do not decode the first frames to learn what it does not say, such as the pixel format.
    """
    import av

    _check_file(path)
    try:
        hurry = _undecoded() if by_header and _is_mp4(path) else {}
        # the prefix keeps ':' or '%' in a name plain
        with av.open(f"file:{os.fspath(path)}", **_any_metadata(), **hurry) as container:
            if container.format.name in LISTS:
                raise DecodeError(f"{path}: is a list of other files, no video")
            streams = [s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE]
            if not streams:
                raise DecodeError(f"{path}: no video stream")
            stream = max(streams, key=_rank)
            if stream.codec_context is None:
                raise DecodeError(f"{path}: no decoder for its video stream")
            stream.thread_type = "SLICE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(f"{path}: cannot be decoded: {reason}") from error


def _is_mp4(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _undecoded() -> dict[str, Any]:
    """Keywords for av.open: one packet of each stream tells enough, and none is decoded, of up to so many streams."""
    return {
        "options": {"analyzeduration": "1", "fpsprobesize": "0"},
        "stream_options": [{"skip_frame": "all"}] * MAX_STREAMS,
    }


def _rank(stream: Any) -> tuple[bool, bool, int]:
    """What the video of a file has more of than its previews and other angles; of equals the first is taken."""
    context = stream.codec_context
    area = context.width * context.height if context else 0
    return context is not None, bool(int(stream.disposition) & DEFAULT), area


def demux(container: Any, stream: Any) -> Iterator[Any]:
    """Read packets from where the container stands; the last one is empty and flushes the decoder.

    PyAV's own iterator never gives back what it holds where it is left before its end and not closed.
    """
    with closing(container.demux(stream)) as packets:
        yield from packets


def decoded_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decode from where the container stands; samples of no bytes, which show nothing new, are passed over."""
    for packet in demux(container, stream):
        if packet.size or packet.dts is None:  # the last one is empty: it flushes the decoder
            yield from packet.decode()


def frames_from(path: str | Path, container: Any, stream: Any, first: int) -> Iterator[tuple[int, Any]]:
    """Yield an open video's frames with their numbers, from the key frame at or before `first` on.

    Raises DecodeError where they do not come at the times that the packets tell.
    """
    index = frame_index(path)
    key = max(0, bisect_right(index.key_times, index.times[first]) - 1)
    position = index.key_position(key)
    packets = _packets_from(container, stream, index, key)
    if packets is None:
        raise DecodeError(f"{path}: frame {position} cannot be found")
    begin = index.times[position]
    for packet in packets:
        if not packet.size and packet.dts is not None:
            continue
        for frame in packet.decode():
            if key and frame.pts is not None and frame.pts < begin:
                continue  # needs what is before the key frame
            if frame.is_corrupt or position == len(index.times) or frame.pts != index.times[position]:
                raise DecodeError(f"{path}: frame {position} is not where its packet says")
            yield position, frame
            position += 1
    if position < len(index.times):
        raise DecodeError(f"{path}: {index.ended_early(position)}")


def frame_index(path: str | Path) -> FrameIndex:
    """Return the file's frame index; kept for recently read files."""
    _check_file(path)
    status = os.stat(path)
    return _index_file(os.fspath(path), status.st_mtime_ns, status.st_size)


def frame_times(path: str | Path) -> np.ndarray:
    """Return when each frame of a video is shown, in seconds from the first on, float64 [N]; none if no clock tells."""
    index = frame_index(path)
    times = np.array(index.times, dtype=np.int64)
    return (times - times[:1]) * float(index.time_base)


@lru_cache(maxsize=64)
def _index_file(path: str, _mtime_ns: int, _size: int) -> FrameIndex:
    with open_video(path, by_header=True) as (container, stream):
        codec, in_segments = stream.codec_context.name, container.format.name == "mpegts"
        keys_known = container.format.name != "avi" or len(stream.index_entries) > 1  # without, all are called so
        fields = FieldPairs(stream.codec_context.extradata if codec == "h264" else None)
        packets = [_entry(packet, codec, fields) for packet in demux(container, stream) if packet.size]
        cut_off = container.format.name == "avi" and _is_cut_off(path)
        promised = stream.frames if cut_off else sum(entry.size > 0 for entry in stream.index_entries)
        time_base = stream.time_base
    broken, joints = _lost_bytes(packets, in_segments)
    times = _shown_times(path, packets)
    longest = (JOINED_GAP if joints else CLOCK_GAP) / time_base
    if in_segments and any(b - a > longest for a, b in pairwise(times)):
        times = []
    keys = [(p.time, p.seek) for p in packets if p.key and p.shown and p.time is not None and p.seek is not None]
    keys = sorted(key for key in keys if times and key[0] >= times[0])
    keys = keys if keys_known else keys[:1]
    return FrameIndex(
        tuple(times), tuple(k for k, _ in keys), tuple(s for _, s in keys), len(packets), promised, broken, joints > 0,
        time_base,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a packet tells without being decoded."""

    time: int | None
    seek: int | None
    key: bool
    shown: bool
    corrupt: bool


def _entry(packet: Any, codec: str, fields: FieldPairs) -> _Entry:
    shown = not fields.is_second(memoryview(packet)) and not packet.is_discard and _is_shown(packet, codec)
    seek = packet.pts if packet.dts is None else packet.dts
    return _Entry(packet.pts, seek, packet.is_keyframe, shown, packet.is_corrupt)


def _is_cut_off(path: str) -> bool:
    """Whether a RIFF file ends before its own size; a chunk's header may be missing, writers differ in that."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8)[4:], "little")
        return os.path.getsize(path) < size < 2**32 - 1


def _lost_bytes(packets: Sequence[_Entry], in_segments: bool) -> tuple[tuple[int, ...], int]:
    """Return the packets that have lost bytes, and how many joints of segments there are.

    MPEG-TS counts its packets, and the demuxer marks a frame (for some codecs the one before) where the count jumps.
    Where a key frame follows, another segment begins there; elsewhere something is missing.
    """
    corrupt = [number for number, packet in enumerate(packets) if packet.corrupt]
    joints = {n for n in corrupt if in_segments and any(after.key for after in packets[n + 1 : n + 3])}
    return tuple(n for n in corrupt if n not in joints), len(joints)


def _shown_times(path: str, packets: Sequence[_Entry]) -> list[int]:
    """Return when each frame that is shown is, ascending; empty if the packets' times cannot tell."""
    latest = float("-inf")
    for packet in packets:
        if packet.shown:
            if packet.time is None or (packet.key and packet.time <= latest):
                return []  # frames before a key frame are shown before it, unless the clock was set back
            latest = max(latest, packet.time)
    times = sorted(p.time for p in packets if p.shown and p.time is not None)
    if any(a == b for a, b in pairwise(times)):
        return []
    first_key = next((p.time for p in packets if p.key), None)
    if packets and (not packets[0].key or (first_key is not None and times and times[0] < first_key)):
        return _from_first_decoded(path, times, first_key)
    return times


def _from_first_decoded(path: str, times: list[int], first_key: int | None) -> list[int]:
    """Return the times of a stream that begins between key frames, without those that need what is not there."""
    decoded: list[int] = []
    with suppress(DecodeError), open_video(path) as (container, stream):
        for frame in decoded_frames(container, stream):
            if frame.pts is None:
                return []
            decoded.append(frame.pts)
            if first_key is None or frame.pts >= first_key:
                break
    return decoded + times[bisect_right(times, decoded[-1]) :] if decoded else times


def _is_shown(packet: Any, codec: str) -> bool:
    """False for VP8's alternate reference frames: packets of their own that no player shows (RFC 6386, 9.1)."""
    return codec != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _read_by_time(
    container: Any, stream: Any, index: FrameIndex, indices: Sequence[int], to_picture: PictureConverter
) -> list[np.ndarray] | None:
    """Seek and decode; None where the decoded times are not the indexed ones."""
    pictures: list[np.ndarray] = []
    for key, run in index.runs(indices):
        packets = _packets_from(container, stream, index, key)
        if packets is None:
            return None
        found = _read_run(packets, stream.codec_context, index, key, run, to_picture)
        if found is None:
            return None
        pictures += found
        if len(found) < len(run):
            break
    return pictures


def _packets_from(container: Any, stream: Any, index: FrameIndex, key: int) -> Iterator[Any] | None:
    """Return the packets from a key frame on, for number 0 from the start of the file; None if no seek leads there.

    MP4 and Matroska find it by its presentation time (MP4 lands a key frame earlier by its decoding time), others by
    its decoding time. Where a seek lands earlier, what lies between is read but not decoded.
    """
    if key == 0:
        return demux(container, stream)
    time = index.key_times[key]
    for target in (time, index.key_seeks[key]):
        container.seek(target, stream=stream, backward=True)
        packets = demux(container, stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts is not None and packet.pts >= time:
                if packet.pts == time:
                    return chain([packet], packets)
                break
    return None


def _read_run(
    packets: Iterator[Any], codec: Any, index: FrameIndex, key: int, run: Sequence[int], to_picture: PictureConverter
) -> list[np.ndarray] | None:
    """Return the pictures of ascending frames, decoded from a key frame on; None as `_read_by_time`.

    Of progressive H.264, pictures that no other one refers to are decoded only where they are wanted, and the last one
    wanted is drained from the decoder instead of pushed out by those that follow.
    """
    position, reached = index.key_position(key), False
    asked_times = {index.times[i] for i in run}
    to_send, sent, pictures = set(asked_times), set(), []
    # PyAV tells the order of fields from 18 on; before, every picture is decoded.
    sparing = codec.name == "h264" and getattr(codec, "field_order", None) == PROGRESSIVE
    length_size = length_size_of(codec.extradata) if sparing else 0
    for packet in packets:
        if not packet.size and packet.dts is not None:
            continue  # shows nothing new; the last one is empty, too: it flushes the decoder
        if sparing and packet.size and packet.pts not in asked_times and is_spare(memoryview(packet), length_size):
            continue
        frames = packet.decode()
        sent.add(packet.pts)
        to_send.discard(packet.pts)
        if sparing and packet.size and not to_send:
            frames += codec.decode(None)
        for frame in frames:
            if frame.pts is None or position == len(index.times) or (sparing and frame.interlaced_frame):
                return None
            while sparing and index.times[position] < frame.pts and index.times[position] not in sent:
                position += 1
            expected = index.times[position]
            if not reached and frame.pts < expected:
                continue  # the seek landed earlier, or these lead the key frame and belong to the scene before it
            if frame.pts != expected:
                return None
            reached = True
            if expected in asked_times:
                pictures.append(to_picture(frame))
                if len(pictures) == len(run):
                    return pictures
            position += 1
        if sparing and packet.size and not to_send:
            return None
    return pictures


def _read_by_count(
    container: Any, stream: Any, indices: Sequence[int], to_picture: PictureConverter
) -> list[np.ndarray]:
    asked, pictures = set(indices), []
    for position, frame in enumerate(decoded_frames(container, stream)):
        if position in asked:
            pictures.append(to_picture(frame))
        if position == indices[-1]:
            break
    return pictures


class PictureConverter:
    """Decoded frames to uint8 RGB [H, W, 3] as displayed, all in the size of the first one."""

    def __init__(self, path: str | Path, stream: Any, size: Size | None) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        self.aspect = pixel_aspect(stream)
        self.size = size
        self.target: Size | None = None
        self._turn: Orientation | None = None
        self.reformatter = VideoReformatter()

    def turn(self, frame: Any) -> Orientation:
        """Return the first frame's orientation, for all: PyAV keeps a frame whose side data were read for long."""
        if self._turn is None:
            self._turn = orientation(frame)
        return self._turn

    def output_size(self, frame: Any) -> Size:
        """Return the (height, width) that `frame` is shown in, scaled to cover `size` if one is set."""
        height, width = frame.height, max(1, round(frame.width * self.aspect))
        if self.turn(frame).transpose:
            height, width = width, height
        return cover_size(height, width, self.size) if self.size else (height, width)

    def __call__(self, frame: Any) -> np.ndarray:
        if frame.is_corrupt:
            raise DecodeError(f"{self.path}: the frame at {frame.time} s is damaged")
        self.target = self.target or self.output_size(frame)
        turn = self.turn(frame)
        height, width = self.target[::-1] if turn.transpose else self.target
        return turn.apply(to_rgb(self.reformatter, frame, height, width))


def _any_metadata() -> dict[str, str]:
    """Keyword for av.open: titles that are not UTF-8 are no reason to refuse a file (PyAV 19 never does)."""
    import av

    return {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}


@lru_cache(maxsize=1)
def one_scaling_thread() -> dict[str, int]:
    """Keyword for PyAV's reformat: from 17 on it would start a thread a core for every small picture."""
    import av

    return {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def pixel_aspect(stream: Any) -> Fraction:
    """Return width / height of one stored pixel; shares outside 1/4..4 are taken for damage and ignored."""
    aspect = stream.sample_aspect_ratio
    aspect = Fraction(aspect.numerator, aspect.denominator) if aspect else Fraction(1)
    return aspect if Fraction(1, 4) <= aspect <= 4 else Fraction(1)


def orientation(frame: Any) -> Orientation:
    """Read the frame's display matrix: right angles and mirrorings; any other matrix is left alone."""
    side_data = frame.side_data
    for i in range(len(side_data)):
        if side_data[i].type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(side_data[i]), dtype=np.int32)[:5].tolist()
            if a == d == 0 and b and c:  # x' = c y, y' = b x
                return Orientation(transpose=True, mirror_x=c < 0, mirror_y=b < 0)
            if b == c == 0 and a and d:
                return Orientation(mirror_x=a < 0, mirror_y=d < 0)
    return Orientation()


def _read_image(path: str | Path, size: Size | None) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3], scaled to cover `size`."""
    from opensora_repro.data.pictures import PictureError, read_picture

    _check_file(path)
    try:
        return read_picture(path, (lambda height, width: cover_size(height, width, size)) if size else None)
    except PictureError as error:
        raise DecodeError(f"{path}: cannot be read as an image: {error}") from error


def _image_size(path: str | Path) -> Size:
    from opensora_repro.data.pictures import PictureError, picture_size

    _check_file(path)
    try:
        return picture_size(path)
    except PictureError as error:
        raise DecodeError(f"{path}: cannot be read as an image: {error}") from error


def _check_file(path: str | Path) -> None:
    path = Path(path)
    try:
        if OBJECTS in os.fspath(path) and address_of(path):
            fetched(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # says nothing about the file
        raise DecodeError(f"{path}: {error.strerror}") from None
    if not path.exists():
        raise DecodeError(f"{path}: {'a link to a file that is not there' if path.is_symlink() else 'no such file'}")
    if path.is_dir():
        raise DecodeError(f"{path}: is a folder")
    if path.stat().st_size == 0:
        raise DecodeError(f"{path}: the file is empty")


def _short(path: str | Path, got: int, indices: Sequence[int], total: int | None) -> str:
    has = f"; it has {total}" if total is not None else ""
    return f"{path}: ends early: {got} of {len(indices)} frames (wanted {indices[0]} to {indices[-1]}{has})"
