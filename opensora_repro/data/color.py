"""Colour: decoded frames to RGB as an SDR display shows it, and RGB to what clips are written in.

swscale guesses where it is not told, and rounds in a hurry: every conversion here names matrix and range, interpolates
chroma to full resolution and rounds to nearest, so that a video read and written again keeps its colours. Numbers are
the code points of ITU-T H.273, which ffmpeg's are, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

BT709, SMPTE170M, BT2020 = 1, 6, 9  # primaries and matrices; the first two, transfers as well
UNTOLD = (0, 2, 3)  # reserved and "unspecified"
PQ, HLG = 16, 18  # the transfers of HDR (ITU-R BT.2100): SMPTE ST 2084, ARIB STD-B67
LIMITED_RANGE, FULL_RANGE = 1, 2
HD_LINES = 720  # untagged video with so many lines is BT.709, with fewer BT.601, as players take it
BT2020_CONSTANT = 10  # the matrix of constant luminance: hardly used, and read as the usual one
MATRICES = (BT709, 4, 5, SMPTE170M, 7, BT2020)  # that swscale knows; 5 is BT.601's, too
ACCURATE_ROUNDING, FULL_CHROMA_OUT, FULL_CHROMA_IN = 0x40000, 0x2000, 0x4000  # swscale's flags
BICUBIC = 0x4 | ACCURATE_ROUNDING | FULL_CHROMA_OUT
AREA = 0x20 | ACCURATE_ROUNDING | FULL_CHROMA_IN  # means, of chroma from every pixel instead of every second
CENTRED_CHROMA = "chromaloc=1"  # for x264: chroma as swscale makes it, the mean of four pixels (H.264, E.2.1)
LEFT_CHROMA = frozenset(("h264", "hevc", "mpeg2video", "mpeg4"))  # codecs whose chroma lies left unless they say else

WHITE_NITS = 203.0  # diffuse white in PQ (ITU-R BT.2408); in HLG it is three quarters of the signal
SHOULDER = 0.85  # of white: what is darker keeps its light, what is brighter is pressed into the rest
TO_BT709 = np.array(  # linear RGB of BT.2020's primaries to BT.709's (ITU-R BT.2407)
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)


def matrix_of(frame: Any) -> int:
    """Return the matrix of a YUV frame: its tag, or what is usual for its primaries and size."""
    if frame.colorspace in MATRICES:
        return int(frame.colorspace)
    if frame.color_trc in (PQ, HLG) or frame.color_primaries == BT2020 or frame.colorspace == BT2020_CONSTANT:
        return BT2020
    return BT709 if frame.height >= HD_LINES else SMPTE170M


def transfer_of(frame: Any) -> int:
    """Return the transfer of a frame: its tag, or what is usual for its matrix.

    Deep colour in BT.2020 that names no transfer is taken for PQ: HDR loses that tag on its way through tools that know
    nothing of it, while who makes SDR in BT.2020 names it.
    """
    if frame.color_trc not in UNTOLD:
        return int(frame.color_trc)
    if is_rgb(frame):
        return BT709
    if matrix_of(frame) == BT2020:
        return PQ if frame.format.components[0].bits >= 10 else BT709
    return BT709 if matrix_of(frame) == BT709 else SMPTE170M


def primaries_of(frame: Any) -> int:
    """Return the primaries of a frame: its tag, or its matrix's."""
    if frame.color_primaries not in UNTOLD:
        return int(frame.color_primaries)
    matrix = BT709 if is_rgb(frame) else matrix_of(frame)
    return matrix if matrix in (BT709, BT2020) else SMPTE170M


def range_of(frame: Any) -> int:
    """Return the range of a YUV frame: its tag, or limited unless its format is one of JPEG's."""
    full = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
    return FULL_RANGE if full else LIMITED_RANGE


def is_rgb(frame: Any) -> bool:
    return bool(frame.format.is_rgb or frame.format.has_palette)


def is_hdr(frame: Any) -> bool:
    return transfer_of(frame) in (PQ, HLG)


def tag(frame: Any) -> None:
    """Write on a frame what it is taken for: swscale goes by the tags."""
    frame.color_primaries, frame.color_trc = primaries_of(frame), transfer_of(frame)
    if not is_rgb(frame):
        frame.colorspace, frame.color_range = matrix_of(frame), range_of(frame)


def keeps_color(frame: Any) -> bool:
    """Whether `yuv_to_yuv` may write a frame; of full range, swscale would make chroma half a level too high."""
    return not (is_rgb(frame) or is_hdr(frame) or range_of(frame) == FULL_RANGE)


