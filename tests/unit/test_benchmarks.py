"""A benchmark is only worth its numbers if both sides do the same work."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import collectives, harness, loader, packing, readers, suite, tables
from benchmarks.sides import Sizes


def test_a_wrong_frame_of_a_reader_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FRAMES": 80, "HEIGHT": 360, "WIDTH": 640}.items():
        monkeypatch.setattr(loader, name, value)
    path = str(tmp_path / "clip.mp4")
    loader.write_clip(Path(path), gop=16)
    whole = readers.reference(path)
    for side in (readers.ours, readers.opencv):
        found = readers.thumbnails(side()(path, 21, (256, 455)))
        assert readers.wrong_frames(found, 21, whole) == 0
        assert readers.wrong_frames(found, 22, whole) == readers.COUNT


@pytest.mark.exhaustive
def test_a_loader_process_keeps_no_memory(tmp_path: Path) -> None:
    clips = loader.write_small(tmp_path)
    few, many = (loader.measure_memory(clips, rows, 20_000) for rows in loader.ROWS)
    for row in (few, many):
        assert row["private_mb"] < 1.1 * row["private_mb_early"]
    assert many["private_mb"] < 1.1 * few["private_mb"]


def test_waiting_for_samples_is_a_share_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FRAMES": 60, "HEIGHT": 96, "WIDTH": 128, "WORKERS": (0,), "STEPS": 5}.items():
        monkeypatch.setattr(loader, name, value)
    loader.write_clip(tmp_path / "clip.mp4", gop=16)
    (row,) = loader.measure_waiting(tmp_path, tmp_path / "clip.mp4")
    assert row["workers"] == 0
    assert row["step_ms"] > 0
    assert 0 < row["waiting_share"] < 1  # without other processes every sample is waited for


def test_packed_rows_and_buckets_have_the_same_clips() -> None:
    buckets = packing.bucket_passes()
    rows = packing.packed_passes(packing.in_random_order(buckets))
    clips = [Counter() for _ in range(2)]
    for found, passes in zip(clips, (buckets, rows), strict=True):
        for one in passes:
            assert sum(count * packing.tokens_of(shape) for shape, count in one) <= packing.ROOM
            found.update(dict(one))
    assert clips[0] == clips[1] and clips[0].keys() == set(packing.SHAPES)
    assert packing.padding([(1, 8, 8), (1, 4, 8)]) == pytest.approx(0.25)
    result = packing.measure(Sizes(hidden_size=24, num_heads=2, depth=1, caption_channels=8, caption_tokens=6), 0.0)
    assert all(result["rows"][0][side]["tokens_per_s"] > 0 for side in ("ours", "other"))


def test_calls_are_interleaved_and_compared_round_by_round(tmp_path: Path) -> None:
    order: list[str] = []
    times = harness.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, seconds=60, warmup=1
    )
    assert "".join(order) == "ab" * 6
    assert [len(values) for values in times.values()] == [5, 5]
    ticks = iter(range(100))
    times = harness.interleaved({"a": list}, rounds=3, seconds=60, clock=lambda: float(next(ticks)))
    assert times == {"a": [1.0, 1.0, 1.0]}
    result = harness.side_by_side([0.1, 0.2, 0.1], [0.2, 0.2, 0.4])
    assert result["ratio"] == 2.0
    assert result["other"] == {"median_ms": 200.0, "min_ms": 200.0, "max_ms": 400.0, "rounds": 3}
    path = harness.save("x", {"rows": [result], "environment": harness.environment()}, tmp_path / "sub" / "x.json")
    assert json.loads(path.read_text())["rows"] == [result]
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_count_that_is_not_its_formula_is_a_fault() -> None:
    sizes = collectives.Sizes()
    counted = {"ours": collectives.our_formula(sizes, 4), "everywhere": collectives.everywhere_formula(sizes, 4)}
    rows = collectives.compare(counted, sizes, 4)
    assert not collectives.faults(rows)
    assert all(row["share"] < 0.4 for row in rows)
    counted["ours"]["forward"][1] *= 3
    told = collectives.faults(collectives.compare(counted, sizes, 4))
    assert any("forward: ours counts are not the formula's" in fault for fault in told)
    assert any("forward: ours moves 114%" in fault for fault in told)


def test_a_collective_of_an_unknown_kind_is_not_passed_over() -> None:
    kept = torch.distributed.all_reduce
    with collectives.counting() as total, pytest.raises(RuntimeError, match="all_reduce was called"):
        torch.distributed.all_reduce(torch.ones(1))
    assert total == [0, 0]
    assert torch.distributed.all_reduce is kept


def test_every_benchmark_has_a_line_in_the_table() -> None:
    """Of the results that are kept, and of one that found nothing to measure."""
    for name, benchmark in suite.BENCHMARKS.items():
        path = harness.RESULTS / f"{name}.json"
        if path.exists():
            lines = list(benchmark.lines(json.loads(path.read_text(encoding="utf-8"))))
            assert lines, name
            assert all(len(line) == 5 for line in lines)
    assert list(suite.timed({"gpu": None, "missing": "no GPU"})) == [("no GPU", "", "", "", "")]


def test_the_suite_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    broken, whole = suite.Benchmark(("--sp-size", "3")), suite.Benchmark((), suite.timed)
    monkeypatch.setattr(suite, "BENCHMARKS", {"collectives": broken, "kernels": whole})
    assert suite.run_all(["collectives", "kernels"], full=False) == 1
    assert [path.name for path in (tmp_path / "quick").iterdir()] == ["kernels.json"]


@pytest.mark.exhaustive
def test_tables_go_through_convert_without_loss(tmp_path: Path) -> None:
    tables.make_manifest(tmp_path / "score.parquet", 3000)
    tools = tables.measure_convert(tmp_path, tmp_path / "score.parquet", 3000)
    assert list(tools) == [f"convert {step}" for step in ("to csv", "from csv", "to opensora", "from opensora")]
    assert all(tool["peak_rss_mb"] < 1000 for tool in tools.values())
    with pytest.raises(SystemExit, match="lost rows"):
        tables.measure("data_tools.convert", [str(tmp_path / "score.parquet"), "--out", str(tmp_path / "out")], 3001)
