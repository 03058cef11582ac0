"""One motion filmed at many rates: read by time it has one speed, and evenly all of it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch

from opensora_repro.config import ConfigError, DataConfig, load_config, parse_config
from opensora_repro.data.buckets import assigned
from opensora_repro.data.cache import FIELDS, CacheRows, LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.sample_frames import clip_times, evenly, frame_window, frames_at_rate, time_window
from opensora_repro.data.sampler import BatchSampler, Schedule, SharedBatches, everything, keyed_generator
from opensora_repro.frozen.encoder import Encoded, open_encoder
from opensora_repro.training.batches import CacheFeed, ClipFeed
from opensora_repro.training.fill import CacheFill, cache_fingerprint
from tests.frames import write_manifest
from tests.made_streams import numbers, write_numbered
from tests.tiny_models import make_tiny_text, make_tiny_vae

TICKS = 600  # a second
SECONDS, SPEED = 4.0, 56.0  # pixels a second
HEIGHT, WIDTH, SIDE = 32, 256, 16
GAPS = (40, 60) * 12 + (5, 15) * 60  # ticks between frames at a variable rate: few a second at first, then many
DATA = DataConfig(num_frames=12, fps=8.0, height=HEIGHT, width=WIDTH, flip=False, num_workers=0)


def film(path: Path, times: Sequence[int]) -> Path:
    """A white square that moves to the right over a dark ground, seen at each of `times` (ticks)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=60, options={"crf": "10", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS)
        for time in times:
            picture = np.full((HEIGHT, WIDTH, 3), 16, dtype=np.uint8)
            left = round(SPEED * time / TICKS)
            picture[8 : 8 + SIDE, left : left + SIDE] = 235
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, TICKS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def ticks(name: str) -> list[int]:
    if name == "variable":
        return [0, *np.cumsum(GAPS)[:-1].tolist()]
    return list(range(0, int(SECONDS * TICKS), TICKS // int(name)))


def places(clip: Clip | BadSample) -> np.ndarray:
    """Where the square is in each frame, pixels from the left."""
    assert isinstance(clip, Clip)
    columns = clip.pixels[:, HEIGHT // 2, :, 1].numpy() > 127
    return np.array([row.nonzero()[0].mean() for row in columns]) - (SIDE - 1) / 2


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """A manifest for each rate; in all of them the clip has one id."""
    folder = tmp_path_factory.mktemp("walks")
    found = {}
    for name in ("12", "24", "30", "60", "variable"):
        times = ticks(name)
        path = film(folder / f"{name}.mp4", times)
        fps = (len(times) - 1) * TICKS / times[-1]
        found[name] = pd.DataFrame(
            {"id": ["walk"], "path": [str(path)], "caption": ["a walk"], "num_frames": [len(times)], "fps": [fps],
             "height": [HEIGHT], "width": [WIDTH]}
        )  # fmt: skip
    return found


def dataset(walk: pd.DataFrame, folder: Path, data: DataConfig, *, augment: bool = True) -> ClipDataset:
    write_manifest(walk, folder / "manifest.parquet")
    return ClipDataset(folder / "manifest.parquet", data, 3, augment=augment)


def source_frame(name: str) -> float:
    """Pixels from one frame of the film to the next, where they are farthest apart."""
    return SPEED * max(GAPS if name == "variable" else [TICKS // int(name)]) / TICKS + 1  # and what is rounded


@pytest.mark.parametrize("augment", [True, False])
def test_a_motion_has_one_speed(walks: dict[str, pd.DataFrame], tmp_path: Path, augment: bool) -> None:
    """And its windows begin at one moment, which belongs to seed, epoch and id."""
    expected = None
    for name, walk in walks.items():
        found = places(dataset(walk, tmp_path, DATA, augment=augment).load(5, 0))
        moved = SPEED * np.arange(12) / DATA.fps
        assert np.abs(found - found[0] - moved).max() <= source_frame(name), name
        expected = found if expected is None else expected
        assert np.abs(found - expected).max() <= source_frame(name) + source_frame("12"), name
    by_number = replace(DATA, fps=0.0, frame_interval=1)
    far = [np.ptp(places(dataset(walks[name], tmp_path, by_number).load(5, 0))) for name in ("12", "60")]
    assert far[0] > 4 * far[1]  # which no time would make equal


def test_windows_are_keyed_draws_from_all_of_the_clip(walks: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    clips = dataset(walks["60"], tmp_path, replace(DATA, draws=30))
    first = np.array([places(clips.load(epoch, 0))[0] for epoch in range(30)])
    assert len(np.unique(first)) > 20
    last = SPEED * (SECONDS - 11 / DATA.fps)  # of a window's beginnings
    assert first.min() < 0.15 * last and 0.85 * last < first.max() <= last + 1
    assert places(clips.load(33, 0))[0] == first[3]


def test_uniform_frames_span_the_clip(walks: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    data = replace(DATA, fps=0.0, frame_sampling="uniform", num_frames=9)
    for name, walk in walks.items():
        clips = dataset(walk, tmp_path, data)
        found, ends = places(clips.load(0, 0)), SPEED * ticks(name)[-1] / TICKS
        assert found[0] == 0 and abs(found[-1] - ends) <= 0.5
        assert np.abs(found - np.linspace(0, ends, 9)).max() <= source_frame(name), name
        assert (found == places(clips.load(1, 0))).all()


def test_pictures_and_clips_that_are_too_short(walks: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    def reason(data: DataConfig, **row: float) -> str:
        sample = dataset(walks["24"].assign(**row), tmp_path, data).load(0, 0)
        assert isinstance(sample, BadSample)
        return sample.reason

    assert reason(DATA, num_frames=30) == "the clip has 10 frames at data.fps = 8, the sample needs 12"
    uniform = replace(DATA, fps=0.0, frame_sampling="uniform", num_frames=97)
    assert reason(uniform) == "the clip has 96 frames, the sample needs 97"
    late = reason(replace(DATA, num_frames=32), num_frames=960, fps=24.0)  # of which 96 are there
    assert "ends early: " in late
    fast = reason(replace(DATA, fps=1.0), fps=2.0)
    assert "lasts 4 s, its row of the manifest says 48 s; the sample needs 11 s" in fast
    path = write_numbered(tmp_path / "picture.png", [0], codec="png", pixels="rgb24")
    picture = walks["24"].assign(path=str(path), num_frames=1, fps=0.0)
    for data in (replace(DATA, num_frames=1), replace(uniform, num_frames=1)):
        assert isinstance(dataset(picture, tmp_path, replace(data, width=64)).load(0, 0), Clip)


def test_a_slow_clip_shows_frames_again(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "slow.mp4", range(0, 40, 5))  # 5 frames a second
    row = {"id": "a", "path": str(path), "caption": "a", "num_frames": 8, "fps": 5.0, "height": 64, "width": 64}
    data = replace(DATA, num_frames=8, fps=10.0, height=64, width=64)
    clip = dataset(pd.DataFrame([row]), tmp_path, data, augment=False).load(0, 0)
    assert isinstance(clip, Clip)
    assert numbers(clip.pixels.numpy()) == [2, 2, 3, 3, 4, 4, 5, 5]


def test_a_sample_has_a_rate(walks: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    def rate(name: str, data: DataConfig) -> float:
        clip = dataset(walks[name], tmp_path, data).load(0, 0)
        assert isinstance(clip, Clip)
        return clip.fps

    by_number = replace(DATA, fps=0.0, frame_interval=3)
    assert [rate(name, DATA) for name in ("12", "60", "variable")] == [8.0, 8.0, 8.0]
    assert [rate(name, by_number) for name in ("12", "60")] == pytest.approx([4, 20])
    assert rate("12", replace(by_number, num_frames=24)) == pytest.approx(12 * 23 / 47)  # squeezed
    uniform = replace(DATA, fps=0.0, frame_sampling="uniform", num_frames=9)
    assert rate("variable", uniform) == pytest.approx(8 * TICKS / ticks("variable")[-1])
    assert rate("24", replace(DATA, num_frames=1)) == 0


def test_cached_samples_are_the_same_bit_for_bit(walks: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    vae, text = make_tiny_vae(tmp_path / "vae"), make_tiny_text(tmp_path / "text")
    data = {"draws": 2, "num_frames": 4, "fps": 8, "height": HEIGHT, "width": 64, "cache": str(tmp_path / "cache")}
    cfg = parse_config({"vae": {"path": str(vae)}, "text": {"path": str(text)}, "data": data})
    clips = dataset(pd.concat([walk.assign(id=name) for name, walk in walks.items()]), tmp_path, cfg.data)
    table = read_manifest(tmp_path / "manifest.parquet")
    rows, encoder = CacheRows(table, cfg, assigned(table, cfg)), open_encoder(cfg, torch.device("cpu"))
    cache = LatentCache(cfg.data.cache, cache_fingerprint(cfg, encoder))
    assert [bad for _, bad in CacheFill(clips, rows, encoder, cache, num_workers=0).encode()] == [None] * 10
    sampler = SharedBatches(BatchSampler(Schedule(everything(5), [5], 0, draws=2), [clips.shape]), 0, 1)
    plain = ClipFeed(clips, sampler, 0, pinned=False).batches(0, 3)
    for read, cached in zip(plain, CacheFeed(cache, sampler, rows).batches(0, 3), strict=True):
        encoded = encoder.encoded(sample for _, sample in read)
        for one, (_, other) in zip(encoded, cached, strict=True):
            assert isinstance(one, Encoded) and isinstance(other, Encoded) and one.id == other.id
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)
            assert other.fps == 8
    others = ({"fps": 9.0}, {"fps": 0.0}, {"fps": 0.0, "frame_sampling": "uniform"})
    changed = {cache_fingerprint(replace(cfg, data=replace(cfg.data, **keys)), encoder) for keys in others}
    assert len(changed - {cache.fingerprint}) == 3


def test_a_multiple_of_the_rate_is_an_interval() -> None:
    """Which frames, and with what chances."""
    times, generators = np.arange(21) / 24, [keyed_generator(0, epoch, "x", "window") for epoch in range(400)]
    by_time = [time_window(times, 5, 8.0, generator) for generator in generators]
    by_number = [frame_window(20, 5, 3, generator) for generator in generators]
    assert {tuple(found or []) for found in by_time} == {tuple(found) for found in by_number}
    counts = np.bincount([found[0] for found in by_time if found])
    assert len(counts) == 8 and counts.min() > 30 and counts.max() < 70
    assert time_window(times, 9, 8.0) is None  # the ninth would be number 24


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [(48, 24.0, 16), (46, 24.0, 16), (45, 24.0, 15), (4, 2.0, 16), (30, 30000 / 1001, 9), (1, 0.0, 1), (2, 60.0, 1)],
)
def test_frames_at_a_rate(num_frames: int, fps: float, expected: int) -> None:
    assert frames_at_rate(DATA, num_frames, fps) == expected
    assert frames_at_rate(replace(DATA, fps=0.0), num_frames, fps) == num_frames


def test_times_of_a_file_that_is_not_as_its_row_says(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "a.mp4", [0, 1, 2, 5, 6, 9])
    assert (clip_times(path, 6, 25.0) * 25).tolist() == pytest.approx([0, 1, 2, 5, 6, 9, 10.8])
    assert (clip_times(path, 4, 25.0) * 25).tolist() == pytest.approx([0, 1, 2, 5, 6])
    assert (clip_times(path, 7, 25.0) * 25).tolist() == pytest.approx([0, 1, 2, 5, 6, 9, 10.8, 12.6])
    elementary = write_numbered(tmp_path / "a.h264", [0, 1, 2])  # which has no clock
    assert (clip_times(elementary, 3, 25.0) * 25).tolist() == pytest.approx([0, 1, 2, 3])
    assert evenly(clip_times(path, 6, 25.0), 4) == [0, 2, 4, 5]
    assert evenly(clip_times(path, 6, 25.0), 1) == [2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"fps": 8, "frame_interval": 2}, "data.frame_interval = 2: expected 1 with data.fps = 8 (frames are taken by"),
        ({"fps": -1}, "data.fps = -1.0: expected 0 or more"),
        ({"fps": 8, "frame_sampling": "uniform"}, 'data.fps = 8.0: expected 0 with data.frame_sampling = "uniform"'),
        (
            {"frame_sampling": "uniform", "frame_interval": 2},
            "data.frame_interval = 2: expected 1 with data.frame_samp",
        ),
        ({"frame_sampling": "random"}, 'data.frame_sampling = "random": expected one of window, uniform'),
    ],
)
def test_mistakes_are_one_line(data: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config({"data": data})
    assert str(raised.value).startswith(message)


def test_a_published_recipe_by_time() -> None:
    """One override, whatever interval it was published with."""
    cfg = load_config("configs/stage2_16x256x256.toml", ["data.fps=8"])
    assert (cfg.data.fps, cfg.data.frame_interval) == (8.0, 3)
