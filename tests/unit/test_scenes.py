"""Synthetic shots, each with one thing that is a cut or only looks like one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from benchmarks.split import f1
from opensora_repro.data.split.likeness import HEIGHT, WIDTH, sampled, thumbnails
from opensora_repro.data.split.scenes import Span, plan_spans, scan_video
from opensora_repro.data.split.shots import ShotDetector

SIZE = (160, 288)  # height, width
Frames = list[np.ndarray]


def place(seed: int, height: int = SIZE[0], width: int = SIZE[1], grain: int = 24) -> np.ndarray:
    """A picture uint8 [H, W, 3] of soft patches and finer detail: somewhere a camera could point at."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 220, (height // grain + 1, width // grain + 1, 3)).astype(np.float32)
    fine = rng.normal(0, 18, (height // 6 + 1, width // 6 + 1, 1)).astype(np.float32)
    picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (picture + cv2.resize(fine, (width, height))[..., None]).clip(0, 255).astype(np.uint8)


def pan(seed: int, count: int, speed: float = 2.0, start: float = 0.0) -> Frames:
    """A camera moving over a wide place, `speed` pixels a frame."""
    wide = place(seed, width=SIZE[1] + int(start + abs(speed) * count) + 8)
    return [wide[:, round(start + speed * i) :][:, : SIZE[1]] for i in range(count)]


def noisy(frames: Iterable[np.ndarray], amount: float = 4.0) -> Frames:
    rng = np.random.default_rng(7)
    return [(f + rng.normal(0, amount, f.shape)).clip(0, 255).astype(np.uint8) for f in frames]


def mixed(one: Frames, other: Frames) -> Frames:
    """Frames of two shots, the first fading into the second."""
    shares = np.linspace(0, 1, len(one) + 2)[1:-1]
    return [(a * (1 - s) + b * s).astype(np.uint8) for a, b, s in zip(one, other, shares, strict=True)]


def feed(detector: ShotDetector, frame: np.ndarray, rate: float = 30) -> None:
    y, u, v = cv2.split(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2YUV))
    (picture,) = thumbnails([sampled([y, u, v])])
    detector.add(picture, detector.count / rate)


def shots(frames: Iterable[np.ndarray], rate: float = 30) -> tuple[list[int], list[tuple[int, int]]]:
    detector = ShotDetector()
    for frame in frames:
        feed(detector, frame, rate)
    found = detector.finish()
    return list(found.cuts), list(found.transitions)


def test_hard_cuts_between_moving_shots() -> None:
    assert shots(pan(1, 30) + pan(2, 24, 5) + pan(3, 9) + pan(4, 30)) == ([30, 54, 63], [])


def test_a_cut_between_similar_pictures() -> None:
    """The same place, and what stands in it elsewhere."""

    def view(x: int, i: int) -> np.ndarray:
        picture = place(5)
        cv2.circle(picture, (x + i, 80), 38, (250, 250, 240), -1)
        return picture

    assert shots(noisy([view(60, i) for i in range(30)] + [view(200, i) for i in range(30)]))[0] == [30]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_flash_is_no_cut(length: int) -> None:
    frames = pan(6, 60)
    for i in range(30, 30 + length):
        frames[i] = (frames[i] * 0.2 + 200).astype(np.uint8)
    assert shots(frames) == ([], [])


def test_a_whip_pan_is_no_cut() -> None:
    wide = place(8, width=2400)
    at = np.cumsum(np.r_[np.full(20, 1.0), np.linspace(1, 70, 12), np.linspace(70, 1, 12), np.full(20, 1.0)])
    whip = []
    for x, step in zip(at, np.diff(at, append=at[-1] + 1), strict=True):
        blur = max(1, int(step))  # an open shutter smears what moves
        whip.append(cv2.blur(wide, (blur, 1))[:, int(x) : int(x) + SIZE[1]])
    assert shots(whip)[0] == []


def test_a_still_with_noise_holds_no_cut() -> None:
    assert shots(noisy([place(9)] * 60, 6)) == ([], [])


def test_a_title_that_fades_in_is_no_dissolve() -> None:
    bare, titled = place(10), place(10)
    cv2.putText(titled, "TITLE", (60, 100), cv2.FONT_HERSHEY_DUPLEX, 2, (255, 255, 255), 8)
    assert shots([bare] * 30 + mixed([bare] * 20, [titled] * 20) + [titled] * 30) == ([], [])


@pytest.mark.parametrize("length", [6, 12, 24, 40])
def test_a_dissolve_is_one_cut_inside_it(length: int) -> None:
    one, other = pan(11, 40 + length, 1), pan(12, 40 + length, 1)
    cuts, transitions = shots(one[:40] + mixed(one[40:], other[:length]) + other[length:])
    assert len(cuts) == len(transitions) == 1
    assert 38 <= cuts[0] <= 42 + length


@pytest.mark.parametrize("black", [1, 8])
def test_a_fade_through_black_is_one_cut(black: int) -> None:
    nothing = np.zeros((*SIZE, 3), np.uint8)
    one, other = pan(13, 50), pan(14, 50)
    frames = one[:38] + mixed(one[38:], [nothing] * 12) + [nothing] * black + mixed([nothing] * 12, other[:12])
    cuts, transitions = shots(frames + other[12:])
    assert len(cuts) == 1
    assert 38 <= cuts[0] <= 62 + black
    assert transitions[0][0] <= 45
    assert transitions[0][1] >= 55 + black


RATES = (12, 30, 60)


def seconds(rate: int, *parts: tuple[float, Frames | None]) -> tuple[Frames, int]:
    """A shot of wide movement at a frame rate, and what covers it: (length in seconds, frames to cycle or nothing)."""
    total = round(sum(length for length, _ in parts) * rate)
    frames, at = pan(31, total, 12 / rate), 0.0
    for length, cover in parts:
        for i in range(round(at * rate), round((at + length) * rate)):
            frames[i] = frames[i] if cover is None else cover[i % len(cover)]
        at += length
    return frames, total


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("length", [0.1, 0.35, 0.7])
def test_a_blank_picture_between_two_of_one_shot_is_no_cut(rate: int, level: int, length: float) -> None:
    blank = np.full((*SIZE, 3), level, np.uint8)
    frames, _ = seconds(rate, (1.5, None), (length, [blank]), (1.5, None))
    assert shots(frames, rate) == ([], [])


@pytest.mark.parametrize("rate", RATES)
def test_interference_and_what_passes_close_by_are_no_cuts(rate: int) -> None:
    cover = [place(40 + i, grain=10) for i in range(3)]
    frames, _ = seconds(rate, (1.5, None), (0.4, cover), (1.5, None), (0.3, [place(50, grain=80)]), (1.5, None))
    assert shots(frames, rate) == ([], [])


def lamp(frame: np.ndarray) -> np.ndarray:
    """Light from the left, into the clipped."""
    fall = np.linspace(2.2, 1.2, SIZE[1])[None, :, None]
    return (frame * fall + 25).clip(0, 255).astype(np.uint8)


def dark(frame: np.ndarray) -> np.ndarray:
    return (frame * 0.15).astype(np.uint8)


def warm(frame: np.ndarray) -> np.ndarray:
    return (frame * [1.25, 0.9, 0.5]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("light", [lamp, dark, warm])
def test_light_that_changes_and_stays_is_no_cut(rate: int, light: Callable[[np.ndarray], np.ndarray]) -> None:
    frames = noisy(pan(32, 4 * rate, 30 / rate), 2)
    lit = frames[: 2 * rate] + [light(f) for f in frames[2 * rate :]]
    assert shots(lit, rate)[0] == []


def test_another_shot_in_another_light_is_a_cut() -> None:
    assert shots(pan(33, 40) + [dark(f) for f in pan(34, 40)])[0] == [40]
    assert shots([warm(f) for f in pan(33, 40)] + [lamp(f) for f in pan(35, 40)])[0] == [40]


@pytest.mark.parametrize("rate", RATES)
def test_insets_are_no_cuts(rate: int) -> None:
    """A banner, then a picture in the picture that has a cut of its own."""
    frames = pan(36, 6 * rate, 30 / rate)
    for frame in frames[rate : 2 * rate]:
        frame[120:150, 10:250] = (20, 40, 160)
    for at, inner in ((3, place(37)), (4, place(38))):
        for frame in frames[at * rate : (at + 1) * rate]:
            frame[10:70, 180:280] = cv2.resize(inner, (100, 60))
    assert shots(frames, rate) == ([], [])


@pytest.mark.parametrize("rate", RATES)
def test_a_cut_within_a_letterbox_is_one(rate: int) -> None:
    """What is around changes nothing there, either, but shows nothing."""
    frames = pan(36, rate, 30 / rate) + pan(39, rate, 30 / rate)
    for frame in frames:
        frame[:45] = frame[-45:] = 0
    assert shots(frames, rate)[0] == [rate]


@pytest.mark.parametrize("rate", RATES)
def test_the_end_of_a_freeze_is_no_cut(rate: int) -> None:
    frames = pan(41, 4 * rate, 60 / rate)
    half = rate // 2
    frames[2 * rate - half : 2 * rate] = [frames[2 * rate - half]] * half
    assert shots(frames, rate)[0] == []


@pytest.mark.parametrize("rate", RATES)
def test_the_span_of_a_dissolve_is_tight_at_any_rate(rate: int) -> None:
    """With a camera that moves before and after it."""
    length = round(0.5 * rate)
    one, other = pan(11, 2 * rate + length, 15 / rate), pan(12, 2 * rate + length, 15 / rate)
    cuts, ((start, end),) = shots(one[: 2 * rate] + mixed(one[2 * rate :], other[:length]) + other[length:], rate)
    allowed = max(2, 0.1 * rate)
    assert abs(start - 2 * rate) <= allowed
    assert abs(end - 2 * rate - length) <= allowed
    assert cuts == [(start + end) // 2]


def page(seed: int, height: int = 1000) -> np.ndarray:
    """Lines of text and a few blocks on white, uint8 [height, W, 3]."""
    rng = np.random.default_rng(seed)
    sheet = np.full((height, SIZE[1], 3), 250, np.uint8)
    y = 8
    while y < height - 60:
        if rng.random() < 0.2:
            sheet[y : y + 45, 15 : int(rng.integers(60, 250))] = rng.integers(0, 255, 3)
            y += 60
            continue
        for x in range(10, int(rng.integers(60, 280)), 7):
            sheet[y : y + 6, x : x + int(rng.integers(1, 6))] = 30
        y += int(rng.integers(9, 18))
    return sheet


@pytest.mark.parametrize("step", [53, 71, 90])
def test_a_page_that_is_scrolled_is_no_cut(step: int) -> None:
    sheet = page(1)
    frames = [sheet[at * step :][: SIZE[0]] for at in range(6) for _ in range(15)]
    assert shots(frames) == ([], [])


def test_a_window_over_little_else_is_no_cut() -> None:
    """What is around has few regions that tell anything: a page's lines, a dark picture's one bright thing."""
    sheet, dark = page(2)[: SIZE[0]], np.zeros((*SIZE, 3), np.uint8)
    cv2.circle(dark, (60, 110), 40, (90, 110, 140), -1)
    for ground in (sheet, dark):
        window = ground.copy()
        window[20:100, 130:270] = place(7)[20:100, 130:270]
        assert shots([ground] * 40 + [window] * 60 + [ground] * 40) == ([], [])


def test_pages_that_differ_are_cuts() -> None:
    assert shots([page(3)[: SIZE[0]]] * 30 + [page(4)[500:][: SIZE[0]]] * 30)[0] == [30]


@pytest.mark.parametrize("rate", RATES)
def test_cuts_to_black_and_from_it_are_one_between_two_shots(rate: int) -> None:
    black = [np.zeros((*SIZE, 3), np.uint8)] * (rate // 4)
    cuts, ((start, end),) = shots(pan(1, rate) + black + pan(2, rate), rate)
    assert len(cuts) == 1 and abs(start - rate) <= 1 and abs(end - rate - len(black)) <= 2


@pytest.mark.parametrize("length", [5, 7])
def test_a_quick_wipe_is_one_cut(length: int) -> None:
    one, other = pan(11, 30 + length, 0.4), pan(12, 30 + length, 0.4)
    wiped = [a.copy() for a in one[30:]]
    for i, frame in enumerate(wiped):
        edge = SIZE[1] * (i + 1) // (length + 1)
        frame[:, :edge] = other[i][:, :edge]
    (cut,), _ = shots(one[:30] + wiped + other[length:])
    assert 28 <= cut <= 32 + length


def test_a_caption_on_black_between_two_fades_is_one_cut() -> None:
    nothing = np.zeros((*SIZE, 3), np.uint8)
    one, other = pan(13, 50), pan(14, 50)
    frames = (
        one[:38] + mixed(one[38:], [nothing] * 12) + [nothing] * 12 + mixed([nothing] * 12, other[:12]) + other[12:]
    )
    for frame in frames:
        cv2.putText(frame, "a caption that stays", (60, 150), cv2.FONT_HERSHEY_PLAIN, 0.8, (60, 60, 60))
    cuts, transitions = shots(frames)
    assert len(cuts) == len(transitions) == 1
    assert 50 <= cuts[0] <= 62


@pytest.mark.parametrize("rate", RATES)
def test_hard_cuts_at_any_rate(rate: int) -> None:
    speed = 60 / rate
    half = rate // 2
    assert shots(pan(1, rate, speed) + pan(2, half, 2 * speed) + pan(3, rate, speed), rate) == ([rate, rate + half], [])


@pytest.mark.parametrize("repeat", [2, 3])
def test_repeated_frames(repeat: int) -> None:
    """10 or 15 frames a second stored at 30, the cut right after a repeated frame."""
    slow = pan(15, 20, 6) + pan(16, 20, 6)
    assert shots([f for f in slow for _ in range(repeat)])[0] == [20 * repeat]


def test_a_blended_frame_between_two_shots_is_one_cut() -> None:
    one, other = pan(17, 31), pan(18, 31)
    cuts, transitions = shots(one[:30] + mixed(one[30:], other[:1]) + other[1:])
    assert len(cuts) == 1
    assert abs(cuts[0] - 30) <= 2
    assert all(30 <= a < b <= 31 for a, b in transitions)


def test_short_videos() -> None:
    assert shots([]) == ([], [])
    assert shots(pan(19, 1)) == ([], [])
    assert shots(pan(19, 2)) == ([], [])


@pytest.mark.parametrize("shape", [(36, 64), (20, 30), (500, 300), (1080, 1920)])
def test_thumbnails_of_any_shape(shape: tuple[int, int]) -> None:
    plane = np.full(shape, 90, np.uint8)
    ((bright, colour),) = thumbnails([sampled([plane, plane[::2, ::2], plane[::2, ::2]])])
    assert (bright.shape, colour.shape) == ((HEIGHT, WIDTH), (18, 16))
    assert set(np.unique(bright)) | set(np.unique(colour)) == {90}


def test_a_cut_in_the_dark() -> None:
    frames = [(f * 0.12).astype(np.uint8) for f in pan(1, 40) + pan(2, 40)]
    assert shots(noisy(frames, 1.0)) == ([40], [])


@pytest.mark.parametrize("black", [40, 200])
def test_a_long_black_belongs_to_the_scene_before(black: int) -> None:
    nothing = np.zeros((*SIZE, 3), np.uint8)
    one, other = pan(21, 50), pan(22, 50)
    frames = one[:38] + mixed(one[38:], [nothing] * 12) + [nothing] * black + mixed([nothing] * 12, other[:12])
    cuts, _ = shots(frames + other[12:])
    assert len(cuts) == 1
    assert 48 + black <= cuts[0] <= 62 + black


def test_what_is_settled_stays() -> None:
    """On the way, everything before `settled()` is as at the end, and few frames are unsettled."""
    nothing = np.zeros((*SIZE, 3), np.uint8)
    one, other, last = pan(11, 60, 1), pan(12, 60, 1), pan(13, 90, 2)
    frames = pan(1, 40) + one[:40] + mixed(one[40:], other[:20]) + other[20:48] + mixed(other[48:], [nothing] * 12)
    frames += [nothing] * 60 + mixed([nothing] * 8, last[:8]) + last[8:] + pan(3, 50, 4) + pan(5, 7) + pan(6, 30)
    detector, seen = ShotDetector(), []
    for frame in frames:
        feed(detector, frame)
        seen.append((detector.settled(), detector.cuts, detector.transitions))
        assert detector.count - detector.settled() <= 170
    final = detector.finish()
    assert len(final.cuts) == 6
    assert seen[-1][0] > len(frames) - 70
    for settled, cuts, transitions in seen:
        assert [c for c in cuts if c < settled] == [c for c in final.cuts if c < settled]
        assert [t for t in transitions if t[0] < settled] == [t for t in final.transitions if t[0] < settled]


def test_a_scan_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "one.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(place(20), format="rgb24")))
        container.mux(stream.encode(None))
    scan = scan_video(path)
    assert (len(scan.times), scan.cuts, scan.transitions) == (1, (), ())


def test_trimming_leaves_transitions_out() -> None:
    assert plan_spans(100, (30, 60), transitions=[(50, 70)]) == [Span(0, 30), Span(30, 60), Span(60, 100)]
    assert plan_spans(100, (30, 60), transitions=[(50, 70)], trim=0) == [Span(0, 30), Span(30, 50), Span(70, 100)]
    assert plan_spans(100, (30, 60), transitions=[(50, 70)], trim=2) == [Span(0, 28), Span(32, 48), Span(72, 100)]
    assert plan_spans(10, (3, 5), trim=2) == [Span(0, 1), Span(7, 10)]


def test_a_cut_finds_its_transition_without_looking_through_all() -> None:  # or this would take half an hour
    cuts = range(50, 10_000_000, 50)
    spans = plan_spans(10_000_000, cuts, transitions=[(cut - 5, cut + 5) for cut in cuts[::2]], trim=1)
    assert len(spans) == len(cuts) + 1 and spans[1] == Span(56, 99) and spans[2] == Span(101, 144)


@pytest.mark.parametrize(
    ("name", "least"),
    [("long_dev.mp4", 1.0), ("long_dev_vfr.mp4", 1.0), ("fx_dev.mp4", 0.9), ("fx_dev_vfr.webm", 0.9)],
)
def test_real_footage(videos_dir: Path, name: str, least: float) -> None:
    truth = json.loads((videos_dir / name).with_suffix(".cuts.json").read_text())["cuts"]
    assert f1(scan_video(videos_dir / name).cuts, truth) >= least
