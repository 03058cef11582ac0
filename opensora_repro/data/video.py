"""Exactly the frames that are asked for, from any file PyAV can open.

Frame i is the i-th frame in presentation order, whatever the frame rate does and wherever the clock starts. A pass over
the packets (no decoding) lists the presentation times; a read then seeks to the key frame before the first wanted frame
and decodes forward, checking every decoded time against that list. Where packets carry no usable times, or the list and
the decoder disagree, frames are counted from the start of the file instead.

Frames come out as a player shows them: the display matrix (rotation, mirroring) and the pixel aspect are applied, a
mirrored or rotated EXIF orientation of a picture too. Interlaced frames are returned woven, as stored.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
ATTACHED_PICTURE = 0x400  # ffmpeg's AV_DISPOSITION_ATTACHED_PIC: cover art is not the video
Size = tuple[int, int]  # height, width


class DecodeError(ValueError):
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
    """Presentation times (in time-base units, ascending) and key frames of a stream, from its packets alone."""

    times: tuple[int, ...]  # empty where packets have no usable times
    key_times: tuple[int, ...]
    key_seeks: tuple[int, ...]  # where to seek for each key frame: its decoding time
    num_packets: int
    promised: int  # frames the header promises, 0 if it does not say


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
    """Return the frames of the given strictly ascending indices as uint8 [T, H, W, 3]; see `read_frames`."""
    import torch

    return torch.from_numpy(read_pictures_at(path, indices, size=size))


def read_pictures_at(path: str | Path, indices: Sequence[int], *, size: Size | None = None) -> np.ndarray:
    """Return what `read_frames_at` does, as an array: a process that only looks at pictures needs no torch."""
    if not indices or indices[0] < 0 or any(b <= a for a, b in pairwise(indices)):
        raise ValueError(f"frame indices must be non-negative and ascending, got {list(indices)[:8]}")
    if is_image(path):
        if indices[-1] > 0:
            raise DecodeError(_short(path, 1 if indices[0] == 0 else 0, indices, 1))
        return _read_image(path, size)[None]
    with open_video(path) as (container, stream):
        index = frame_index(path)
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
    return np.stack(pictures)


def probe(path: str | Path) -> VideoInfo:
    """Return frame count, average rate and display size; decodes one frame. Raises DecodeError."""
    if is_image(path):
        return VideoInfo(1, 0.0, *_image_size(path))
    with open_video(path) as (container, stream):
        index = frame_index(path)
        first = next(container.decode(stream), None)
        if first is None:
            raise DecodeError(f"{path}: no frame decodes")
        height, width = PictureConverter(path, stream, None).output_size(first)
        rate = average_rate(index.times, stream.time_base) or float(stream.average_rate or 0)
        num_frames = len(index.times) or 1 + sum(1 for _ in container.decode(stream))
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
def open_video(path: str | Path, *, threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Open the first real video stream: yields (container, stream) and closes both; PyAV's errors become DecodeError.

    `threads` is 1 because training decodes in many worker processes; 0 lets ffmpeg choose.
    """
    import av

    _check_file(path)
    try:
        with av.open(
            f"file:{os.fspath(path)}", **_any_metadata()
        ) as container:  # the prefix keeps ':' or '%' in a name plain
            streams = [s for s in container.streams.video if not int(s.disposition) & ATTACHED_PICTURE]
            if not streams:
                raise DecodeError(f"{path}: no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise DecodeError(f"{path}: no decoder for its video stream")
            stream.thread_type = "SLICE" if threads == 1 else "AUTO"
            stream.codec_context.thread_count = threads
            yield container, stream
    except av.FFmpegError as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(f"{path}: cannot be decoded: {reason}") from error


def frame_index(path: str | Path) -> FrameIndex:
    """Return the file's frame index; kept for recently read files."""
    status = os.stat(path)
    return _index_file(os.fspath(path), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _index_file(path: str, _mtime_ns: int, _size: int) -> FrameIndex:
    with open_video(path) as (container, stream):
        num_packets, times, keys = 0, [], []
        for packet in container.demux(stream):
            num_packets += packet.size > 0  # the last one is empty: it flushes the decoder
            if packet.size and not packet.is_discard and _is_shown(packet, stream.codec_context.name):
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        promised = stream.frames
    if None in times or len(set(times)) < len(times):
        return FrameIndex((), (), (), num_packets, promised)
    keys.sort()
    return FrameIndex(tuple(sorted(times)), tuple(k for k, _ in keys), tuple(s for _, s in keys), num_packets, promised)


def _is_shown(packet: Any, codec: str) -> bool:
    """False for VP8's alternate reference frames: packets of their own that no player shows (RFC 6386, 9.1)."""
    return codec != "vp8" or bool(memoryview(packet)[0] & 0x10)


def _read_by_time(
    container: Any, stream: Any, index: FrameIndex, indices: Sequence[int], to_picture: PictureConverter
) -> list[np.ndarray] | None:
    """Seek and decode; None where the decoded times are not the indexed ones."""
    key = bisect_right(index.key_times, index.times[indices[0]]) - 1
    position = 0
    if key >= 0 and index.key_times[key] > index.times[0]:
        position = bisect_left(index.times, index.key_times[key])
        container.seek(index.key_seeks[key], stream=stream, backward=True)
    reached = False
    wanted, pictures = set(indices), []
    for frame in container.decode(stream):
        expected = index.times[position] if position < len(index.times) else None
        if not reached and frame.pts is not None and frame.pts < expected:
            continue  # the seek landed earlier, or these lead the key frame and belong to the scene before it
        if frame.pts != expected:
            return None
        reached = True
        if position in wanted:
            pictures.append(to_picture(frame))
            if position == indices[-1]:
                break
        position += 1
    return pictures


def _read_by_count(
    container: Any, stream: Any, indices: Sequence[int], to_picture: PictureConverter
) -> list[np.ndarray]:
    wanted, pictures = set(indices), []
    for position, frame in enumerate(container.decode(stream)):
        if position in wanted:
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
        rgb = self.reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation="BICUBIC", **one_scaling_thread()
        )
        return np.ascontiguousarray(turn.apply(rgb.to_ndarray()))


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
    if not path.exists():
        raise DecodeError(f"{path}: {'a link to a file that is not there' if path.is_symlink() else 'no such file'}")
    if path.is_dir():
        raise DecodeError(f"{path}: is a folder")
    if path.stat().st_size == 0:
        raise DecodeError(f"{path}: the file is empty")


def _short(path: str | Path, got: int, indices: Sequence[int], total: int | None) -> str:
    has = f"; it has {total}" if total is not None else ""
    return f"{path}: ends early: {got} of {len(indices)} frames (wanted {indices[0]} to {indices[-1]}{has})"
