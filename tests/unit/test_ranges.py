"""A long video that several workers share gives what one worker makes of it: cuts, clips, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pandas as pd
import pytest

from data_tools import split
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.rows import Order
from opensora_repro.data.split.ranges import RangeShots, joined, plan_ranges, scan_of, scan_range, unlike_before
from opensora_repro.data.split.scenes import scan_video
from opensora_repro.data.video import frame_index
from tests.job_works import plan_here

FPS = 12
SCENES = ("view", "dissolve", "view", "black", "view", "fade", "view", "view", "view")


def film(
    path: Path, codec: str = "libx264", options: dict[str, str] | None = None, scenes: Sequence[str] = SCENES
) -> None:
    """Write scenes of 4 s each of a moving view, and 14 s of black, half a second in a blink; a key frame every 2 s."""
    rng = np.random.default_rng(0)

    def view(length: int) -> np.ndarray:
        wide = cv2.resize(rng.uniform(30, 220, (6, 12, 3)), (160 + length, 96), interpolation=cv2.INTER_CUBIC)
        wide += cv2.resize(rng.normal(0, 18, (16, 40, 1)), (160 + length, 96))[..., None]
        return np.stack([wide[:, i // 2 :][:, :160] for i in range(length)])

    parts: list[np.ndarray] = []
    for kind in scenes:
        if kind == "view":
            parts.append(view(4 * FPS))
        elif kind == "black":
            parts.append(np.zeros((14 * FPS, 96, 160, 3)))
        elif kind == "blink":
            parts.append(np.zeros((FPS // 2, 96, 160, 3)))
        elif kind == "fade":
            parts[-1][-FPS // 2 :] *= np.linspace(1, 0, FPS // 2)[:, None, None, None]
        else:
            after, shares = view(4 * FPS), np.linspace(0, 1, FPS + 2)[1:-1, None, None, None]
            mixed = parts[-1][-FPS:] * (1 - shares) + after[:FPS] * shares
            parts += [np.concatenate([mixed, after[FPS:]])]
            parts[-2] = parts[-2][:-FPS]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": str(2 * FPS), "crf": "20", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for number, picture in enumerate(np.concatenate(parts).clip(0, 255).astype(np.uint8)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    film(path)
    return path


def look(path: Path, starts: list[int], lead: float, numbers: list[int]) -> dict[int, RangeShots]:
    how = {"threshold": None, "whole": False, "short_side": 0}
    return {n: scan_range(path, *[*starts, None][n : n + 2], lead=lead, **how) for n in numbers}


def test_ranges_find_the_cuts_of_one_pass(long: Path) -> None:
    starts, whole = plan_ranges(long, 20.0), scan_video(long)
    assert len(starts) >= 6 and len(whole.cuts) >= 7 and len(whole.transitions) >= 1
    assert all(frame_index(long).times[start] in frame_index(long).key_times for start in starts)
    found = look(long, starts, 12.0, list(range(len(starts))))
    assert not any(part.alone for part in found.values())
    unlike = unlike_before(list(found.values()))
    assert unlike  # black for longer than the lead: whether it began as a fade cannot be told
    found |= look(long, starts, 72.0, unlike)
    assert unlike_before(list(found.values())) == []
    assert scan_of(long, *joined(list(found.values()))) == whole


def test_cuts_to_black_and_from_it_are_one_where_a_range_begins_between_them(tmp_path: Path) -> None:
    path, start = tmp_path / "blinks.mp4", 264  # a key frame, and the first black frame of the fifth blink
    film(path, scenes=("view", "blink") * 6 + ("view",))
    whole, found = scan_video(path), look(path, [0, start], 12.0, [0, 1])
    assert [cut for cut in whole.cuts if abs(cut - start) < 20] == [start + 3]
    assert {start, start + FPS // 2} <= {*found[0].hard, *found[1].hard}
    assert unlike_before(list(found.values())) == []
    assert scan_of(path, *joined(list(found.values()))) == whole


def test_a_lead_that_is_too_short_is_noticed(long: Path) -> None:
    starts = plan_ranges(long, 20.0)
    found = look(long, starts, 0.5, list(range(len(starts))))
    assert unlike_before(list(found.values())) == list(range(1, len(starts)))


@pytest.mark.exhaustive
def test_what_cannot_be_shared_stays_whole(long: Path, tmp_path: Path) -> None:
    assert plan_ranges(long, 3600.0) == [0]
    damaged, content = tmp_path / "damaged.mp4", bytearray(long.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    damaged.write_bytes(content)
    assert split.main([str(damaged), "--out", str(tmp_path / "out"), "--share", "0.35", "--workers", "1"]) == 2
    alone = split.main([str(damaged), "--out", str(tmp_path / "alone"), "--share", "0", "--workers", "1"])
    assert alone == 2
    reasons = [pd.read_parquet(tmp_path / name / "rejects.parquet")["reason"].tolist() for name in ("out", "alone")]
    assert reasons[0] == reasons[1]


MORE = [("--max-frames", "30", "--trim", "2"), ("--fps", "10", "--for-training")]


@pytest.mark.parametrize("options", [(), *(pytest.param(more, marks=pytest.mark.exhaustive) for more in MORE)])
def test_workers_that_share_a_video_make_what_one_makes(
    long: Path, tmp_path: Path, options: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    command = [str(long), "--workers", "2", "--min-frames", "20", *options]
    for name, share in (("alone", "0"), ("shared", "0.35")):
        assert split.main([*command, "--out", str(tmp_path / name), "--share", share]) == 0
    clips = [{p.name: p.read_bytes() for p in (tmp_path / name / "clips").iterdir()} for name in ("alone", "shared")]
    assert clips[0] == clips[1] and len(clips[0]) > 4
    tables = [pd.read_parquet(tmp_path / name / "manifest.parquet") for name in ("alone", "shared")]
    pd.testing.assert_frame_equal(*tables)
    with Records(tmp_path / "shared") as records:
        (count,) = records.rows.execute("SELECT count(*) FROM records WHERE kind = 'parts'").fetchone()
    assert count > 8
    capfd.readouterr()  # of what was done so far
    for share in ("0.35", "0"):  # done is done, whichever way
        assert split.main([*command, "--out", str(tmp_path / "shared"), "--share", share]) == 0
    told = capfd.readouterr().err
    assert "finding cuts" not in told and "splitting" not in told


@pytest.mark.exhaustive
def test_a_cluster_s_workers_share_a_video_too(long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are rows of plans of their own; what was done so is found by either runner."""
    pytest.importorskip("ray")
    plans = list[str]()

    def plan(order: Order, *more: Any) -> Any:
        plans.append(order.work)
        return plan_here(order, *more)

    monkeypatch.setattr("opensora_repro.data.jobs.stream.run_plan", plan)
    command = [str(long), "--workers", "2", "--min-frames", "20"]
    assert split.main([*command, "--out", str(tmp_path / "alone"), "--share", "0"]) == 0
    there = [*command, "--out", str(tmp_path / "there"), "--share", "0.35"]
    for where in (["--runner", "ray"], ["--runner", "ray"], []):
        assert split.main([*there, *where]) == 0
        clips = [{p.name: p.read_bytes() for p in (tmp_path / n / "clips").iterdir()} for n in ("alone", "there")]
        assert clips[0] == clips[1] and len(clips[0]) > 4
        pd.testing.assert_frame_equal(*(pd.read_parquet(tmp_path / n / "manifest.parquet") for n in ("alone", "there")))
        jobs = [work.partition(":")[2] for work in plans]
        assert jobs.count("clips_job") == 1 and "split_job" not in jobs
