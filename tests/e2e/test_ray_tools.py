"""The tools over a Ray cluster: what two workers of it make is what two processes of this machine make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_tools import probe, score, split
from opensora_repro.data.video import read_frames
from tests.e2e.test_data_tools import film
from tests.frames import read_manifest, read_table

RAY = ("--runner", "ray", "--address", "local")  # a cluster of its own, on this machine


def run_tools(videos: Path, out: Path, *where: str) -> None:
    options = ("--workers", "2", *where)
    assert probe.main([str(videos), "--out", str(out / "probe"), "--decode", *options]) == 0
    assert split.main([str(out / "probe" / "manifest.parquet"), "--out", str(out / "split"), *options]) == 0
    assert score.main([str(out / "split" / "manifest.parquet"), "--out", str(out / "score"), *options]) == 0


@pytest.mark.exhaustive
def test_two_ray_workers_give_what_two_processes_give(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, levels in (("a", [20, 120, 200]), ("b", [90, 10]), ("c", [180, 40, 110])):
        film(videos / f"{name}.mp4", [(level, 12) for level in levels])
    (videos / "broken.mp4").write_bytes(b"\0" * 500)
    here, there = tmp_path / "here", tmp_path / "there"
    run_tools(videos, here)
    run_tools(videos, there, *RAY)
    for tool in ("probe", "split", "score"):
        assert (here / tool / "rejects.parquet").read_bytes() == (there / tool / "rejects.parquet").read_bytes()
        first, second = (read_table(folder / tool / "manifest.parquet") for folder in (here, there))
        pd.testing.assert_frame_equal(first, second, check_exact=True)
    clips = [read_manifest(folder / "split" / "manifest.parquet", need_captions=False) for folder in (here, there)]
    assert len(clips[0]) == 8
    for first, second, count in zip(clips[0]["path"], clips[1]["path"], clips[0]["num_frames"], strict=True):
        pictures = [read_frames(path, start=0, count=count).numpy().astype(int) for path in (first, second)]
        assert np.abs(pictures[0] - pictures[1]).mean() < 1
