"""Scores of made pictures whose answers are known."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from opensora_repro.data.clip_frames import RUN_FRAMES, RUNS, grey, middles, middles_of, read_runs, runs_of, spread
from opensora_repro.data.score.measure import SCORES, measure_clip
from opensora_repro.data.score.pixels import (
    bar_shares,
    black_share,
    brightness,
    flow_fields,
    jitter,
    motion,
    picture_box,
    repeats,
    sharpness,
    static_share,
    text_area,
    watermark_area,
)
from opensora_repro.data.video import DecodeError
from opensora_repro.data.write import write_video
from tests.made_pictures import moving, texture

FPS = 10.0


@pytest.mark.parametrize("step", [(3.0, 4.0), (1.0, 0.0), (0.0, 0.0)])
def test_motion_is_that_of_a_moved_picture(step: tuple[float, float]) -> None:
    flow = flow_fields(moving([step] * 7))
    assert motion([flow], FPS) == pytest.approx(np.hypot(*step) / 128 * FPS, rel=0.1, abs=0.005)
    larger = flow_fields(moving([(2 * step[0], 2 * step[1])] * 7, 256, 384))
    assert motion([larger], FPS) == pytest.approx(np.hypot(*step) / 128 * FPS, rel=0.15, abs=0.005)


def test_a_steady_pan_does_not_shake_and_a_shaken_one_does() -> None:
    pan = [(2.0 + 0.3 * t, 0.0) for t in range(7)]
    shaken = [(x, 3.0 * (-1) ** t) for t, (x, _) in enumerate(pan)]
    steady, rough = (moving(steps) for steps in (pan, shaken))
    scores = [jitter([flow_fields(frames)], [repeats(frames)], FPS) for frames in (steady, rough)]
    assert scores[0] == pytest.approx(0, abs=0.02)
    assert scores[1] == pytest.approx(3 / 128 * FPS, rel=0.15)


def test_repeated_frames_are_static_and_no_shake() -> None:
    frames = np.repeat(moving([(3.0, 0.0)] * 5), 2, axis=0)[:10]  # each frame twice
    noise = np.random.default_rng(0).integers(-2, 3, frames.shape)
    repeated = repeats(np.clip(frames + noise, 0, 255).astype(np.uint8))
    assert repeated.tolist() == [True, False] * 4 + [True]
    assert static_share([repeated]) == pytest.approx(5 / 9)
    assert jitter([flow_fields(frames)], [repeats(frames)], FPS) == pytest.approx(0, abs=0.02)
    small_mover = np.repeat(frames[:1], 8, axis=0)
    for t in range(8):
        small_mover[t, 40:50, 10 + 8 * t : 20 + 8 * t] = 255
    assert not repeats(small_mover).any()


def test_an_image_has_no_motion() -> None:
    frame = texture()[None]
    flows, repeated = [flow_fields(frame)], [repeats(frame)]
    assert motion(flows, 0.0) is static_share(repeated) is jitter(flows, repeated, 0.0) is None
    assert watermark_area(frame) is None


def test_a_blurred_picture_is_less_sharp() -> None:
    sharp = texture()[None]
    values = [sharpness(np.stack([cv2.GaussianBlur(sharp[0], (0, 0), sigma)])) for sigma in (0.5, 1, 2, 4)]
    assert sharpness(sharp) > values[0] and values == sorted(values, reverse=True)
    assert values[0] > 10 * values[-1]


def test_brightness_and_black_frames() -> None:
    frames = np.zeros((4, 60, 80), dtype=np.uint8)
    frames[0] = 255
    frames[1, :1] = 200  # 1 in 60 rows: still black
    frames[2, :3] = 200  # no longer
    assert brightness(frames[:1]) == 1 and brightness(frames[3:]) == 0
    assert black_share(frames) == 0.5


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(0, 0, 0, 0), (20, 20, 0, 0), (0, 0, 30, 24), (8, 16, 10, 0)]
)
def test_bars_of_known_sizes(top: int, bottom: int, left: int, right: int) -> None:
    frames = moving([(2.0, 1.0)] * 3) // 2 + 60
    frames[:, :top] = 3
    frames[:, 128 - bottom :] = 3
    frames[:, :, :left] = 3
    frames[:, :, 192 - right :] = 3
    box = picture_box(frames)
    assert box == (top, 128 - bottom, left, 192 - right)
    assert bar_shares(box, 128, 192) == pytest.approx(((top + bottom) / 128, (left + right) / 192))


def test_a_dark_picture_has_no_bars() -> None:
    assert picture_box(np.full((3, 40, 60), 5, np.uint8)) == (0, 40, 0, 60)
    lamp = np.full((3, 100, 100), 5, np.uint8)
    lamp[:, 60:64, 50:54] = 255
    assert picture_box(lamp) == (0, 100, 0, 100)


def stamp(frames: np.ndarray, text: str, height: int) -> tuple[np.ndarray, float]:
    """Write light text with a dark rim into all frames; returns them and the share that its box takes."""
    from PIL import Image, ImageDraw, ImageFont

    masks = []
    for rim in (1, 0):
        image = Image.new("L", frames.shape[:0:-1])
        ImageDraw.Draw(image).text((20, 30), text, fill=255, font=ImageFont.load_default(height), stroke_width=rim)
        masks.append(np.asarray(image) > 100)
    marked = np.where(masks[1], 250, np.where(masks[0], 10, frames)).astype(np.uint8)
    _, _, width, tall = cv2.boundingRect(masks[1].astype(np.uint8))
    return marked, width * tall / masks[1].size


def test_text_that_stays_is_seen_and_text_that_runs_is_not() -> None:
    frames = moving([(14.0, 9.0)] * 5, 256, 384)
    assert text_area(frames) < 0.005
    for height in (12, 24):
        marked, share = stamp(frames, "Some words in a row", height)
        assert share * 0.8 < text_area(marked) < share * 2
    words, _ = stamp(np.full((1, 256, 900), 128, np.uint8), "Some words in a row", 24)
    running = np.stack([words[0, :, 10 * t : 10 * t + 384] for t in range(6)])
    assert text_area(running) < 0.005


def test_a_watermark_is_what_stays_over_a_changing_picture() -> None:
    frames = moving([(14.0, 9.0)] * 5, 256, 384)
    assert watermark_area(frames) < 0.005
    logo = frames.copy()
    logo[:, 200:240, 300:360] = frames[:, 200:240, 300:360] // 2  # half-transparent: its rim stays
    for image in logo:
        cv2.circle(image, (60, 60), 25, 255, 4)
    ring = 2 * np.pi * 25 * 4 / frames[0].size
    assert 0.5 * ring < watermark_area(logo) < 3 * ring
    assert watermark_area(np.repeat(logo[:1], 6, axis=0)) is None  # nothing moves: nothing can be told


def test_which_frames_are_read() -> None:
    assert runs_of(1) == [range(1)] and runs_of(24) == [range(24)]
    for num_frames in (25, 26, 31, 100, 9999):
        runs = runs_of(num_frames)
        frames = [frame for run in runs for frame in run]
        assert len(runs) == RUNS and all(len(run) == RUN_FRAMES for run in runs)
        assert frames == sorted(set(frames)) and frames[0] >= 0 and frames[-1] < num_frames
        numbers = [np.array(run) for run in runs]
        assert middles(numbers, num_frames).tolist() == middles_of(num_frames)
        assert spread(numbers).tolist() == [run[end] for run in runs for end in (0, -1)]
    assert middles([np.arange(7)], 7).tolist() == middles_of(7)
    assert spread([np.arange(3)]).tolist() == [0, 1, 2]


def test_a_clip_is_measured_whole(tmp_path: Path) -> None:
    frames = moving([(3.0, 0.0)] * 39, 96, 128)
    write_video(tmp_path / "clip.mp4", np.repeat(frames[..., None], 3, axis=3), FPS)
    measured = measure_clip(tmp_path / "clip.mp4", num_frames=40, fps=FPS, names=list(SCORES))
    assert measured["motion"] == pytest.approx(3 / 96 * FPS, rel=0.1)
    assert measured["static_share"] == measured["black_share"] == measured["letterbox"] == 0
    assert len(bytes.fromhex(measured["code"])) == 24
    assert len(grey(read_runs(tmp_path / "clip.mp4", 40)[2])) == RUN_FRAMES
    with pytest.raises(DecodeError, match="ends early"):
        measure_clip(tmp_path / "clip.mp4", num_frames=60, fps=FPS, names=["motion"])


def test_records_of_millions_are_not_held(tmp_path: Path) -> None:
    """A number a column and clip is: a record is gone when those after it are read."""
    from opensora_repro.data.score.found import Found, packed
    from opensora_repro.data.tables import BATCH

    class Record(dict[str, Any]):
        pass

    alive, most = list[weakref.ref[Record]](), 0

    def records() -> Iterator[Record]:
        nonlocal most
        for n in range(3 * BATCH):
            record = Record(error="no") if n % 5 == 0 else Record(motion=None if n % 5 == 1 else float(n), code="")
            alive.append(weakref.ref(record))
            yield record
            if n % BATCH == 0:
                most = max(most, sum(one() is not None for one in alive))

    found = Found.of(records())
    assert most <= BATCH + 1
    assert found.good[:6].tolist() == [False, True, True, True, True, False] and len(found.good) == 3 * BATCH
    motion = found.columns["motion"].to_pylist()
    assert motion[:5] == [None, 2.0, 3.0, 4.0, None]
    assert len(motion) == len(found.codes) == sum(n % 5 > 0 for n in range(3 * BATCH))
    embedding = packed(np.ones(3))
    told = [
        {"aesthetic": 1.0, "embedding": embedding} if number else {"error": "dark"} for number in range(len(motion))
    ]
    found.add(told, tmp_path)
    assert found.good[:3].tolist() == [False, False, True] and found.columns["motion"].to_pylist()[:2] == [2.0, 3.0]
    assert len(found.columns["aesthetic"]) == len(found.vectors) == len(motion) - 1
    assert found.vectors.shape[1] == 3 and found.embedded.tolist() == list(range(len(motion) - 1))
