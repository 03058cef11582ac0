"""Plain data parallelism over gloo: two processes train the run that one process with twice the batch trains."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from opensora_repro.parallel.build import OLDEST_FSDP
from tests.training_world import (
    World,
    finish,
    losses,
    make_world,
    metrics,
    newest_tensors,
    start_processes,
    succeed,
    wait_for_step,
)

STAGE = "stages.stage2_video"
STEPS = 8
SPREAD = torch.__version__ >= OLDEST_FSDP  # whether the text encoder can be, too


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def one_process(world: World) -> Path:
    run_dir = world.root / "one"
    succeed(STAGE, arguments(world, run_dir, train__batch_size=4), world.root / "log" / "one")
    return run_dir


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {"train__steps": STEPS, "checkpoint__every": 4, "optim__clip_norm": 0.5, **changes}
    settings |= {"data__val_manifest": str(world.manifest("val")), "validation__every": STEPS}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Equal to rounding: sums over samples are taken in another order."""
    np.testing.assert_allclose(losses(run_dir), losses(expected), rtol=1e-5)
    for ours, theirs in zip(map(json.loads, metrics(run_dir)), map(json.loads, metrics(expected)), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert [ours[key] for key in ("step", "lr", "samples", "tokens")] == [
            theirs[key] for key in ("step", "lr", "samples", "tokens")
        ]
    for name in ("model", "ema"):
        weights, reference = newest_tensors(run_dir, name), newest_tensors(expected, name)
        assert set(weights) == set(reference)
        for key in reference:
            np.testing.assert_allclose(weights[key], reference[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_two_processes_equal_one_with_twice_the_batch(world: World, one_process: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "two"
    commands = start_processes(STAGE, arguments(world, run_dir, train__batch_size=2), 2, tmp_path / "log")
    finish(commands)
    assert len(metrics(run_dir)) == STEPS
    assert_same_run(run_dir, one_process)
    validations = [json.loads((path / "validation.jsonl").read_text()) for path in (run_dir, one_process)]
    np.testing.assert_allclose(validations[0]["losses"], validations[1]["losses"], rtol=1e-4)
    assert "8 steps done" in commands[0].out
    assert commands[1].out == ""


def test_stops_together_and_resumes_on_another_number_of_processes(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"train__batch_size": 1, "train__accumulation": 2, "train__steps": 100_000}
    changes |= {"checkpoint__every": 100_000, "text__shard": SPREAD}
    commands = start_processes(STAGE, arguments(world, run_dir, **changes), 2, tmp_path / "log")
    wait_for_step(run_dir, 2, commands[0])
    os.kill(commands[1].pid, signal.SIGTERM)  # one rank is told: all stop after the same step
    finish(commands)
    steps = len(metrics(run_dir)) + 2
    final: dict[str, Any] = {"train__batch_size": 4, "train__steps": steps}
    succeed(STAGE, arguments(world, run_dir, **final), tmp_path / "log" / "resumed")
    succeed(STAGE, arguments(world, tmp_path / "whole", **final), tmp_path / "log" / "whole")
    assert len(metrics(run_dir)) == steps
    assert_same_run(run_dir, tmp_path / "whole")


def test_bad_samples_on_one_rank(world: World, tmp_path: Path) -> None:
    """Ranks with fewer (or no) readable samples wait for nobody, and every good sample weighs the same."""
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    for row in (1, 4, 5):
        frame.loc[row, "path"] = str(tmp_path / f"absent{row}.mp4")
    frame.to_parquet(tmp_path / "clips.parquet")
    changes: dict[str, Any] = {"data__manifest": str(tmp_path / "clips.parquet"), "data__max_bad_fraction": 0.5}
    two = arguments(world, tmp_path / "two", train__batch_size=1, text__shard=SPREAD, **changes)
    finish(start_processes(STAGE, two, 2, tmp_path / "log"))
    succeed(STAGE, arguments(world, tmp_path / "one", train__batch_size=2, **changes), tmp_path / "log" / "one")
    samples = [json.loads(line)["samples"] for line in metrics(tmp_path / "one")]
    assert min(samples) < 2
    lost = [path / "quarantine.jsonl" for path in (tmp_path / "two", tmp_path / "one")]
    ids = [sorted(json.loads(line)["id"] for line in path.read_text().splitlines()) for path in lost]
    assert ids[0] == ids[1] == ["clips-1", "clips-4", "clips-5"]
    both = [[json.loads(line)["loss"] for line in metrics(tmp_path / name)] for name in ("two", "one")]
    assert [loss is None for loss in both[0]] == [loss is None for loss in both[1]]
    kept = [[loss for loss in run if loss is not None] for run in both]
    np.testing.assert_allclose(kept[0], kept[1], rtol=1e-5)


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_nothing_readable_ends_all_alike(world: World, tmp_path: Path, cached: bool) -> None:
    frame = pd.read_parquet(world.manifest("clips"))
    (tmp_path / "moved").mkdir()
    frame["path"] = [f"{tmp_path}/moved/{row}.mp4" for row in range(len(frame))]
    for path in frame["path"]:
        Path(path).write_bytes(b"no video")
    frame.to_parquet(tmp_path / "clips.parquet")
    changes: dict[str, Any] = {"data__manifest": str(tmp_path / "clips.parquet"), "train__batch_size": 1}
    if cached:
        changes |= {"data__draws": 1, "data__cache": str(tmp_path / "cache")}
    commands = start_processes(STAGE, arguments(world, tmp_path / "run", **changes), 2, tmp_path / "log")
    assert [command.wait() for command in commands] == [2, 2]
    for command in commands:
        (message,) = [line for line in command.err.splitlines() if line.startswith("error")]
        assert "7 of 7 samples cannot be read" in message
        assert "Traceback" not in command.err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_loader_of_one_rank_stops_both_after_a_save(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"train__batch_size": 1, "data__num_workers": 1, "checkpoint__every": 100_000}
    endless = arguments(world, run_dir, **changes, train__steps=100_000, text__shard=SPREAD)
    commands = start_processes(STAGE, endless, 2, tmp_path / "log")
    wait_for_step(run_dir, 2, commands[0])
    (worker,) = Path(f"/proc/{commands[1].pid}/task/{commands[1].pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    assert [command.wait() for command in commands] == [1, 1]
    for command in commands:
        (message,) = [line for line in command.err.splitlines() if line.startswith("error")]
        assert "data.num_workers = 1" in message
        assert "saved: " in message
    done = len(metrics(run_dir))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    final: dict[str, Any] = {"train__batch_size": 2, "train__steps": done + 2}
    succeed(STAGE, arguments(world, run_dir, **final), tmp_path / "log" / "resumed")
    succeed(STAGE, arguments(world, tmp_path / "whole", **final), tmp_path / "log" / "whole")
    assert_same_run(run_dir, tmp_path / "whole")


def test_a_mistake_is_told_once_and_ends_both(world: World, tmp_path: Path) -> None:
    commands = start_processes(
        STAGE, arguments(world, tmp_path / "run", data__manifest=str(tmp_path / "no.parquet")), 2, tmp_path
    )
    assert [command.wait() for command in commands] == [2, 2]
    assert commands[0].err.splitlines()[-1].startswith("error: ")
    assert "no.parquet: no such file" in commands[0].err
    assert not (tmp_path / "run").exists()
