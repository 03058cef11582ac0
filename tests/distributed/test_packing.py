"""A packed run: clips of several sizes in each step, whatever the processes, stopped or not, cached or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.distributed.test_buckets import make_clip, run
from tests.frames import write_manifest
from tests.training_world import World, losses, make_world, newest_tensors

STEPS, SAMPLES, ROW = 12, 8, 40  # the largest clips have 24 tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    write_manifest(pd.DataFrame([make_clip(world.root, index) for index in range(17)]), world.manifest("mixed"))
    return world


def arguments(world: World, run_dir: Path, parts: int, **changes: Any) -> list[str]:
    ratios = 'resolution = "32x32", ratios = ["1:1", "3:2"]'
    buckets = f'{{num_frames = 4, {ratios}, keep = 0.75}}, {{num_frames = 2, resolution = "24x24"}}, '
    buckets += f"{{num_frames = 1, {ratios}}}"
    settings = {"data__packing_tokens": ROW, "data__draws": 2, "train__steps": STEPS, "checkpoint__every": 6, **changes}
    settings |= {"data__val_manifest": str(world.manifest("mixed")), "validation__every": STEPS}
    given = world.arguments(run_dir, "mixed", train__batch_size=SAMPLES // parts, **settings)
    return [str(world.root / "empty.toml"), *given, f"data.buckets=[{buckets}]"]


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    run_dir = world.root / "alone"
    run(1, [arguments(world, run_dir, 1)], world.root / "log" / "alone")
    return run_dir


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").open()]


def test_processes_and_a_resume_train_the_same_run(world: World, alone: Path, tmp_path: Path) -> None:
    run_dir, changes = tmp_path / "run", {"train__accumulation": 2, "data__packing_tokens": ROW + 9}
    run(2, [arguments(world, run_dir, 4, train__steps=6, **changes), arguments(world, run_dir, 4, **changes)],
        tmp_path / "log")  # fmt: skip
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    for key in ("samples", "tokens"):
        found, expected = ([line[key] for line in lines(path, "metrics")] for path in (run_dir, alone))
        assert found == expected
    assert len(set(expected)) > 3  # tokens: each step has other clips
    found, expected = (lines(path, "validation")[-1]["losses"] for path in (run_dir, alone))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    weights, wanted_weights = newest_tensors(run_dir), newest_tensors(alone)
    for key in wanted_weights:
        np.testing.assert_allclose(weights[key], wanted_weights[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_a_cached_run_that_was_resumed_is_the_same_bit_for_bit(world: World, alone: Path, tmp_path: Path) -> None:
    cached = {"data__cache": str(tmp_path / "cache")}
    calls = [arguments(world, tmp_path / "run", 1, **cached, train__steps=steps) for steps in (6, STEPS)]
    run(1, calls, tmp_path / "log")
    assert losses(tmp_path / "run") == losses(alone)
    found, expected = newest_tensors(tmp_path / "run"), newest_tensors(alone)
    assert all((found[key] == expected[key]).all() for key in expected)
