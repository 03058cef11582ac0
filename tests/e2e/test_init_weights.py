"""Stages that start from published weights: what they hold then, what is written of it, and which files they refuse."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_repro.config import Config, TextConfig, dump_toml
from opensora_repro.frozen.text import open_text_encoder
from stages import stage1_image, stage2_video, stage3_hq
from tests.published_files import IMAGE, VIDEO, make_model, publish
from tests.training_world import World, make_world, metrics, newest_tensors

NULL_CAPTION = "y_embedder.y_embedding"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(stage: Any, world: World, run_dir: Path, weights: Path | str, *flags: str, **changes: Any) -> int:
    """Two steps of a model as the published files here have it."""
    settings = {"train__steps": 2, "checkpoint__every": 2, "model__hidden_size": 48, "init__weights": str(weights)}
    arguments = world.arguments(run_dir, "clips", **{**settings, **changes})
    code: int = stage.main([str(world.root / "empty.toml"), *arguments, *flags])
    return code


def weights_report(run_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_dir / "weights.json").read_text())
    return report


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_started_from(run_dir: Path, weights: dict[str, torch.Tensor]) -> None:
    """A run of learning rate nearly zero still holds what it started from; so does its average."""
    for name in ("model", "ema"):
        found = newest_tensors(run_dir, name)
        assert set(found) == set(weights)
        for key, value in weights.items():
            np.testing.assert_allclose(found[key], value.numpy(), rtol=0, atol=1e-7, err_msg=f"{name} {key}")


STILL = {"optim__lr": 1e-12}

# ---------------------------------------------------------------------------------------------------------------------
# What they start from


def test_stage2_from_a_pixart_file(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "pixart.pth")
    content = torch.load(path, weights_only=True)
    halves = {key: value.half() for key, value in content["state_dict"].items()}
    torch.save({"state_dict": halves}, path)
    digest = sha256(path)
    assert train(stage2_video, world, tmp_path / "run", path, "--dry-run") == 0
    assert f"from the weights {path}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()

    assert train(stage2_video, world, tmp_path / "run", path, **STILL) == 0
    out = capsys.readouterr().out
    assert "temporal attention inserted: on every frame the video model is the image model" in out
    assert f"{path}: PixArt-alpha weights under 'state_dict', 46 tensors loaded" in out
    assert len(metrics(tmp_path / "run")) == 2

    report = weights_report(tmp_path / "run")
    image = make_model(IMAGE).state_dict()
    temporal = [key for key in make_model(VIDEO).state_dict() if ".attn_temp." in key]
    assert (report["layout"], report["container"], report["wrapper"]) == ("PixArt-alpha", "torch", "state_dict")
    assert sorted(report["loaded"]) == sorted(image) and report["inserted"] == temporal
    assert report["dropped"] == ["pos_embed"] and report["dtype"] == "float16"
    assert report["num_parameters"] == sum(value.numel() for value in image.values())
    assert report["files"] == {str(path): digest}

    found = newest_tensors(tmp_path / "run")
    for key in image:
        np.testing.assert_allclose(found[key], halves[key].reshape(found[key].shape).float().numpy(), rtol=0, atol=1e-7)
    assert all(np.abs(found[key]).max() < 1e-7 for key in temporal if "proj" in key)
    assert all(found[key].std() > 0.01 for key in temporal if key.endswith("qkv.weight"))


@pytest.mark.parametrize("stage", [stage2_video, stage3_hq], ids=["stage2", "stage3"])
def test_stages_go_on_from_an_open_sora_file(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Any
) -> None:
    path = publish(tmp_path, "stdit.pth")
    assert train(stage, world, tmp_path / "run", path, **STILL) == 0
    out = capsys.readouterr().out
    assert f"{path}: Open-Sora STDiT weights, 54 tensors loaded" in out
    assert "temporal attention inserted" not in out
    assert "pos_embed and pos_embed_temporal not used: positions are index / 1" in out
    assert "in the file index / 0.5 at 4x4 places and 6 frames" in out
    assert_started_from(tmp_path / "run", make_model(VIDEO).state_dict())
    report = weights_report(tmp_path / "run")
    assert (report["layout"], report["inserted"], report["wrapper"]) == ("Open-Sora STDiT", [], "")
    assert report["dropped"] == ["pos_embed", "pos_embed_temporal"] and report["files"] == {str(path): sha256(path)}


def test_stage1_from_a_pixart_file(world: World, tmp_path: Path) -> None:
    path = publish(tmp_path, "pixart.pth")
    images = {"data__manifest": str(world.manifest("images")), "data__num_frames": 1}
    assert train(stage1_image, world, tmp_path / "run", path, model__temporal_attention=False, **images, **STILL) == 0
    assert_started_from(tmp_path / "run", make_model(IMAGE).state_dict())
    assert weights_report(tmp_path / "run")["inserted"] == []


def test_diffusers_weights_take_the_empty_text(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = publish(tmp_path, "diffusers-pixart")
    assert train(stage2_video, world, tmp_path / "run", path, **STILL) == 0
    out = capsys.readouterr().out
    assert "no null caption in them: the empty text is encoded instead" in out
    assert "on every frame the video model is the image model" in out
    report = weights_report(tmp_path / "run")
    assert report["layout"] == "diffusers PixArt" and NULL_CAPTION in report["inserted"]
    assert NULL_CAPTION not in report["loaded"]
    file = path / "diffusion_pytorch_model.safetensors"
    assert report["files"] == {str(file): sha256(file)}

    text = open_text_encoder(TextConfig(path=str(world.text)), world.max_length, "cpu", torch.float32)
    (expected,), _ = text.encode([""])
    assert expected.abs().max() > 0.01
    for name in ("model", "ema"):
        np.testing.assert_array_equal(newest_tensors(tmp_path / "run", name)[NULL_CAPTION], expected.numpy())


def test_resuming_needs_the_file_no_more(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "pixart.pth")
    run_dir = tmp_path / "run"
    assert train(stage2_video, world, run_dir, path, optim__lr=1e-2) == 0
    before = (run_dir / "weights.json").read_bytes()
    path.unlink()
    capsys.readouterr()
    assert train(stage2_video, world, run_dir, path, optim__lr=1e-2, train__steps=4) == 0
    out = capsys.readouterr().out
    assert "resuming" in out and "PixArt-alpha" not in out
    assert len(metrics(run_dir)) == 4
    assert np.abs(newest_tensors(run_dir)["blocks.0.attn_temp.proj.weight"]).max() > 1e-3  # what was inserted learns
    assert (run_dir / "weights.json").read_bytes() == before

    # The finished run is a source in its turn, without any other file.
    assert train(stage3_hq, world, tmp_path / "next", run_dir, **STILL) == 0
    assert_started_from(tmp_path / "next", load_file(run_dir / "checkpoints" / "step-00000004" / "ema.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# What they refuse


@pytest.fixture
def no_clips(world: World, tmp_path: Path) -> str:
    """A manifest whose clips are absent: reading one would be told."""
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(tmp_path / f"absent-{i}.mp4") for i in range(len(frame))]
    frame.to_parquet(tmp_path / "no_clips.parquet")
    return str(tmp_path / "no_clips.parquet")


def cut_off(folder: Path) -> Path:
    path = publish(folder, "pixart.pth")
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def without(folder: Path, key: str) -> Path:
    path = publish(folder, "stdit.pth")
    content = torch.load(path, weights_only=True)
    del content[key]
    torch.save(content, path)
    return path


def other_heads(folder: Path) -> Path:
    return publish(folder, "diffusers-pixart", num_heads=6)


def not_finite(folder: Path) -> Path:
    path = publish(folder, "stdit.pth")
    content = torch.load(path, weights_only=True)
    content["blocks.1.mlp.fc2.bias"][3] = float("inf")
    torch.save(content, path)
    return path


def a_lora(folder: Path) -> Path:
    path = folder / "lora.safetensors"
    save_file({f"blocks.0.attn.qkv.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}, path)
    return path


# what is wrong -> the file, and what the line says
INCOMPATIBLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "width": (lambda folder: publish(folder, "pixart.pth", hidden_size=64), "model.hidden_size=64"),
    "depth": (lambda folder: publish(folder, "stdit.pth", depth=3), "model.depth=3"),
    "text length": (lambda folder: publish(folder, "pixart.pth", model_max_length=20), "model.model_max_length=20"),
    "text width": (lambda folder: publish(folder, "stdit.pth", caption_channels=16), "model.caption_channels=16"),
    "variance": (lambda folder: publish(folder, "pixart.pth", pred_sigma=False), "model.pred_sigma=false"),
    "heads": (other_heads, "model.num_heads=6"),
    "dit": (lambda folder: publish(folder, "dit.pt"), "DiT weights fit no stdit model"),
    "latte": (lambda folder: publish(folder, "latte.pt"), "Latte weights fit no stdit model"),
    "pixart-ms": (lambda folder: publish(folder, "pixart-ms.pth"), "they are a pixart-ms model's"),
    "a missing tensor": (lambda folder: without(folder, "blocks.1.mlp.fc2.bias"), "(first blocks.1.mlp.fc2.bias)"),
    "cut off": (cut_off, "damaged or cut off"),
    "absent": (lambda folder: folder / "nowhere.pth", "no such weights file"),
    "a LoRA": (a_lora, "this is a LoRA"),
}


@pytest.mark.parametrize("name", INCOMPATIBLE)
def test_incompatible_files_stop_before_anything_is_read_or_written(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_clips: str, name: str
) -> None:
    make, message = INCOMPATIBLE[name]
    path = make(tmp_path)
    assert train(stage2_video, world, tmp_path / "run", path, "--dry-run", data__manifest=no_clips) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and message in line
    assert train(stage2_video, world, tmp_path / "run", path, data__manifest=no_clips) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and str(path) in line and message in line
    assert captured.out == "" and not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = not_finite(tmp_path)
    assert train(stage2_video, world, tmp_path / "run", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "blocks.1.mlp.fc2.bias holds values that are not finite" in line
    assert not (tmp_path / "run").exists()


def test_a_name_of_the_catalog(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in the hub's cache, or one line with the command that fetches it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name = "PixArt-XL-2-256x256.pth"
    for flags in ([], ["--dry-run"]):
        assert train(stage2_video, world, tmp_path / "run", name, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            f"error: {name}: not in the hub's cache {tmp_path / 'hub'}: run `python -m stages.weights "
        )
        assert f"fetch {name}`" in line and not (tmp_path / "run").exists()

    for nearly in ("PixArt-XL-2-256x256", f"{name} ", name.upper(), "PixArt-alpha/PixArt-XL-2-256x256",
                 "PixArt-alpha/PixArt-alpha", "PixArt-alpha/PixArt-XL-2-256x256/transformer/"):  # fmt: skip
        assert train(stage2_video, world, tmp_path / "run", nearly, "--dry-run") == 2, nearly
        assert "no such weights file" in (line := capsys.readouterr().err) or "fetch PixArt-alpha" in line
    assert train(stage2_video, world, tmp_path / "run", f"runs/{name.removesuffix('.pth')}", "--dry-run") == 0

    repository = tmp_path / "hub" / "models--PixArt-alpha--PixArt-alpha"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    path = publish(repository / "snapshots" / ("0" * 40), "pixart.pth").rename(
        repository / "snapshots" / ("0" * 40) / name
    )
    assert train(stage2_video, world, tmp_path / "run", name, "--dry-run") == 0
    assert f"from the weights {path}" in capsys.readouterr().out
    assert train(stage2_video, world, tmp_path / "run", name) == 0
    assert weights_report(tmp_path / "run")["files"] == {str(path): sha256(path)}
    assert train(stage2_video, world, tmp_path / "other", "PixArt-XL-2-256.pth") == 2
    assert "no such weights file, checkpoint or run; the catalog of published weights has PixArt-XL-2-256x256.pth" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("wrap", ["dit_args", "prefix", "checkpoints", "folder"])
def test_weights_as_training_leaves_them(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrap: str
) -> None:
    """A dry run takes them and says which file it is."""
    path = asked = publish(tmp_path / "given", "stdit.pth")
    weights = torch.load(path, weights_only=True)
    if wrap == "dit_args":
        torch.save({"model": weights, "ema": weights, "opt": {}, "args": argparse.Namespace(lr=1e-4)}, path)
    elif wrap == "prefix":
        torch.save({"module": {f"model._orig_mod.{key}": value for key, value in weights.items()}}, path)
    elif wrap == "folder":
        asked = path.parent
        (asked / "config.toml").write_text(dump_toml(Config(model=VIDEO)))
    else:
        asked, step = tmp_path / "run0" / "checkpoints", publish(tmp_path, "checkpoint")
        asked.mkdir(parents=True)
        path = step.rename(asked / "step-00000003") / "ema.safetensors"
    assert train(stage2_video, world, tmp_path / "run", asked, "--dry-run") == 0
    assert f"from the weights {path}" in capsys.readouterr().out


def test_a_dry_run_finds_what_does_not_fit(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_clips: str
) -> None:
    path = publish(tmp_path, "pixart.pth", hidden_size=64)
    assert train(stage2_video, world, tmp_path / "run", path, "--dry-run", data__manifest=no_clips) == 2
    assert "model.hidden_size=64" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_absent_clips_would_have_been_told(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_clips: str
) -> None:
    path = publish(tmp_path, "pixart.pth")
    assert train(stage2_video, world, tmp_path / "run", path, data__manifest=no_clips) == 2
    assert "absent-" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pixart.pth", "diffusers-pixart"])
def test_stage3_wants_a_video_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_clips: str, name: str
) -> None:
    path = publish(tmp_path, name)
    assert train(stage3_hq, world, tmp_path / "run", path, data__manifest=no_clips) == 2
    assert f"init.weights = {path} is an image model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_stage1_wants_an_image_model(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = publish(tmp_path, "stdit.pth")
    images = {"data__manifest": str(world.manifest("images")), "data__num_frames": 1}
    assert train(stage1_image, world, tmp_path / "run", path, model__temporal_attention=False, **images) == 2
    assert "model.temporal_attention=true" in capsys.readouterr().err
