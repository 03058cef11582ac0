"""Runs of which some samples' frames are given: the same run resumed, over processes, and at its limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_engines import LAYOUTS, assert_same, halfway, sampled, start
from tests.training_world import (
    Command,
    World,
    finish,
    losses,
    make_world,
    metrics,
    newest_hashes,
    newest_tensors,
    start_processes,
    succeed,
)

STAGE = "stages.stage2_video"
STEPS = 6
MASKS = {"frame_masks__image_head": 0.4, "frame_masks__random": 0.4}
KINDS: dict[str, dict[str, Any]] = {
    "iddpm": {"diffusion__timestep_sampling": "speed"},
    "flow of 1.2": {"diffusion__objective": "flow", "diffusion__schedule": "open_sora_1_2"},
}
# One run of 1.2's network, objective and masks, which every layout is to train. Its blocks over time start as the
# identity: their first gradients are small, and AdamW's eps keeps it from making whole steps of what rounding leaves.
STDIT3: dict[str, Any] = {
    "model__architecture": "stdit3",
    "sample__sampler": "euler",
    "sample__every": 4,
    "validation__every": 4,
    "train__steps": 4,
    "checkpoint__every": 2,
    "optim__eps": 1e-3,
    **MASKS,
    **KINDS["flow of 1.2"],
}
OF_TWO = ("ddp x 2", "zero2 x 2", "fsdp x 2", "tp 2", "torch sp 2")
OF_FOUR = tuple(name for name, (processes, _) in LAYOUTS.items() if processes == 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {"train__steps": STEPS, "train__batch_size": 4, "checkpoint__every": 3, **MASKS, **changes}
    settings |= {"data__val_manifest": str(world.manifest("val")), "validation__every": STEPS}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


@pytest.fixture(scope="module", params=list(KINDS))
def one_process(world: World, request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    run_dir = world.root / request.param
    changes = KINDS[request.param]
    succeed(STAGE, arguments(world, run_dir, **changes), world.root / "log" / request.param)
    return run_dir, changes


def test_masks_resume_and_spread(world: World, one_process: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, changes = one_process
    assert np.isfinite(losses(whole)).all()

    resumed = tmp_path / "resumed"
    for steps in (3, STEPS):
        succeed(STAGE, arguments(world, resumed, **changes, train__steps=steps), tmp_path / "log" / f"to{steps}")
    assert metrics(resumed) == metrics(whole) and newest_hashes(resumed) == newest_hashes(whole)

    for name, shared in (("samples", {"train__batch_size": 2}), ("frames", {"parallel__sp_size": 2})):
        spread = arguments(world, tmp_path / name, **changes, **shared)
        finish(start_processes(STAGE, spread, 2, tmp_path / "log" / name))
        assert_same_run(tmp_path / name, whole)


def assert_same_run(two: Path, whole: Path) -> None:
    """To rounding: sums are taken in another order."""
    np.testing.assert_allclose(losses(two), losses(whole), rtol=1e-5)
    weights, expected = newest_tensors(two), newest_tensors(whole)
    for key in expected:
        np.testing.assert_allclose(weights[key], expected[key], rtol=1e-3, atol=2e-5, err_msg=key)
    both = [json.loads((path / "validation.jsonl").read_text())["losses"] for path in (two, whole)]
    np.testing.assert_allclose(*both, rtol=1e-4)


def test_shares_belong_to_a_run(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    succeed(STAGE, arguments(world, run_dir, train__steps=1), tmp_path / "log" / "first")
    free = dict.fromkeys(MASKS, 0.0)
    succeed(STAGE, arguments(world, tmp_path / "free", train__steps=1, **free), tmp_path / "log" / "free")
    assert losses(run_dir) != losses(tmp_path / "free")
    again = Command(STAGE, arguments(world, run_dir, frame_masks__random=0.1), tmp_path / "log" / "again")
    assert again.wait() == 2
    assert "frame_masks.random = 0.4 there, 0.1 here" in again.err


def train_stdit3(world: World, layout: str, run_dir: Path) -> Path:
    start(STAGE, world, layout, run_dir, run_dir.with_name(f"{run_dir.name}-log"), **STDIT3)
    return run_dir


@pytest.fixture(scope="module")
def stdit3(world: World) -> Path:
    """One process's run."""
    return train_stdit3(world, "one process", world.root / "stdit3")


@pytest.mark.parametrize("layout", sampled([(name,) for name in OF_TWO + OF_FOUR], [(name,) for name in OF_TWO]))
def test_stdit3_trains_the_run_of_one_process(world: World, stdit3: Path, tmp_path: Path, layout: str) -> None:
    assert_same(train_stdit3(world, layout, tmp_path / "run"), stdit3)


MOVES = [("tp 2", "fsdp x 2"), ("fsdp x 2", "torch sp 2"), ("torch sp 2", "tp 2"), ("zero2 x 2", "tp 2, sp 2")]


@pytest.mark.parametrize(("first", "then"), sampled(MOVES, MOVES[:1]))
def test_stdit3_goes_on_in_another_layout(world: World, stdit3: Path, tmp_path: Path, first: str, then: str) -> None:
    whole = train_stdit3(world, first, tmp_path / "whole")
    run_dir = train_stdit3(world, then, halfway(whole, tmp_path / "run"))
    assert_same(run_dir, stdit3)
