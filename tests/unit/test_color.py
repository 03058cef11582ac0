"""Colours against exact arithmetic, through repeated writing, from HDR, and in the tags of clips."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from opensora_repro.data.color import BT709, BT2020, HLG, PQ, TO_BT709, to_rgb, tone_map
from opensora_repro.data.probe.facts import read_facts
from opensora_repro.data.split.options import Options
from opensora_repro.data.split.source import Source, split_source
from opensora_repro.data.video import open_video, read_frames
from opensora_repro.data.write import write_video

WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of red and blue in each matrix's luma
PATCHES = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
PATCHES += [(128, 128, 128), (230, 180, 150), (20, 20, 20), (250, 250, 250)]


def wavy(height: int, width: int, low: float, high: float, phase: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return low + (high - low) * (0.5 + 0.5 * np.sin(x / 17 + phase) * np.cos(y / 23 - phase))


def yuv_frame(pixel_format: str, height: int, width: int, tags: dict[str, int]) -> Any:
    """A frame of smooth colours, every code of it in gamut."""
    frame = av.VideoFrame(width, height, pixel_format)
    deep = frame.format.components[0].bits - 8
    for number, plane in enumerate(frame.planes):
        low, high = ((90, 150), (110, 146), (114, 140))[number]
        codes = np.zeros((plane.height, plane.line_size // (2 if deep else 1)), np.uint16 if deep else np.uint8)
        codes[:, : plane.width] = wavy(plane.height, plane.width, low, high, number).round() * 2**deep
        plane.update(codes)
    for tag, value in tags.items():
        setattr(frame, tag, value)
    return frame


def full_size(codes: np.ndarray, height: int, width: int, *, left: bool = False) -> np.ndarray:
    """Chroma at every pixel, linearly between samples in the middle of their pixels (or at their left edge's)."""

    def between(values: np.ndarray, places: np.ndarray) -> np.ndarray:
        places = places.clip(0, len(values) - 1)
        before = np.floor(places).astype(int)
        share = (places - before)[:, None]
        return values[before] * (1 - share) + values[np.minimum(before + 1, len(values) - 1)] * share

    y, x = np.arange(height) + 0.0, np.arange(width) + 0.0
    rows = y if codes.shape[0] == height else (y - 0.5) / 2
    columns = x if codes.shape[1] == width else x / 2 if left else (x - 0.5) / 2
    return between(between(codes.astype(float), rows).T, columns).T


def exact_rgb(frame: Any, matrix: int, *, full: bool = False, left: bool = False) -> np.ndarray:
    """R'G'B' in 0..255 as ITU-T H.273 defines it, float64."""
    depth = frame.format.components[0].bits
    planes = []
    for plane in frame.planes:
        codes = np.frombuffer(plane, np.uint16 if depth > 8 else np.uint8).reshape(plane.height, -1)[:, : plane.width]
        planes.append(full_size(codes / 2 ** (depth - 8), frame.height, frame.width, left=left))
    luma = planes[0] / 255 if full else (planes[0] - 16) / 219
    blue, red = ((plane - 128) / (255 if full else 224) for plane in planes[1:])
    kr, kb = WEIGHTS[matrix]
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    return 255 * np.stack([r, (luma - kr * r - kb * b) / (1 - kr - kb), b], axis=-1).clip(0, 1)


@pytest.mark.parametrize("size", [(96, 128), (96, 129), (97, 130), (97, 131)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_rgb_is_exact_to_rounding(size: tuple[int, int], pixel_format: str) -> None:
    for matrix in WEIGHTS:
        frame = yuv_frame(pixel_format, *size, {"colorspace": matrix, "color_range": 1, "color_trc": 1})
        error = to_rgb(VideoReformatter(), frame, *size) - exact_rgb(frame, matrix)
        assert np.abs(error).mean() < 0.35, matrix  # rounding alone is 0.25
        assert np.abs(error.mean(axis=(0, 1))).max() < 0.05, matrix


@pytest.mark.parametrize(
    ("pixel_format", "size", "tags", "matrix"),
    [
        ("yuv420p", (718, 64), {}, 6),
        ("yuv420p", (720, 64), {}, 1),
        ("yuv420p", (64, 64), {"color_range": 2}, 6),
        ("yuvj420p", (64, 64), {}, 6),
        ("yuv444p", (64, 64), {"color_primaries": 9}, 9),
        ("yuv420p", (720, 64), {"colorspace": 5}, 6),
        ("yuv420p", (64, 64), {"colorspace": 10}, 9),
    ],
)
def test_what_tags_leave_open(pixel_format: str, size: tuple[int, int], tags: dict[str, int], matrix: int) -> None:
    frame = yuv_frame(pixel_format, *size, tags)
    full = tags.get("color_range") == 2 or pixel_format == "yuvj420p"
    error = to_rgb(VideoReformatter(), frame, *size) - exact_rgb(frame, matrix, full=full)
    assert np.abs(error).mean() < 0.35


def test_chroma_of_h264_lies_left(tmp_path: Path) -> None:
    frame = yuv_frame("yuv420p", 96, 128, {"colorspace": 1, "color_range": 1})
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 1
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    found = read_frames(tmp_path / "a.mp4", start=0, count=1)[0].numpy()
    assert np.abs(found - exact_rgb(frame, 1, left=True)).mean() < 0.35


@pytest.mark.parametrize("size", [(96, 128), (95, 127)])
def test_writing_again_and_again_does_not_drift(tmp_path: Path, size: tuple[int, int]) -> None:
    """What one pass loses to chroma's half size and to the codec stays; nothing is added on one side, nor moved."""
    channels = [wavy(*size, 40, 215, phase) for phase in (0.0, 1.5, 3.0)]
    first = frames = np.stack(channels, axis=-1).round().astype(np.uint8)[None].repeat(2, axis=0)
    for generation in range(4):
        write_video(tmp_path / f"{generation}.mp4", frames, 8)
        frames = read_frames(tmp_path / f"{generation}.mp4", start=0, count=2).numpy()
        error = frames[:, : size[0], : size[1]].astype(float) - first
        assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.15, generation
        assert np.abs(error).mean() < 1.2, generation


def patch_colours(picture: np.ndarray) -> np.ndarray:
    """The median of the middle of each of 2 x 4 patches, [8, 3]."""
    height, width = picture.shape[0] // 2, picture.shape[1] // 4
    tiles = [picture[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in (0, 1) for c in range(4)]
    middles = [tile[height // 4 : -height // 4, width // 4 : -width // 4] for tile in tiles]
    return np.stack([np.median(tile, axis=(0, 1)) for tile in middles])


def test_pq_looks_like_its_twin(cases_dir: Path) -> None:
    hdr = patch_colours(read_frames(cases_dir / "hdr_pq.mp4", start=3, count=1)[0].numpy())
    twin = patch_colours(read_frames(cases_dir / "c709.mp4", start=3, count=1)[0].numpy())
    assert np.abs(twin - PATCHES).max() <= 2
    assert np.abs(hdr - twin).max() <= 12
    assert np.abs(hdr[-1] - 250).max() <= 6
    facts = read_facts(cases_dir / "hdr_pq.mp4")
    assert (facts.transfer, facts.primaries) == ("smpte2084", "bt2020")


def hlg_codes(rgb: np.ndarray) -> np.ndarray:
    """BT.709 R'G'B' in 0..1 as HLG of BT.2020's primaries, white at three quarters of the signal (BT.2100, table 5)."""
    light = np.where(rgb < 0.081, rgb / 4.5, ((rgb + 0.099) / 1.099) ** (1 / 0.45))
    light = (light @ np.linalg.inv(TO_BT709.astype(float)).T).clip(0) * 0.265
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), a * np.log(np.maximum(12 * light - b, 1e-6)) + c)


def write_hlg(path: Path) -> None:
    """What a phone writes: HEVC of 10 bits, HLG; patches of 48 x 40 pixels."""
    r, g, b = hlg_codes(np.array(PATCHES, float).reshape(2, 4, 3) / 255).transpose(2, 0, 1)
    kr, kb = WEIGHTS[BT2020]
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = [(b - luma) / (2 * (1 - kb)), (r - luma) / (2 * (1 - kr))]
    codes = [64 + 876 * luma, *(512 + 896 * plane for plane in chroma)]
    yuv = av.VideoFrame(160, 96, "yuv420p10le")
    for plane, values in zip(yuv.planes, codes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
        rows[:, : plane.width] = values.round().repeat(plane.height // 2, axis=0).repeat(plane.width // 4, axis=1)
        plane.update(rows)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx265", rate=24, options={"crf": "12", "x265-params": "log-level=none"})
        stream.height, stream.width, stream.pix_fmt = yuv.height, yuv.width, yuv.format.name
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = BT2020, HLG, BT2020, 1
        for tick in range(10):
            yuv.pts, yuv.time_base = tick, Fraction(1, 24)
            out.mux(stream.encode(yuv))
        out.mux(stream.encode(None))


def test_hlg_of_a_phone_becomes_sdr(tmp_path: Path) -> None:
    write_hlg(tmp_path / "a.mp4")
    facts = read_facts(tmp_path / "a.mp4")
    assert (facts.transfer, facts.primaries) == ("arib-std-b67", "bt2020")
    found = patch_colours(read_frames(tmp_path / "a.mp4", start=2, count=1)[0].numpy())
    assert np.abs(found - PATCHES).max() <= 14
    small = read_frames(tmp_path / "a.mp4", start=2, count=1, size=(48, 80))[0].numpy()
    assert np.abs(patch_colours(small) - found).max() <= 2


def test_highlights_keep_their_order_and_hue() -> None:
    levels = np.linspace(0, 65535, 64).astype(np.uint16)
    for transfer in (PQ, HLG):
        greys = tone_map(np.repeat(levels[None, :, None], 3, axis=2), transfer, BT2020)[0].astype(int)
        assert (np.diff(greys[:, 0]) >= 0).all()
        assert (greys[0, 0], greys[-1, 0]) == (0, 255)
        assert np.ptp(greys, axis=1).max() <= 1  # grey stays grey
    bright = tone_map(np.array([[[50000, 42000, 40000]]], np.uint16), PQ, BT709)[0, 0]
    assert bright[0] >= 250 > bright[1] > bright[2]


def cut(path: Path, out: Path, **options: Any) -> Path:
    (out / "clips").mkdir(parents=True)
    given = Options("shots", None, **{"min_frames": 1, "max_frames": 0, "crf": 1, **options})
    (clip,) = split_source(Source(path, path.name, "0-0"), out, given)["clips"]
    return out / "clips" / clip["path"]


def tags(path: Path) -> tuple[int, ...]:
    with open_video(path) as (_, stream):
        context = stream.codec_context
        return context.color_primaries, context.color_trc, context.colorspace, context.color_range


@pytest.mark.parametrize("options", [{}, {"short_side": 120}, {"fps": "12"}])
@pytest.mark.parametrize("name", ["c709.mp4", "hdr_pq.mp4", "crgb_ffv1.mkv"])
def test_clips_are_tagged_and_look_like_their_source(
    cases_dir: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    clip = cut(cases_dir / name, tmp_path, **options)
    assert tags(clip) == (1, 1, 1, 1)
    source = read_frames(cases_dir / name, start=0, count=1)[0].numpy()
    found = read_frames(clip, start=0, count=1)[0].numpy()
    reduced = cv2.resize(source, found.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(float) - reduced).mean() < 2.5  # the patches' edges
    assert np.abs(patch_colours(found) - patch_colours(source)).max() <= 1


@pytest.mark.parametrize(
    ("codec", "size", "given", "expected"),
    [
        ("libx264", (720, 64), (2, 2, 2, 0), (1, 1, 1, 1)),
        ("libx264", (96, 128), (2, 2, 2, 0), (6, 6, 6, 1)),
        ("libx264", (96, 128), (9, 14, 9, 1), (9, 14, 9, 1)),
        ("libx264", (96, 128), (9, 14, 9, 2), (9, 1, 1, 1)),
        ("libx264", (96, 128), (5, 2, 5, 1), (5, 6, 5, 1)),
        ("libx264", (96, 128), (5, 2, 5, 2), (1, 1, 1, 1)),
        ("mjpeg", (96, 128), (2, 2, 2, 2), (1, 1, 1, 1)),
    ],
)
def test_tags_are_kept_or_set(
    tmp_path: Path, codec: str, size: tuple[int, int], given: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """A reduced clip of an untagged source still shows the source's colours."""
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    frame = yuv_frame(pixels, *size, {"color_range": given[3], "colorspace": given[2]})
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else {"qmin": "1", "q": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = given
        for tick in range(4):
            frame.pts, frame.time_base = tick, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    source = read_frames(tmp_path / "a.mkv", start=0, count=1)[0].numpy()
    for place, options in (("whole", {}), ("small", {"short_side": 32})):
        clip = cut(tmp_path / "a.mkv", tmp_path / place, **options)
        assert tags(clip) == expected, place
        found = read_frames(clip, start=0, count=1)[0].numpy()
        reduced = cv2.resize(source, found.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(found.astype(float) - reduced).mean() < 1.25, place
        assert place == "small" or np.abs((found.astype(float) - reduced).mean(axis=(0, 1))).max() < 0.15
