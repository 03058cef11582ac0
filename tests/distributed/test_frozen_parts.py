"""Weights that are not trained, over processes: they stay whole and as they were, and the rest trains as in one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.distributed.test_engines import TOLERANCE, sampled, start
from tests.training_world import World, losses, make_world, newest_tensors

STEPS, SAVED = 4, 2
STDIT3: dict[str, Any] = {
    "model__architecture": "stdit3",
    "model__freeze_y_embedder": True,
    "diffusion__objective": "flow",
    "diffusion__schedule": "open_sora_1_2",
    "sample__sampler": "euler",
    "frame_masks__image_head": 0.5,
    "train__steps": STEPS,
    "checkpoint__every": SAVED,
    "validation__every": 0,
    "sample__every": 0,
    "optim__eps": 1e-3,  # with less AdamW makes whole steps of what rounding leaves of gradients that are nought
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def expected(world: World) -> Path:
    """One process's run."""
    return train(world, "one process", world.root / "one")


def train(world: World, layout: str, run_dir: Path, **changes: Any) -> Path:
    log = run_dir.with_name(f"{run_dir.name}-log")
    start("stages.stage2_video", world, layout, run_dir, log, **{**STDIT3, **changes})
    return run_dir


def assert_same(run_dir: Path, expected: Path) -> None:
    np.testing.assert_allclose(losses(run_dir), losses(expected), rtol=TOLERANCE)
    for name in ("model", "ema"):
        found, reference = newest_tensors(run_dir, name), newest_tensors(expected, name)
        assert found.keys() == reference.keys()
        for key, value in reference.items():
            np.testing.assert_allclose(
                found[key], value, rtol=0, atol=TOLERANCE * max(1, abs(value).max()), err_msg=key
            )


@pytest.mark.parametrize(
    "layout",
    sampled([(name,) for name in ("ddp x 2", "zero2 x 2", "fsdp x 2", "tp 2", "torch sp 2")], [("zero2 x 2",)]),
)
def test_a_frozen_caption_mlp(world: World, expected: Path, tmp_path: Path, layout: str) -> None:
    run_dir = train(world, layout, tmp_path / "run")
    assert_same(run_dir, expected)
    frozen = {key for key in newest_tensors(expected) if key.startswith(("y_embedder.", "rope."))}
    assert len(frozen) == 6
    for name in ("model", "ema"):
        found, reference = newest_tensors(run_dir, name), newest_tensors(expected, name)
        assert all(np.array_equal(found[key], reference[key]) for key in frozen)
    assert not [key for key in newest_tensors(run_dir, "optimizer") if key.partition(".")[2] in frozen]


@pytest.mark.parametrize("layout", sampled([("fsdp x 2",), ("zero2 x 2",)], [("fsdp x 2",)]))
def test_temporal_blocks_alone_and_resumed(world: World, tmp_path: Path, layout: str) -> None:
    """Half of one process's run, and the rest over two."""
    alone = {"model__only_train_temporal": True}
    whole = train(world, "one process", tmp_path / "whole", **alone)
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    train(world, layout, run_dir, **alone)
    assert_same(run_dir, whole)
    before = load_file(run_dir / "checkpoints" / f"step-{SAVED:08d}" / "model.safetensors")
    moved = {key for key, value in newest_tensors(run_dir).items() if not np.array_equal(value, before[key])}
    assert moved == {key for key in before if key.startswith("temporal_blocks.")}
