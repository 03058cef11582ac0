"""From a folder of videos in a bucket to a model: every file of the data lies in the store, none beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data_tools import pipeline
from opensora_repro.data.write import write_video
from opensora_repro.storage.addresses import place
from opensora_repro.storage.scratch import fetched
from tests.e2e.test_data_tools import film
from tests.object_store import BUCKET, Store, files, fill, serving
from tests.training_world import SIZE, make_world, metrics, newest_hashes, succeed
from tests.unit.test_storage import forget

LINE = f"""
input = "s3://{BUCKET}/videos"
out = "s3://{BUCKET}/out"
[run]
workers = 2
[probe]
[split]
min_frames = 6
preset = "ultrafast"
[score]
scores = "brightness"
[filter]
keep = "brightness > 0.05"
[caption]
sidecar = "SIDECAR"
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with serving({"OPENSORA_SCRATCH": str(tmp_path / "scratch")}) as store:
        forget()
        yield store
        forget()


@pytest.mark.exhaustive
def test_a_bucket_of_videos_becomes_a_model(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    film(videos / "a.mp4", [(40, 12), (200, 12), (90, 14)], SIZE)
    film(videos / "sub" / "b.mp4", [(150, 12), (70, 12)], SIZE)
    write_video(videos / "black.mp4", np.zeros((9, SIZE, SIZE, 3), np.uint8), 12)
    (videos / "bad.mp4").write_bytes(b"no video")
    fill(videos, "videos")
    shutil.rmtree(videos)
    store.busy |= {f"GET /{BUCKET}/videos/a.mp4": 6, f"PUT /{BUCKET}/out/split/clips/": 6}
    rows = [{"source": name, "start_time": 0, "end_time": 99, "caption": "a film"} for name in ("a.mp4", "sub/b.mp4")]
    pd.DataFrame(rows).to_csv(tmp_path / "captions.csv", index=False)
    line = tmp_path / "line.toml"
    line.write_text(LINE.replace("SIDECAR", str(tmp_path / "captions.csv")))

    assert pipeline.main([str(line)]) == 0, capfd.readouterr().err
    assert sum(store.busy.values()) == 0
    assert f"5 rows: s3://{BUCKET}/out/manifest.parquet" in capfd.readouterr().out
    made = pd.read_parquet(fetched(place(f"s3://{BUCKET}/out/manifest.parquet")))
    assert len(made) == 5 and made["path"].str.startswith("split/clips/").all()
    rejects = pd.read_parquet(fetched(place(f"s3://{BUCKET}/out/rejects.parquet")))
    assert set(rejects["stage"]) == {"probe", "filter"}
    page = files().cat_file(f"{BUCKET}/out/report.html").decode()
    assert "split/clips/" in page and str(tmp_path) not in page
    for name in files().find(f"{BUCKET}/out"):  # nothing tells of this node, or of who may read the bucket
        if not name.endswith(".sqlite"):
            content = files().cat_file(name)
            assert b"unspoken" not in content and str(tmp_path / "scratch").encode() not in content, name

    # Another node has nothing to do, and reads no video for that
    monkeypatch.setenv("OPENSORA_SCRATCH", str(tmp_path / "another"))
    forget()
    store.asked.clear()
    assert pipeline.main([str(line)]) == 0
    assert capfd.readouterr().out.count("done before") == 4
    assert store.count(f"GET /{BUCKET}/videos/") == 0

    # Two steps from the clips, by a loader's process; two more through a cache in the bucket, equal to a local one's
    world = make_world(tmp_path / "world")
    steps = {"data__manifest": f"s3://{BUCKET}/out/manifest.parquet", "train__steps": 2, "checkpoint__every": 2}
    cached = {**steps, "data__draws": 2}
    runs = {
        "clips": {**steps, "data__num_workers": 1},
        "local": {**cached, "data__cache": str(tmp_path / "cache")},
        "filling": {**cached, "data__cache": f"s3://{BUCKET}/cache"},
        "reading": {**cached, "data__cache": f"s3://{BUCKET}/cache"},
    }
    for name, changes in runs.items():
        os.environ["OPENSORA_SCRATCH"] = str(tmp_path / f"scratch-{name}")
        store.asked.clear()
        arguments = [str(world.root / "empty.toml"), *world.arguments(tmp_path / name, "clips", **changes)]
        told = succeed("stages.stage2_video", arguments, tmp_path / "log" / name)
        assert f"clips of s3://{BUCKET}/out/manifest.parquet: 5" in told.out
        assert len(metrics(tmp_path / name)) == 2
        assert not (tmp_path / name / "quarantine.jsonl").exists()
    assert store.count(f"GET /{BUCKET}/out/split/clips/") == 0  # all was in the cache
    assert store.count(f"GET /{BUCKET}/cache/") > 0
    assert (
        newest_hashes(tmp_path / "local") == newest_hashes(tmp_path / "filling") == newest_hashes(tmp_path / "reading")
    )
