"""`python -m stages.trace` tells what a run has really read, as noted by the run; how runs and manifests differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from data_tools import filter as filter_tool
from data_tools import probe
from opensora_repro.data.dataset import Clip, ClipDataset
from opensora_repro.data.manifest import read_manifest, write_manifest
from opensora_repro.data.origin import read_origin, version_of
from opensora_repro.files import sha256_of
from opensora_repro.training.loop import Trainer
from stages import stage2_video, trace
from tests.frames import write_manifest as write_frame
from tests.training_world import World, finish, make_world, start_processes

SMALL = {"model__depth": 1, "model__hidden_size": 16, "model__num_heads": 2}
BUCKETS = '[{num_frames = 6, resolution = "32x32", keep = 0.5}, {num_frames = 4, resolution = "16x24"}]'
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"data__height": 24, "data__width": 16},
    "buckets": {},
    "packing": {"data__packing_tokens": 64, "train__batch_size": 3},
    "accumulation": {"train__accumulation": 2, "data__draws": 2},
    "cache": {"data__draws": 2},
    "at a rate": {"data__fps": 4.0, "data__num_frames": 3, "train__batch_size": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """With lineage, as data_tools.split writes it."""
    world = make_world(tmp_path_factory.mktemp("world"))
    table = read_manifest(world.manifest("clips")).to_pandas()
    starts = [100 * row for row in range(len(table))]
    lineage = {"source": "film.mp4", "start_frame": starts, "end_frame": [start + 12 for start in starts]}
    write_frame(pd.DataFrame(table.assign(**lineage)), world.manifest("clips"))
    return world


def arguments(world: World, run: Path, *more: str, **changes: Any) -> list[str]:
    return [str(world.root / "empty.toml"), *world.arguments(run, "clips", **{**SMALL, **changes}), *more]


def traced(*words: Any, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert trace.main([*map(str, words), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "name",
    [name if name in ("buckets", "packing") else pytest.param(name, marks=pytest.mark.exhaustive) for name in RUNS],
)
def test_it_tells_what_training_has_read(
    world: World, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is stopped and resumed; what it decodes and which samples reach its steps is noted beside it."""
    decoded: dict[tuple[int, str], dict[str, Any]] = {}
    reached: dict[int, list[str]] = {}
    load, backward = ClipDataset.load, Trainer._backward

    def noted(dataset: ClipDataset, epoch: int, index: int, shape: Any = None) -> Any:
        clip = load(dataset, epoch, index, shape)
        assert isinstance(clip, Clip)
        size = [*clip.pixels.shape[:3]]
        found = {"frames": list(clip.indices), "crop": list(clip.corner), "flipped": clip.flipped, "size": size}
        decoded[dataset.draw(epoch), clip.id] = {**found, "caption": clip.caption}
        return clip

    def counted(trainer: Any, pending: Any, totals: Any, batch: Any, **rest: Any) -> None:
        reached.setdefault(pending.number, []).extend(batch.ids)
        backward(trainer, pending, totals, batch, **rest)

    changes = {**RUNS[name], **({"data__cache": str(tmp_path / "cache")} if name == "cache" else {})}
    more = [f"data.buckets={BUCKETS}"] if name in ("buckets", "packing", "cache") else []
    steps = 9
    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "load", noted)
        patch.setattr(Trainer, "_backward", counted)
        for end in (4, steps):
            assert stage2_video.main(arguments(world, tmp_path / "run", *more, train__steps=end, **changes)) == 0
    seen = 0
    for step in range(1, steps + 1):
        found = traced(tmp_path / "run", "--step", step, capsys=capsys)
        assert sorted(sample["id"] for sample in found) == sorted(reached[step])
        for sample in found:
            noted_facts = decoded[sample["draw"], sample["id"]]
            assert {key: sample[key] for key in noted_facts} == noted_facts
            first = 100 * int(sample["id"].rpartition("-")[2])
            assert sample["source_frames"] == [first + frame for frame in sample["frames"]]
            assert (sample["source"], sample["start_frame"]) == ("film.mp4", first)
            assert sample["sha256"] == sha256_of(Path(sample["path"]))
            seen += 1
    (facts,) = traced(tmp_path / "run", capsys=capsys)
    assert facts["samples drawn"] == facts["samples seen"] == seen
    assert facts["clips seen"] == len({name for names in reached.values() for name in names})
    identity = reached[2][0]
    times = traced(tmp_path / "run", "--clip", identity, capsys=capsys)
    expected = [step for step, names in reached.items() for name in names if name == identity]
    assert [sample["step"] for sample in times] == expected


