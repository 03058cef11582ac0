from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from opensora_repro.data.split.cut import Encoding, cut_clips, frame_times, read_sound
from opensora_repro.data.split.scenes import Scan, Span, plan_spans, restless_threshold, scan_video
from opensora_repro.data.video import DecodeError, frame_index, open_video, probe, read_frames

COLOURS = [(235, 20, 20), (20, 235, 20), (20, 20, 235), (235, 235, 20), (235, 20, 235), (20, 235, 235)]


def draw(size: int, shape: int, colour: int, grey: list[int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """One RGB frame: a filled circle, square or triangle on a plain dark background."""
    frame = np.full((size, size, 3), grey, dtype=np.uint8)
    x, y = (round(c * size * 16) for c in centre)
    r = round(radius * size * 16)
    corners = {1: [(-r, -r), (r, -r), (r, r), (-r, r)], 2: [(0, -r), (r, r), (-r, r)]}
    if shape == 0:
        cv2.circle(frame, (x, y), r, COLOURS[colour], -1, cv2.LINE_AA, shift=4)
    else:
        points = np.array([(x + dx, y + dy) for dx, dy in corners[shape]], dtype=np.int32)
        cv2.fillPoly(frame, [points], COLOURS[colour], cv2.LINE_AA, shift=4)
    return frame


def film(path: Path, size: int, scenes: int, seed: int, rate: int = 8) -> list[int]:
    """Write scenes of 10 to 16 frames, a shape moving across each; return the cuts."""
    rng = np.random.default_rng(seed)
    cuts, colour = [0], 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for _ in range(scenes):
            colour = (colour + int(rng.integers(1, 6))) % 6
            shape, axis, sign = int(rng.integers(3)), int(rng.integers(2)), int(rng.choice([-1, 1]))
            grey, radius = (rng.integers(8, 40) + rng.integers(-5, 6, 3)).clip(0, 50).tolist(), rng.uniform(0.15, 0.2)
            across, length = 0.5 + rng.uniform(-0.15, 0.15), int(rng.integers(10, 17))
            for share in np.linspace(-0.22, 0.22, length):
                along = 0.5 + sign * share
                centre = (along, across) if axis else (across, along)
                picture = draw(size, shape, colour, grey, centre, radius)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            cuts.append(cuts[-1] + length)
        container.mux(stream.encode(None))
    return cuts[1:-1]


@pytest.mark.parametrize(("size", "seed"), [(64, 0), (96, 1), (96, 2), (128, 3)])
def test_every_cut_between_moving_shapes(tmp_path: Path, size: int, seed: int) -> None:
    cuts = film(tmp_path / "long.mp4", size, 25, seed)
    scan = scan_video(tmp_path / "long.mp4", detector="adaptive")
    assert list(scan.cuts) == cuts
    assert len(scan.times) == probe(tmp_path / "long.mp4").num_frames
    found = scan_video(tmp_path / "long.mp4").cuts
    assert set(found) <= set(cuts)
    assert len(found) >= len(cuts) - 1  # a shape that turns into one of the ground's brightness might have moved away


def test_the_content_detector(tmp_path: Path) -> None:
    cuts = film(tmp_path / "long.mp4", 96, 8, 4)
    found = scan_video(tmp_path / "long.mp4", detector="content", threshold=15.0).cuts
    assert set(found) <= set(cuts)
    assert len(found) >= len(cuts) - 1
    assert scan_video(tmp_path / "long.mp4", detector="content", threshold=250.0).cuts == ()


def test_cuts_of_real_footage_at_variable_rate(videos_dir: Path) -> None:
    truth = json.loads((videos_dir / "long_dev_vfr.cuts.json").read_text())
    expected = [cut["frame"] for cut in truth["cuts"]]
    scan = scan_video(videos_dir / "long_dev_vfr.mp4")
    hits = [c for c in scan.cuts if any(abs(c - e) <= 2 for e in expected)]
    assert len(hits) == len(expected)
    assert len(scan.cuts) <= len(expected) + 1
    seconds = {cut["frame"]: cut["pts_s"] for cut in truth["cuts"]}
    assert all(abs(scan.seconds(e) - seconds[e]) < 0.001 for e in expected)


def test_the_level_follows_the_unrest() -> None:
    steady, restless = np.full(100, 1.0), np.r_[np.full(60, 1.0), np.full(40, 1.35)]
    assert restless_threshold(steady) == pytest.approx(2.1)
    assert restless_threshold(restless) == pytest.approx(3.3)
    assert restless_threshold(np.array([])) == 3.0


@pytest.mark.parametrize("name", ["corrupt_middle.mp4", "trunc_mdat_half.mp4", "trunc_fragmented.mp4"])
def test_damaged_sources_are_refused(videos_dir: Path, name: str) -> None:
    with pytest.raises(DecodeError, match=r"damaged: \d+ of \d+ frames decode"):
        scan_video(videos_dir / "bad" / name)


def test_plan() -> None:
    assert plan_spans(30, (10, 14)) == [Span(0, 10), Span(10, 14), Span(14, 30)]
    assert plan_spans(5, ()) == [Span(0, 5)]
    divided = plan_spans(100, (10, 90), max_frames=30)
    assert [(s.start, s.end, s.resplit) for s in divided] == [
        (0, 10, False), (10, 36, True), (36, 63, True), (63, 90, True), (90, 100, False)
    ]  # fmt: skip
    kept = plan_spans(40, (), min_frames=16, max_frames=16)  # even parts of 13 would all be too short
    assert [(s.start, s.end, s.resplit) for s in kept] == [(0, 16, True), (16, 32, True), (32, 40, True)]
    for length, limit, least in itertools.product((1, 17, 33, 64, 99), (16, 20), (8, 16)):
        spans = plan_spans(length, (), min_frames=least, max_frames=limit)
        assert (spans[0].start, spans[-1].end) == (0, length)
        assert all(a.end == b.start for a, b in itertools.pairwise(spans))
        assert max(map(len, spans)) <= limit


SOURCES = ["rotated_90.mp4", "anamorphic_sar4x3.mp4", "start_at_5s.mp4", "hevc_10bit.mp4", "vfr_30_10_4fps.mp4"]


@pytest.mark.parametrize("name", [*SOURCES, "odd_321x241_yuv444.mp4", "mpegts_renamed.mp4"])
def test_a_clip_shows_its_span_of_the_source(videos_dir: Path, tmp_path: Path, name: str) -> None:
    source, spans = videos_dir / "bad" / name, [Span(3, 21), Span(30, 40)]
    scan = scan_video(source)
    targets = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    cut_clips(source, scan, list(zip(spans, targets, strict=True)), Encoding())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    for span, target in zip(spans, targets, strict=True):
        clip = read_frames(target, start=0, count=len(span)).numpy().astype(int)
        height, width = clip.shape[1:3]
        original = read_frames(source, start=span.start, count=len(span)).numpy()[:, :height, :width].astype(int)
        apart = np.abs(clip - original).mean(axis=(1, 2, 3))
        assert apart.max() < 5  # every frame is its own source frame, compression aside
        assert np.abs((clip - original).mean(axis=(0, 1, 2))).max() < 2.5  # and no colour has drifted
        with open_video(target) as (_, stream):
            seconds = [float(t * stream.time_base) for t in frame_index(target).times]
            assert stream.codec_context.name == "h264"
        expected = [scan.seconds(i) - scan.seconds(span.start) for i in range(span.start, span.end)]
        assert seconds == pytest.approx(expected, abs=1e-4)
        assert len(frame_index(target).key_times) == -(-len(span) // 16)


def test_clips_hold_no_b_frames(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4", 64, 3, 5)
    scan = scan_video(tmp_path / "long.mp4")
    cut_clips(tmp_path / "long.mp4", scan, [(Span(0, 30), tmp_path / "clip.mp4")], Encoding(crf=30))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        kinds = [int(frame.pict_type) for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == Fraction(8)
    assert kinds == [1] + 15 * [2] + [1] + 13 * [2]  # I and P pictures


def test_an_unwritable_folder_is_not_the_sources_fault(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4", 64, 2, 6)
    scan = scan_video(tmp_path / "long.mp4")
    with pytest.raises(OSError, match="clip"):
        cut_clips(tmp_path / "long.mp4", scan, [(Span(0, 10), tmp_path / "nowhere" / "clip.mp4")], Encoding())


@pytest.mark.parametrize("name", ["rotated_90.mp4", "vfr_30_10_4fps.mp4"])
def test_a_smaller_clip_shows_the_same_frames(videos_dir: Path, tmp_path: Path, name: str) -> None:
    source, span, target = videos_dir / "bad" / name, Span(3, 21), tmp_path / "clip.mp4"
    full, scan = probe(source), scan_video(source)
    side = min(full.height, full.width) // 2 // 2 * 2
    cut_clips(source, scan, [(span, target)], Encoding(short_side=side, fast_decode=True))
    info = probe(target)
    assert min(info.height, info.width) == side
    assert info.width / info.height == pytest.approx(full.width / full.height, rel=0.03)
    clip = read_frames(target, start=0, count=len(span)).numpy().astype(int)
    wide = read_frames(source, start=span.start, count=len(span)).numpy()
    small = np.stack([cv2.resize(f, (info.width, info.height), interpolation=cv2.INTER_AREA) for f in wide])
    assert np.abs(clip - small).mean(axis=(1, 2, 3)).max() < 5


def test_frames_at_a_new_rate_are_those_shown_then() -> None:
    scan = Scan((0, 1, 2, 5, 8, 9, 10, 11), Fraction(1, 10), ())
    assert frame_times(scan, Span(1, 6), None) == (Fraction(1, 10), [[0], [1], [4], [7], [8]])
    base, shown = frame_times(scan, Span(1, 6), Fraction(5))  # 0.9 s from frame 1 on
    assert base == Fraction(1, 5)
    assert shown == [[0], [1], [2, 3], [], []]
    assert frame_times(scan, Span(0, 8), Fraction(10))[1] == [[0], [1], [2, 3, 4], [5, 6, 7], [8], [9], [10], [11]]


def test_a_clip_at_another_rate(tmp_path: Path) -> None:
    film(tmp_path / "long.mp4", 64, 3, 5, rate=24)
    scan = scan_video(tmp_path / "long.mp4")
    how = Encoding(fps=Fraction(8), crf=10)
    cut_clips(tmp_path / "long.mp4", scan, [(Span(2, 26), tmp_path / "clip.mp4")], how)
    assert probe(tmp_path / "clip.mp4").fps == pytest.approx(8)
    clip = read_frames(tmp_path / "clip.mp4", start=0, count=8).numpy().astype(int)
    assert np.abs(clip - read_frames(tmp_path / "long.mp4", start=2, count=8, step=3).numpy()).mean() < 3


def keyed(path: Path, counts: list[int], sound: bool = False) -> None:
    """Write scenes, each from a key frame on and with B-frames, and a tone that grows louder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "999", "forced-idr": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if sound:
            track = container.add_stream("aac", rate=16000, layout="mono")
            at = np.arange(1600 * sum(counts))
            tone = (np.sin(at / 8) * at / len(at)).astype(np.float32)[None]
            for i in range(0, tone.shape[1], 1024):
                part = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone[:, i : i + 1024]), "fltp", "mono")
                part.sample_rate, part.pts, part.time_base = 16000, i, Fraction(1, 16000)
                container.mux(track.encode(part))
            container.mux(track.encode(None))
        for number, count in enumerate(counts):
            for i in range(count):
                picture = draw(96, 0, number % 6, [20, 20, 20], (0.3 + 0.01 * i, 0.5), 0.2)[:64]
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pict_type = 1 if i == 0 else 0
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


def test_copies_where_the_span_lies_between_key_frames(tmp_path: Path) -> None:
    keyed(tmp_path / "long.mp4", [14, 20, 12])
    scan = scan_video(tmp_path / "long.mp4")
    spans = [Span(0, 14), Span(14, 34), Span(34, 46)]
    clips = [(span, tmp_path / f"{span.start}.mp4") for span in spans]
    cut_clips(tmp_path / "long.mp4", scan, clips, Encoding(copy=True))
    source = packets(tmp_path / "long.mp4")
    for span, target in clips:
        assert packets(target) == source[span.start : span.end]
        copied = read_frames(target, start=0, count=len(span)).numpy()
        assert (copied == read_frames(tmp_path / "long.mp4", start=span.start, count=len(span)).numpy()).all()
    odd = [(Span(0, 10), tmp_path / "a.mp4"), (Span(20, 34), tmp_path / "b.mp4")]  # a key frame at one end only
    cut_clips(tmp_path / "long.mp4", scan, odd, Encoding(copy=True))
    assert [probe(target).num_frames for _, target in odd] == [10, 14]
    assert packets(tmp_path / "a.mp4")[0] != source[0]


def test_sound_goes_with_its_frames(tmp_path: Path) -> None:
    keyed(tmp_path / "long.mp4", [20, 30], sound=True)
    scan = scan_video(tmp_path / "long.mp4")
    clips = [(Span(20, 40), tmp_path / "loud.mp4")]
    cut_clips(tmp_path / "long.mp4", scan, clips, Encoding(audio=True))
    sound = read_sound(tmp_path / "loud.mp4", 0.0, 2.0)
    assert sound is not None
    samples, rate = sound
    assert (samples.shape, rate) == ((1, 32000), 16000)
    loudness = [float(np.abs(part).max()) for part in np.split(samples[0, 1600:-1600], 9)]
    assert loudness == pytest.approx(np.linspace(0.46, 0.76, 9), abs=0.06)  # of the third and fourth second
    cut_clips(tmp_path / "long.mp4", scan, [(Span(20, 40), tmp_path / "mute.mp4")], Encoding())
    assert read_sound(tmp_path / "mute.mp4", 0.0, 2.0) is None
