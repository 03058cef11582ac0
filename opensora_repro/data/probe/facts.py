"""What a video file is: container and stream facts, and whether it holds what it promises.

Damage is looked for where it is cheap: one pass over the packets compares their number with what the file's own table
places in it (the header's count means little: edit lists hide frames, recorders leave some out), asks the demuxer
whether one was cut short, and walks the NAL units of H.264 and HEVC packets, whose lengths must add up to the packet.
That needs no decoding and finds what truncation and overwritten bytes leave behind. A full decode finds the rest; files
that a look at the packets cannot settle, such as joined segments of MPEG-TS, get it unasked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from opensora_repro.data.color import primaries_of, transfer_of
from opensora_repro.data.video import (
    DecodeError,
    FrameIndex,
    Orientation,
    PictureConverter,
    average_rate,
    decoded_frames,
    demux,
    frame_index,
    is_image,
    open_video,
    orientation,
    probe,
)

# Byte of the decoder configuration whose low two bits are the size of a NAL unit's length, less 1.
NAL_CODECS = {"h264": 4, "hevc": 21}  # ISO/IEC 14496-15, 5.3.3.1 and 8.3.3.1
STEADY = Fraction(1, 8)  # of a frame's time: how far a frame of a constant rate may be from its place


@dataclass(frozen=True)
class Facts:
    """Sizes in pixels, times in seconds. `num_frames`, `height` and `width` are what a reader gets."""

    num_frames: int
    fps: float  # average; 0 for an image
    height: int  # as displayed: rotated, in square pixels
    width: int
    constant_fps: bool
    duration: float  # of the video stream, the last frame's own time included
    codec: str
    pixel_format: str
    transfer: (
        str  # bt709, smpte2084 (PQ), arib-std-b67 (HLG), ...: its tag as ffprobe names it, or what it is taken for
    )
    primaries: str
    coded_height: int  # as stored
    coded_width: int
    rotation: int  # degrees counterclockwise that a player applies, as ffprobe tells it: 0, 90, 180, 270
    audio: bool
    container: str


def read_facts(path: str | Path, *, decode: bool = False) -> Facts:
    """Return a file's facts; `decode` also decodes every frame. Raises DecodeError, for damage too."""
    if is_image(path):
        info = probe(path)
        kind = Path(path).suffix.lower().removeprefix(".")
        return Facts(
            1, 0.0, info.height, info.width, True, 0.0, kind, "", "", "", info.height, info.width, 0, False, kind
        )
    with open_video(path):  # tells what is wrong with the file as such
        pass
    index = frame_index(path)
    _check_packets(path, index)
    with open_video(path) as (container, stream):
        first = next(decoded_frames(container, stream), None)
        if first is None:
            raise DecodeError(f"{path}: no frame decodes")
        height, width = PictureConverter(path, stream, None).output_size(first)
        context = stream.codec_context
        audio, kind = bool(container.streams.audio), container.format.name
        rate = average_rate(index.times, stream.time_base) or float(stream.average_rate or stream.guessed_rate or 0)
        base = Fraction(stream.time_base)
        codec, pixels, stored, turn = context.codec.canonical_name, first.format.name, first, orientation(first)
    count = len(index.times)
    if decode or not count or index.joined:
        count = _count_decoded(path, index)
    if count > 1 and not rate > 0:
        raise DecodeError(f"{path}: neither its packets nor its header tell a frame rate")
    return Facts(
        count, rate, height, width, is_steady(index.times, base), count / rate if rate else 0.0, codec, pixels,
        *color_names(first), stored.height, stored.width, rotation(turn), audio, kind,
    )  # fmt: skip


def is_steady(times: Sequence[int], time_base: Fraction) -> bool:
    """Whether the frames are evenly spaced, to the clock's rounding."""
    if len(times) < 3:
        return True
    first, span, steps = times[0], times[-1] - times[0], len(times) - 1
    slack = max(steps, int(span * STEADY))  # times the number of steps, as all here: whole numbers are fast
    return all(abs((time - first) * steps - number * span) <= slack for number, time in enumerate(times))


def color_names(frame: Any) -> tuple[str, str]:
    """Return what a frame's transfer and primaries are read as, in ffprobe's words."""
    from av.video.reformatter import ColorPrimaries, ColorTrc

    def name(kind: Any, code: int) -> str:
        return kind(code).name.lower().replace("_", "-") if code in set(kind) else "unknown"

    return name(ColorTrc, transfer_of(frame)), name(ColorPrimaries, primaries_of(frame))


def rotation(turn: Orientation) -> int:
    """Return the degrees counterclockwise of an orientation; a mirroring beside it is not told."""
    if turn.transpose:
        return 270 if turn.mirror_x else 90
    return 180 if turn.mirror_x and turn.mirror_y else 0


def _check_packets(path: str | Path, index: FrameIndex) -> None:
    """Raise DecodeError where packets are missing or broken."""
    if not index.num_packets:
        raise DecodeError(f"{path}: no frame decodes")
    with open_video(path) as (container, stream):
        length_size = _nal_length_size(stream)
        packets = (packet for packet in demux(container, stream) if packet.size)
        misfits = [i for i, packet in enumerate(packets) if length_size and _is_misfit(packet, length_size)]
    if reason := index.damage(misfits):
        raise DecodeError(f"{path}: {reason}")


def _nal_length_size(stream: Any) -> int:
    """Return the bytes before each NAL unit that hold its length; 0 for other codecs and for start codes."""
    at = NAL_CODECS.get(stream.codec_context.name, 0)
    setup = bytes(stream.codec_context.extradata or b"")
    return (setup[at] & 3) + 1 if at and len(setup) > at and setup[0] == 1 else 0


def _is_misfit(packet: Any, length_size: int) -> bool:
    """Whether the packet's NAL units do not add up to it."""
    data, at = memoryview(packet), 0
    while at < len(data):
        start = at + length_size
        at = start + int.from_bytes(data[at:start], "big")
        if at > len(data) or (at > start and data[start] & 0x80):  # longer than the packet; a bit that is always 0
            return True
    return False


def _count_decoded(path: str | Path, index: FrameIndex) -> int:
    """Decode the whole file; return how many frames there are. Raises DecodeError unless all of them come out."""
    import av

    times: list[int | None] = []
    try:
        with open_video(path) as (container, stream):
            for time in _sound_frames(path, container, stream):
                times.append(time)
    except (DecodeError, av.FFmpegError) as error:
        raise DecodeError(f"{path}: {index.ended_early(len(times))}") from error
    if reason := index.damage_of(times):
        raise DecodeError(f"{path}: {reason}")
    return len(times)


def _sound_frames(path: str | Path, container: Any, stream: Any) -> Iterator[int | None]:
    for frame in decoded_frames(container, stream):
        if frame.is_corrupt:
            raise DecodeError(f"{path}: a frame is damaged")
        yield frame.pts
