"""A run in buckets, of pictures and videos of several sizes: any number of processes, stopped or not, cached or not."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opensora_repro.config import load_config
from opensora_repro.data.buckets import assigned, buckets_of, global_batch_sizes
from opensora_repro.data.manifest import read_manifest
from opensora_repro.data.sampler import BatchSampler, Schedule
from opensora_repro.data.write import write_png, write_video
from tests.frames import write_manifest
from tests.processes import forked
from tests.training_world import World, _end_with, free_port, losses, make_world, newest_tensors

STEPS = 30
SAMPLES = 4  # a step of the videos; twice as many of the pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    rows = [make_clip(world.root, index) for index in range(17)]
    write_manifest(pd.DataFrame(rows), world.manifest("mixed"))
    return world


def make_clip(folder: Path, index: int) -> dict[str, Any]:
    """Square and wide videos, short ones, and pictures."""
    frames, height, width = [(12, 32, 32), (12, 32, 48), (3, 32, 32), (1, 40, 40), (1, 32, 56)][index % 5]
    video = np.full((frames, height, width, 3), 10 * index, dtype=np.uint8)
    for t in range(frames):
        video[t, index : index + 8, t : t + 8] = 255 - 10 * index
    path = folder / (f"mixed{index}.mp4" if frames > 1 else f"mixed{index}.png")
    if frames > 1:
        write_video(path, video, 8)
    else:
        write_png(path, video[0])
    caption = f"square number {index}"
    return {"id": str(index), "path": str(path), "caption": caption, "num_frames": frames, "fps": 8.0, "height": height,
            "width": width}  # fmt: skip


def arguments(world: World, run_dir: Path, parts: int, **changes: Any) -> list[str]:
    size, ratios = SAMPLES // parts, 'resolution = "32x32", ratios = ["1:1", "3:2"]'
    buckets = (
        f"{{num_frames = 4, {ratios}, keep = 0.75, batch_size = {size}}}, "
        f'{{num_frames = 2, resolution = "24x24", batch_size = {size}}}, '
        f"{{num_frames = 1, {ratios}, batch_size = {2 * size}}}"
    )
    settings = {"optim__clip_norm": 0.5, "checkpoint__every": 10, "data__draws": 2, **changes}
    settings |= {"data__val_manifest": str(world.manifest("mixed")), "validation__every": STEPS}
    given = world.arguments(run_dir, "mixed", **settings)
    return [str(world.root / "empty.toml"), *given, f"data.buckets=[{buckets}]"]


def run_rank(rank: int, count: int, ports: list[int], calls: list[list[str]], log: str) -> None:
    """One process's part of a run of several calls, each of which goes on where the one before has stopped."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.environ.update(OMP_NUM_THREADS="1")
    if count > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    stage = importlib.import_module("stages.stage2_video")
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        for port, call in zip(ports, calls, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            code = stage.main(call)
            if code:
                raise SystemExit(code)


def run(count: int, calls: list[list[str]], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    logs = [f"{log}.{rank}" for rank in range(count)]
    ports = [free_port() for _ in calls]
    processes = [forked.Process(target=run_rank, args=(rank, count, ports, calls, logs[rank])) for rank in range(count)]
    for process in processes:
        process.start()
    for process, path in zip(processes, logs, strict=True):
        process.join(300)
        assert process.exitcode == 0, Path(path).read_text()


def steps_of(world: World, count: int, accumulation: int = 1) -> list[Any]:
    """Shape, epochs and rows of every step, as that many processes read it together."""
    first, *rest = arguments(world, world.root / "x", count * accumulation)
    cfg = load_config(first, rest)
    table = read_manifest(cfg.data.manifest)
    sizes = [size * accumulation for size in global_batch_sizes(cfg, count)]
    schedule = Schedule(assigned(table, cfg), sizes, cfg.run.seed, draws=cfg.data.draws)
    shapes = [bucket.shape for bucket in buckets_of(cfg)]
    ranks = [BatchSampler(schedule, shapes, rank=r, world_size=count, accumulation=accumulation) for r in range(count)]
    found = []
    for step in range(STEPS):
        parts = [rank.batch(step * accumulation + part) for part in range(accumulation) for rank in ranks]
        found.append((parts[0].shape, [pair for part in parts for pair in part]))
    return found


@pytest.fixture(scope="module")
def alone(world: World) -> Path:
    run_dir = world.root / "alone"
    run(1, [arguments(world, run_dir, 1, train__steps=STEPS)], world.root / "log" / "alone")
    return run_dir


def test_the_run_meets_what_it_is_about(world: World) -> None:
    steps = steps_of(world, 1)
    epochs = [{epoch for epoch, _ in pairs} for _, pairs in steps]
    assert max(map(max, epochs)) >= 3
    assert any(len(found) > 1 for found in epochs)  # what was left of an epoch
    assert len({shape for shape, _ in steps}) == 5


@pytest.mark.parametrize(("count", "accumulation"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.exhaustive)])
def test_any_number_of_processes_trains_the_same_run(
    world: World, alone: Path, tmp_path: Path, count: int, accumulation: int
) -> None:
    """Stopped and resumed at every tenth step."""
    assert steps_of(world, count, accumulation) == steps_of(world, 1)
    run_dir, parts = tmp_path / "run", count * accumulation
    calls = [
        arguments(world, run_dir, parts, train__steps=steps, train__accumulation=accumulation) for steps in (10, 20, 30)
    ]
    run(count, calls, tmp_path / "log")
    np.testing.assert_allclose(losses(run_dir), losses(alone), rtol=1e-5)
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (run_dir, alone)]
    for key in ("samples", "tokens"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    validations = [json.loads((path / "validation.jsonl").read_text().splitlines()[-1]) for path in (run_dir, alone)]
    np.testing.assert_allclose(validations[0]["losses"], validations[1]["losses"], rtol=1e-4)
    for name in ("model", "ema"):
        weights, expected = newest_tensors(run_dir, name), newest_tensors(alone, name)
        for key in expected:
            np.testing.assert_allclose(weights[key], expected[key], rtol=1e-3, atol=2e-5, err_msg=key)


def test_a_cached_run_is_the_same_bit_for_bit(world: World, alone: Path, tmp_path: Path) -> None:
    cached = arguments(world, tmp_path / "run", 1, train__steps=STEPS, data__cache=str(tmp_path / "cache"))
    run(1, [cached], tmp_path / "log")
    assert losses(tmp_path / "run") == losses(alone)
    found, expected = newest_tensors(tmp_path / "run"), newest_tensors(alone)
    assert all((found[key] == expected[key]).all() for key in expected)
