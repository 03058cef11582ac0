"""Resuming looks at what manifest and frozen models hold, not at where they lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from opensora_repro.run_folder import list_checkpoints
from stages import stage1_image
from tests.training_world import World, make_world, metrics

VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path / "world")


@pytest.fixture
def run_dir(world: World, tmp_path: Path) -> Path:
    """A run after two steps."""
    assert train(world, tmp_path / "run", 2) == 0
    return tmp_path / "run"


def train(world: World, run_dir: Path, steps: int, *flags: str, **changes: Any) -> int:
    settings = {"train__steps": steps, "model__depth": 1, **changes}
    arguments = world.arguments(run_dir, "images", **settings)
    return stage1_image.main([str(world.root / "empty.toml"), *arguments, *flags])


def spoil(path: Path) -> None:
    """Other weights of the same size and shapes."""
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, {"format": "pt"})


def forget_identity(run_dir: Path) -> None:
    """As a release wrote it that recorded none."""
    path = list_checkpoints(run_dir)[-1] / "state.json"
    content = json.loads(path.read_text())
    del content["identity"]
    path.write_text(json.dumps(content))


def error(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_moved_data_and_models_resume(world: World, run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    moved = tmp_path / "elsewhere"
    assert train(world, tmp_path / "whole", 4) == 0
    world.root.rename(moved)
    (moved / "vae").rename(moved / "autoencoder")
    (moved / "images.parquet").rename(moved / "renamed.parquet")
    changes = {"data__manifest": str(moved / "renamed.parquet"), "text__path": str(moved / "text")}
    there = World(moved, moved / "autoencoder", moved / "text", world.latent_channels, world.caption_channels)
    capsys.readouterr()
    assert train(there, run_dir, 4, **changes) == 0
    out = capsys.readouterr().out
    assert "resuming" in out
    assert "warning: data.manifest" not in out
    assert metrics(run_dir) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("moved", [False, True])
def test_another_autoencoder_is_told_with_both_sides(
    world: World, run_dir: Path, tmp_path: Path, capsys: Any, moved: bool
) -> None:
    folder = world.vae
    if moved:
        folder = tmp_path / "other"
        shutil.copytree(world.vae, folder)
    spoil(folder / VAE_WEIGHTS)
    assert train(world, run_dir, 4, vae__path=str(folder)) == 2
    message = error(capsys)
    assert f"vae.path is another model than {run_dir} began with: {VAE_WEIGHTS} is {world.vae / VAE_WEIGHTS}" in message
    assert f"{folder / VAE_WEIGHTS} (sha256 " in message.partition(" there, ")[2]
    assert len(metrics(run_dir)) == 2


def test_another_text_encoder_and_a_file_less(world: World, run_dir: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "other"
    shutil.copytree(world.text, folder)
    (folder / "special_tokens_map.json").write_text("{}")
    assert train(world, run_dir, 4, text__path=str(folder)) == 2
    assert "text.path is another model" in (message := error(capsys))
    assert "special_tokens_map.json is" in message


def test_other_captions_under_the_same_ids_are_told(world: World, run_dir: Path, capsys: Any) -> None:
    path = world.manifest("images")
    frame = pd.read_parquet(path)
    frame.loc[4, "caption"] = "something else"
    frame.to_parquet(path)
    for flags, said in ((["--dry-run"], True), ([], True), ([], False)):
        capsys.readouterr()
        assert train(world, run_dir, 4 if said else 5, *flags) == 0
        assert ("other captions under the same ids" in capsys.readouterr().out) == said


def test_other_sizes_under_the_same_ids_are_told(world: World, run_dir: Path, capsys: Any) -> None:
    """Buckets are chosen by them."""
    path = world.manifest("images")
    pd.read_parquet(path).assign(width=48).to_parquet(path)
    capsys.readouterr()
    assert train(world, run_dir, 4, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "other widths under the same ids" in out and "other heights" not in out


def test_checkpoints_that_record_no_identity_still_resume(
    world: World, run_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    forget_identity(run_dir)
    assert train(world, run_dir, 3) == 0
    forget_identity(run_dir)
    shutil.copytree(world.vae, tmp_path / "copy")
    assert train(world, run_dir, 4, vae__path=str(tmp_path / "copy")) == 0
    forget_identity(run_dir)
    spoil(world.vae / VAE_WEIGHTS)
    assert train(world, run_dir, 5, vae__path=str(world.vae)) == 2
    assert "vae.path is another model" in error(capsys)
    shutil.rmtree(tmp_path / "copy")
    assert train(world, run_dir, 5, vae__path=str(world.vae)) == 2
    assert "not where they were" in error(capsys)
