"""A run whose cache holds every sample: neither frozen model's weights are opened, and nothing else is different."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training_world import Command, World, make_world, metrics, newest_hashes, succeed

STAGE = "stages.stage2_video"
SKIPPED = "text encoder and autoencoder not loaded: everything is in the cache"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """With weights as pickles, of which nothing can be read without opening them."""
    world = make_world(tmp_path / "world")
    for folder, name, pickled in (
        (world.vae, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        (world.text, "model.safetensors", "pytorch_model.bin"),
    ):
        torch.save(load_file(folder / name), folder / pickled)
        (folder / name).unlink()
    return world


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {"data__draws": 2, "train__steps": 4, "checkpoint__every": 4, **changes}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def spoil(file: Path, *, noticeably: bool) -> None:
    stat = file.stat()
    file.write_bytes(b"x" * stat.st_size)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(noticeably)))


@pytest.mark.slow
def test_a_full_cache_needs_no_weights(world: World, tmp_path: Path) -> None:
    cache = {"data__cache": str(tmp_path / "cache")}
    succeed(STAGE, arguments(world, tmp_path / "plain"), tmp_path / "log" / "plain")
    filling = succeed(STAGE, arguments(world, tmp_path / "filling", **cache), tmp_path / "log" / "filling")
    assert "not loaded" not in filling.out

    weights = [world.vae / "diffusion_pytorch_model.bin", world.text / "pytorch_model.bin"]
    for file in weights:
        spoil(file, noticeably=False)
    offload = {**cache, "text__offload": True}
    reading = succeed(STAGE, arguments(world, tmp_path / "reading", **offload), tmp_path / "log" / "reading")
    assert SKIPPED in reading.out.splitlines()
    for name in ("filling", "reading"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "plain")
        assert (
            newest_hashes(tmp_path / name)["model.safetensors"]
            == newest_hashes(tmp_path / "plain")["model.safetensors"]
        )

    # Whatever needs the weights finds them spoilt, before the first step
    watched = {**cache, "validation__every": 2, "data__val_manifest": str(world.manifest("val"))}
    for name, changes, spoilt in (("watched", watched, False), ("changed", cache, True)):
        for file in weights:
            spoil(file, noticeably=spoilt)
        refused = Command(STAGE, arguments(world, tmp_path / name, **changes), tmp_path / "log" / name)
        assert refused.wait() == 2, refused.err
        (message,) = [line for line in refused.err.splitlines() if line.startswith("error:")]
        assert ".path=" in message and "cannot be loaded as a" in message
        assert not (tmp_path / name / "metrics.jsonl").exists()
