"""`python -m stages.buckets` measures a tiny model's buckets, and its config trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opensora_repro.config import load_config
from opensora_repro.training.measure import Loop
from stages import buckets
from tests.training_world import World, make_world, succeed

CONFIG = """[[data.buckets]]
num_frames = 4
resolution = "32x32"
ratios = ["1:1", "3:2"]
batch_size = 2

[[data.buckets]]  # pictures
num_frames = 1
resolution = "32x32"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    (world.root / "run.toml").write_text(CONFIG)
    return world


@pytest.fixture(autouse=True)
def _unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's process keeps its own threads and memory."""
    monkeypatch.setattr(buckets, "settle_process", lambda: None)


def test_measured_and_trained(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = world.root / "run.toml", tmp_path / "balanced.toml"
    arguments = world.arguments(tmp_path / "run", "clips", train__accumulation=2, train__steps=2)
    assert buckets.main([str(config), *arguments, "--out", str(out), "--max-batch", "3"]) == 0
    told = capsys.readouterr().out
    assert "measuring on cpu, one process; memory is the process's resident memory at most" in told
    assert "as of data.buckets[0] (4 x 24x40) at batch size 2" in told
    first, second = (bucket.batch_size for bucket in load_config(out).data.buckets)
    assert first == 2 and 1 <= second <= 3
    row = next(line for line in told.splitlines() if line.startswith("4 x 32x32 (24x40 of 2 ratios)"))
    assert row.split()[7:12] == ["7", "24", "2", "->", "2"] and "100.0%" in row
    assert not (tmp_path / "run").exists()
    assert "# pictures" in out.read_text()
    succeed("stages.stage2_video", [str(out), *arguments], tmp_path / "trained")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [2 * 2, 2 * 2]


def test_out_of_memory_halves_and_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached steps, which need no frozen weights; the device has room for one sample."""
    whole = Loop._losses

    def losses(self: Loop, batch: object) -> torch.Tensor:
        if self.cfg.train.batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batch)

    monkeypatch.setattr(Loop, "_losses", losses)
    arguments = world.arguments(tmp_path / "run", "clips", data__cache=str(tmp_path / "cache"), data__draws=1)
    out = tmp_path / "out.toml"
    assert buckets.main([str(world.root / "run.toml"), *arguments, "--out", str(out), "--max-batch", "2"]) == 0
    told = capsys.readouterr().out
    assert "data.buckets[0] (4 x 24x40): out of memory at batch size 2, goes on with 1" in told
    assert "at batch size 1, as 2 do not fit" in told
    assert load_config(out).data.buckets[0].batch_size == 1
    assert not (tmp_path / "cache").exists()


def test_where_nothing_can_be_written_nothing_is_measured(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(world.root / "run.toml"), *world.arguments(tmp_path / "run", "clips")]
    for out in (tmp_path, world.root / "run.toml" / "x.toml"):
        assert buckets.main([*arguments, "--out", str(out)]) == 2
        told = capsys.readouterr()
        assert "error: --out = " in told.err and "measuring" not in told.out


def test_more_processes_than_one_are_for_the_plan(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    arguments = [str(world.root / "run.toml"), *world.arguments(tmp_path / "run", "clips")]
    assert buckets.main(arguments) == 2
    assert "steps are measured in one process; --plan knows layouts of several" in capsys.readouterr().err