def test_two_processes_and_words_for_people(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"train__steps": 3, "train__batch_size": 4, "train__accumulation": 1}
    two = {**one, "train__batch_size": 1, "train__accumulation": 2}
    assert stage2_video.main(arguments(world, tmp_path / "one", **one)) == 0
    commands = start_processes("stages.stage2_video", arguments(world, tmp_path / "two", **two), 2, tmp_path / "log")
    finish(commands)
    for step in (1, 2, 3):
        there, here = (traced(tmp_path / run, "--step", step, capsys=capsys) for run in ("one", "two"))
        assert there == here and len(there) == 4
    assert trace.main([str(tmp_path / "two"), "--step", "3"]) == 0
    out = capsys.readouterr().out
    assert 'source   "film.mp4" frames' in out and "cut to 4x32x32 at 0,0" in out
    assert trace.main([str(tmp_path / "two")]) == 0
    assert "12 drawn, 12 seen" in capsys.readouterr().out
    assert trace.main(["--diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train.batch_size = 4 there, 1 here" in lines
    assert not [line for line in lines if line.startswith(("data.manifest:", "samples a step"))]


def test_mistakes_and_files_that_are_gone(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert stage2_video.main(arguments(world, run, train__steps=2)) == 0

    def refused(*words: Any, expected: str) -> None:
        capsys.readouterr()
        assert trace.main([*map(str, words)]) == 2
        error = capsys.readouterr().err
        assert expected in error and len(error.strip().splitlines()) == 1

    refused(run, "--step", 3, expected="has made steps 1 to 2")
    refused(run, "--clip", "none", expected="has no clip of this id")
    refused(tmp_path, expected="no run with a checkpoint")
    refused(run, "--manifest", world.manifest("val"), expected="not the manifest of")
    refused("--diff", run, world.manifest("val"), expected="expected two manifests or two runs")
    table = read_manifest(world.manifest("clips")).to_pandas()
    moved = table.assign(path=[f"gone/{name}.mp4" for name in table["id"]], caption="another\n\x1b[2J")
    write_frame(moved, tmp_path / "moved.parquet")
    capsys.readouterr()
    assert trace.main([str(run), "--step", "1", "--manifest", str(tmp_path / "moved.parquet")]) == 0
    told = capsys.readouterr()
    assert "other captions under the same ids" in told.err
    assert "unknown: not there" in told.out and "\x1b" not in told.out
    (sample, *_) = traced(run, "--step", 1, "--manifest", tmp_path / "moved.parquet", capsys=capsys)
    assert "unread" in sample and sample["sha256"] is None


# Manifests


def test_manifests_tell_where_they_come_from(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probed, kept, again = (tmp_path / name / "manifest.parquet" for name in ("probed", "kept", "again"))
    assert probe.main([str(world.root / "clips"), "--out", str(probed.parent), "--workers", "1"]) == 0
    rule = ["--keep", "num_frames > 3"]
    assert filter_tool.main([str(probed), "--out", str(kept.parent), *rule, "--thumbnails", "0"]) == 0
    first, second = read_origin(probed), read_origin(kept)
    assert first is not None and second is not None
    assert (first["tool"], first["parents"], first["options"]) == ("probe", [], {})
    assert second["tool"] == "filter" and second["options"] == {"rules": [["keep", "num_frames > 3"]]}
    assert second["parents"] == [{"file": "manifest.parquet", "version": first["version"]}]
    assert str(tmp_path) not in json.dumps([first, second])
    # The version is of what the rows hold: another folder has the same, another caption has not
    assert first["version"] == second["version"] == version_of(kept)
    write_manifest(read_manifest(kept, need_captions=False), again)
    assert read_origin(again) is None and version_of(again) == first["version"]
    rows = read_manifest(kept, need_captions=False)
    write_frame(rows.to_pandas().assign(caption="new").iloc[1:], again)
    assert version_of(again) != first["version"]
    assert trace.main(["--diff", str(kept), str(again)]) == 0
    out = capsys.readouterr().out
    gone, others = rows["id"][0].as_py(), len(rows) - 1
    assert f"1 rows only there: {gone}" in out
    assert f'caption of {others} rows: {rows["id"][1].as_py()}: "" there, "new" here' in out
    assert trace.main(["--diff", str(kept), str(kept)]) == 0
    assert capsys.readouterr().out == "no difference\n"
