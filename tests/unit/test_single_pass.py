"""One decoding gives the clips that scanning first and cutting after gives."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from opensora_repro.data.split.cut import Encoding, cut_clips, fault
from opensora_repro.data.split.scenes import Span, plan_spans, scan_video
from opensora_repro.data.split.single_pass import SceneOptions, scan_and_cut
from opensora_repro.data.video import DecodeError
from opensora_repro.data.write import write_video

LENGTHS = (70, 40, 5, 45)  # frames of each scene


def film(path: Path) -> None:
    """Write scenes of a moving view each, the first two joined by a dissolve of 20 frames, at a variable rate."""
    rng = np.random.default_rng(0)
    frames: list[np.ndarray] = []
    for length in LENGTHS:
        wide = cv2.resize(rng.uniform(30, 220, (6, 12, 3)), (160 + length, 96), interpolation=cv2.INTER_CUBIC)
        wide += cv2.resize(rng.normal(0, 18, (16, 40, 1)), (160 + length, 96))[..., None]
        frames += [wide[:, i // 4 :][:, :160].clip(0, 255).astype(np.uint8) for i in range(length)]
    first, second = frames[:70], frames[70:110]
    shares = np.linspace(0, 1, 22)[1:-1, None, None, None]
    mixed = (np.stack(first[50:]) * (1 - shares) + np.stack(second[:20]) * shares).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30)
        for i, picture in enumerate([*first[:50], *mixed, *second[20:], *frames[110:]]):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i + max(0, i - 90), Fraction(1, 30)  # half the rate from frame 90 on
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("trim", "encoding"), [(None, Encoding()), (0, Encoding()), (2, Encoding(short_side=64, fast_decode=True))]
)
def test_clips_are_the_same_bytes(tmp_path: Path, trim: int | None, encoding: Encoding) -> None:
    film(tmp_path / "long.mp4")
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    twice.mkdir()
    options = SceneOptions(encoding, min_frames=8, trim=trim)
    scan = scan_and_cut(tmp_path / "long.mp4", lambda span: once / f"{span.start}-{span.end}.mp4", options)
    assert scan is not None
    assert scan == scan_video(tmp_path / "long.mp4")
    assert (len(scan.cuts), len(scan.transitions), scan.cuts[1:]) == (3, 1, (90, 95))
    spans = [s for s in plan_spans(len(scan.times), scan.cuts, transitions=scan.transitions, trim=trim) if len(s) >= 8]
    assert len(spans) == 3  # the scene of five frames is too short
    cut_clips(tmp_path / "long.mp4", scan, [(s, twice / f"{s.start}-{s.end}.mp4") for s in spans], encoding)
    assert {p.name: p.read_bytes() for p in once.iterdir()} == {p.name: p.read_bytes() for p in twice.iterdir()}


def test_x264_does_without_avx512(tmp_path: Path) -> None:
    """With it, the last macroblock of a picture is not always the same."""
    film(tmp_path / "long.mp4")
    scan = scan_video(tmp_path / "long.mp4")
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        with av.logging.Capture(local=False) as said:
            cut_clips(tmp_path / "long.mp4", scan, [(Span(0, 20), tmp_path / "clip.mp4")], Encoding())
            write_video(tmp_path / "video.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8)
    finally:
        av.logging.set_level(level)
    used = [text for _, name, text in said if name == "libx264" and "cpu capabilities" in text]
    assert len(used) == 2 and not any("AVX512" in text for text in used)


@pytest.mark.exhaustive
def test_cutting_again_and_again_gives_the_same_bytes(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4")
    scan = scan_video(tmp_path / "long.mp4")
    clips = [(Span(0, 60), tmp_path / "a.mp4"), (Span(60, 90), tmp_path / "b.mp4"), (Span(95, 140), tmp_path / "c.mp4")]
    contents = set()
    for _ in range(150):
        cut_clips(tmp_path / "long.mp4", scan, clips, Encoding())
        contents.add(tuple(path.read_bytes() for _, path in clips))
    assert len(contents) == 1


@pytest.mark.parametrize("encoding", [Encoding(fps=Fraction(8)), Encoding(audio=True), Encoding(copy=True)])
def test_what_needs_a_second_pass_is_left_to_it(tmp_path: Path, encoding: Encoding) -> None:
    film(tmp_path / "long.mp4")
    assert scan_and_cut(tmp_path / "long.mp4", lambda _: tmp_path / "clip.mp4", SceneOptions(encoding)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["long.mp4"]


def test_frames_too_large_to_wait_are_left_to_a_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "long.mp4")
    monkeypatch.setattr("opensora_repro.data.split.single_pass.ROOM", 1_000_000)
    assert scan_and_cut(tmp_path / "long.mp4", lambda _: tmp_path / "clip.mp4", SceneOptions()) is None
    assert [p.name for p in tmp_path.iterdir()] == ["long.mp4"]


@pytest.mark.parametrize("name", ["corrupt_middle.mp4", "trunc_mdat_half.mp4"])
def test_a_damaged_source_leaves_no_clip(videos_dir: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DecodeError, match="damaged"):
        scan_and_cut(videos_dir / "bad" / name, lambda span: tmp_path / f"{span.start}.mp4", SceneOptions())
    assert list(tmp_path.iterdir()) == []


def test_what_verification_sees(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4")
    clip = tmp_path / "clip.mp4"
    scan = scan_video(tmp_path / "long.mp4")
    cut_clips(tmp_path / "long.mp4", scan, [(Span(0, 40), clip)], Encoding())
    seconds = [i / 30 for i in range(40)]
    assert fault(clip, seconds) == ""
    assert fault(clip, seconds[:-1]) == "40 of 39 frames are there"
    assert fault(clip, [1.1 * s for s in seconds]) == "frames are at other times"
    with av.open(str(clip)) as container:
        second_key = [p for p in container.demux(video=0) if p.size and p.is_keyframe][1]
        place, size = second_key.pos, second_key.size
    content = bytearray(clip.read_bytes())
    content[place + 4 : place + size] = bytes(size - 4)
    clip.write_bytes(content)
    assert fault(clip, seconds) == "2 of 3 key frames decode"