def to_rgb(reformatter: Any, frame: Any, height: int, width: int) -> np.ndarray:
    """Return a decoded frame as uint8 RGB [height, width, 3] in BT.709; HDR is tone-mapped.

    In memory its channels lie one after the other, as swscale writes them and models want them.
    """
    if _has_halved_sides(frame):
        padded = _with_even_sides(frame)
        if (height, width) == (frame.height, frame.width):
            return to_rgb(reformatter, padded, padded.height, padded.width)[:height, :width]
        exact = to_rgb(reformatter, padded, padded.height, padded.width)[: frame.height, : frame.width]
        return _scaled(exact, height, width)
    tag(frame)
    # Planar: the same values as rgb24 at half the cost, for swscale's fast code writes planes.
    planar = "gbrp16le" if is_hdr(frame) else "gbrp"
    rgb = reformatter.reformat(frame, width=width, height=height, format=planar, interpolation=BICUBIC, threads=1)
    if is_hdr(frame):
        return tone_map(rgb.to_ndarray(), frame.color_trc, frame.color_primaries)
    channels = np.empty((3, height, width), np.uint8)
    for channel, plane in zip((1, 2, 0), rgb.planes, strict=True):  # green, blue, red
        channels[channel] = np.frombuffer(plane, np.uint8).reshape(height, -1)[:, :width]
    return channels.transpose(1, 2, 0)


def yuv_to_yuv(reformatter: Any, frame: Any, height: int, width: int) -> Any:
    """Return a frame that `keeps_color` as yuv420p, its own matrix kept, fully tagged."""
    tag(frame)
    yuv = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="yuv420p",
        dst_color_range=LIMITED_RANGE,
        interpolation=AREA,
        threads=1,
    )
    yuv.colorspace, yuv.color_range = frame.colorspace, LIMITED_RANGE
    yuv.color_primaries, yuv.color_trc = frame.color_primaries, frame.color_trc
    return yuv


def tone_map(rgb: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Return uint16 R'G'B' [H, W, 3] of PQ or HLG as uint8 in BT.709.

    Light up to SHOULDER of diffuse white stays as it is; above, the brightest channel approaches 1 and the others keep
    their share of it, so that highlights keep their hue. HLG is scene light, which BT.709's curve takes as it is: the
    display's own gamma stands for HLG's.
    """
    light = _linear(transfer)[rgb]  # float32, 1 is diffuse white
    if primaries == BT2020:
        light = light @ TO_BT709.T
    brightest = light.max(axis=-1, keepdims=True)
    room = 1 - SHOULDER
    pressed = SHOULDER + room * (1 - np.exp((SHOULDER - np.maximum(brightest, SHOULDER)) / room))
    light *= np.where(brightest > SHOULDER, pressed / np.maximum(brightest, SHOULDER), 1)
    steps = len(_encoded()) - 1
    return _encoded()[(np.clip(light, 0, 1) * steps + 0.5).astype(np.uint16)]


@lru_cache(maxsize=2)
def _linear(transfer: int) -> np.ndarray:
    """Return the light of every 16-bit code of PQ or HLG as float32 [65536], 1 for diffuse white (BT.2100)."""
    signal = np.arange(65536) / 65535
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = signal ** (1 / m2)
        return (1e4 / WHITE_NITS * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)).astype(np.float32)

    def scene_light(signal: np.ndarray) -> np.ndarray:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)

    return (scene_light(signal) / scene_light(np.array(0.75))).astype(np.float32)


@lru_cache(maxsize=1)
def _encoded() -> np.ndarray:
    """Return BT.709's 8-bit code of 65536 steps of light (its OETF)."""
    light = np.arange(65536) / 65535
    return np.rint(255 * np.where(light < 0.018, 4.5 * light, 1.099 * light**0.45 - 0.099)).astype(np.uint8)


def _has_halved_sides(frame: Any) -> bool:
    """Whether chroma of fewer pixels meets an odd size, where swscale would stretch it over the picture."""
    name = frame.format.name
    return bool(frame.width % 2 or frame.height % 2) and name.startswith(("yuv", "yuvj", "yuva")) and "444" not in name


def _with_even_sides(frame: Any) -> Any:
    """Return a planar YUV frame with its last row and column repeated where they are odd."""
    import av

    padded = av.VideoFrame(frame.width + frame.width % 2, frame.height + frame.height % 2, frame.format.name)
    sample = np.uint16 if frame.format.components[0].bits > 8 else np.uint8
    for source, target in zip(frame.planes, padded.planes, strict=True):
        pixels = np.frombuffer(source, sample).reshape(source.height, -1)[:, : source.width]
        sides = (0, target.height - source.height), (0, target.width - source.width)
        rows = np.zeros((target.height, target.line_size // pixels.itemsize), sample)
        rows[:, : target.width] = np.pad(pixels, sides, mode="edge")
        target.update(rows)
    tag(frame)  # before the padding adds a line
    padded.colorspace, padded.color_range = frame.colorspace, frame.color_range
    padded.color_primaries, padded.color_trc = frame.color_primaries, frame.color_trc
    return padded


def _scaled(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    import av

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
    return picture.reformat(width=width, height=height, interpolation=BICUBIC, threads=1).to_ndarray()
