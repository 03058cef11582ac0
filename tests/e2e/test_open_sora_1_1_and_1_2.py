"""The recipes of 1.1 and 1.2 at a tiny size: begun from PixArt's weights, interrupted, resumed, sampled to videos."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file

from opensora_repro.data.video import probe
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.sampling.generate import generate
from opensora_repro.sampling.run import load_models, with_options
from opensora_repro.sampling.source import find_source
from stages import sample, stage2_video, stage3_hq, weights
from tests.tiny_models import make_tiny_video_vae
from tests.training_world import World, make_world, metrics, newest_hashes, newest_tensors

RECIPES = {"stdit2": "configs/opensora_1_1/stage1.toml", "stdit3": "configs/opensora_1_2/stage1.toml"}
STEPS = 4
each = pytest.mark.parametrize("architecture", RECIPES)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = make_world(tmp_path_factory.mktemp("world"))
    make_tiny_video_vae(found.root / "video-vae", "VideoAutoencoderPipeline")
    return found


def image_weights(world: World, architecture: str) -> Path:
    """What the recipe begins from: PixArt-1024-MS, or PixArt-Sigma."""
    path = world.root / f"image-{architecture}.pth"
    size = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": world.caption_channels}
    more = {"size_conditioning": True, "base_size": 4} if architecture == "stdit2" else {}
    torch.manual_seed(1)
    model = STDiT(STDiTConfig(**size, **more, model_max_length=6, temporal_attention=False))
    with torch.no_grad():  # a new one's last layer is zero, and nothing before it would get gradients
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def overrides(world: World, architecture: str, run_dir: Path, **changes: Any) -> list[str]:
    """The recipe's own objective, masks, warm-up and freezing, on tiny models and clips."""
    settings = {
        "run.dir": run_dir, "init.weights": image_weights(world, architecture),
        "data.manifest": world.manifest("clips"),
        "data.buckets": [{"num_frames": 8, "resolution": "32x32", "batch_size": 2},
                         {"num_frames": 1, "resolution": "40x24", "batch_size": 2}],
        "data.frame_interval": 1, "data.num_frames": 8, "data.height": 32, "data.width": 32, "data.num_workers": 0,
        "vae.path": world.vae if architecture == "stdit2" else world.root / "video-vae", "text.path": world.text,
        "model.hidden_size": 48, "model.depth": 2, "model.num_heads": 4,
        "model.caption_channels": world.caption_channels, "model.model_max_length": 8,
        "frame_masks.image_head": 0.4, "train.steps": STEPS, "train.dtype": "fp32", "checkpoint.every": 2,
        "sample.every": 0, "optim.lr": 0.01, "optim.warmup_steps": 2, **changes,
    }  # fmt: skip
    return [f"{key}={_toml(value)}" for key, value in settings.items()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def train(world: World, architecture: str, run_dir: Path, *flags: str, **changes: Any) -> int:
    arguments = overrides(world, architecture, run_dir, **changes)
    code: int = stage2_video.main([RECIPES[architecture], *arguments, *flags])
    return code


@pytest.fixture(scope="module", params=RECIPES)
def trained(world: World, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A run that ended after two steps for its number of steps, and went on to four."""
    architecture, run_dir = request.param, world.root / request.param
    assert train(world, architecture, run_dir, **{"train.steps": 2}) == 0
    assert train(world, architecture, run_dir) == 0
    return architecture, run_dir


def test_resumed_as_if_nothing_had_been(world: World, trained: tuple[str, Path], tmp_path: Path) -> None:
    architecture, run_dir = trained
    assert train(world, architecture, tmp_path / "whole") == 0
    assert metrics(run_dir) == metrics(tmp_path / "whole") and len(metrics(run_dir)) == STEPS
    assert newest_hashes(run_dir) == newest_hashes(tmp_path / "whole")


def test_what_is_frozen_stays(world: World, trained: tuple[str, Path]) -> None:
    """Frequencies and null caption always; 1.2's caption MLP by its recipe. All else has moved."""
    architecture, run_dir = trained
    first = load_file(run_dir / "checkpoints" / "step-00000002" / "model.safetensors")
    last, average = newest_tensors(run_dir), newest_tensors(run_dir, "ema")
    optimizer = newest_tensors(run_dir, "optimizer")
    frozen = {"rope.freqs", "y_embedder.y_embedding"}
    if architecture == "stdit3":
        frozen |= {key for key in last if key.startswith("y_embedder.y_proj.")}
        begun = torch.load(image_weights(world, architecture), weights_only=True)["state_dict"]
        key = "y_embedder.y_proj.fc1.weight"
        assert np.array_equal(last[key], begun[key].numpy())
    assert {key for key in last if np.array_equal(first[key], last[key])} == frozen
    assert average.keys() == last.keys() and all(np.array_equal(average[key], last[key]) for key in frozen)
    assert {key.partition(".")[2] for key in optimizer} == last.keys() - frozen


def test_temporal_blocks_alone(world: World, tmp_path: Path) -> None:
    assert train(world, "stdit3", tmp_path / "run", **{"model.only_train_temporal": True, "train.steps": 3}) == 0
    last = newest_tensors(tmp_path / "run")
    first = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
    moved = {key for key in last if not np.array_equal(first[key], last[key])}
    assert moved == {key for key in last if key.startswith("temporal_blocks.")}


def test_sampled_to_a_video(trained: tuple[str, Path], tmp_path: Path) -> None:
    architecture, run_dir = trained
    scores = ["--aesthetic", "6.5", "--motion", "5", "--camera", "pan left"]
    command = [str(run_dir), "--prompt", "a red square", "--out", str(tmp_path / "out"), "--steps", "2", *scores]
    assert sample.main([*command, "--device", "cpu"]) == 0
    found = probe(tmp_path / "out" / "0000.mp4")
    assert (found.num_frames, found.height, found.width) == (8, 32, 32)
    assert found.fps == (8 if architecture == "stdit2" else 24)
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["prompts"] == ["a red square aesthetic score: 6.5. motion score: 5.0. camera motion: pan left."]
    assert (record["aesthetic"], record["motion"], record["camera"]) == (6.5, 5.0, "pan left")
    assert record["model"]["architecture"] == architecture


def test_the_plan_says_so_before(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architecture in RECIPES:
        assert train(world, architecture, tmp_path / architecture, "--dry-run") == 0
        told = capsys.readouterr().out
        assert f'architecture = "{architecture}"' in told and "begins anew" not in told
        assert not (tmp_path / architecture).exists()
    assert train(world, "stdit3", tmp_path / "run", **{"init.weights": image_weights(world, "stdit2")}) == 2
    assert "this is a stdit3" in capsys.readouterr().err


def test_diffusers_loads_it_as_a_pipeline_if_told_to_trust_its_code(
    world: World, trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, run_dir = trained
    folder = tmp_path / "theirs"
    assert weights.main(["convert", str(run_dir), "--to", "diffusers", "--out", str(folder)]) == 0
    assert "refused without trust_remote_code" in capsys.readouterr().out
    texts = [path.read_text() for path in folder.rglob("*.*") if path.suffix != ".safetensors"]
    assert str(world.root) not in "".join(texts)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    models = {"vae": str(world.vae if architecture == "stdit2" else world.root / "video-vae"), "text": str(world.text)}
    prompts = ["a red square", "a blue circle"]
    asked = {"num_inference_steps": 2, "seed": 3, "vae": models["vae"], "text_encoder": models["text"]}
    found = pipeline(prompts, **asked, output_type="np").frames
    source = find_source(run_dir)
    source = replace(source, config=with_options(source.config, steps=2, **models))
    *loaded, _ = load_models(source, torch.device("cpu"))
    expected = dict(generate(*loaded, source.config, prompts, seed=3, batch_size=2))
    assert np.array_equal(found, np.stack([expected[0], expected[1]])) and found.dtype == np.uint8
    ((first, *_),) = pipeline(prompts[0], **asked).frames
    assert np.abs(np.asarray(first).astype(int) - found[0, 0]).max() <= 1  # batches of one round otherwise


def test_a_release_is_looked_into_converted_and_sampled(
    world: World, trained: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    architecture, run_dir = trained
    release = tmp_path / "release"
    assert weights.main(["convert", str(run_dir), "--no-ema", "--to", "opensora", "--out", str(release)]) == 0
    assert sorted(path.name for path in release.iterdir()) == ["config.json", "model.safetensors"]
    expected = newest_tensors(run_dir)
    again = load_file(release / "model.safetensors")
    assert again.keys() == expected.keys() and all(np.array_equal(again[key], expected[key]) for key in expected)
    assert weights.main(["inspect", str(release)]) == 0
    told = capsys.readouterr().out
    assert f"model.architecture = {architecture}" in told and f"init.weights={release} with model.architec" in told
    vae = world.vae if architecture == "stdit2" else world.root / "video-vae"
    command = [str(release), "--prompt", "a red square", "--out", str(tmp_path / "out"), "--vae", str(vae)]
    command += ["--text", str(world.text), "--dry-run", "--device", "cpu"]
    assert sample.main([*command, "--resolution", "480p", "--aspect-ratio", "9:16", "--seconds", "4"]) == 0
    plan = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (plan["height"], plan["width"]) == ("480", "854")
    assert plan["num_frames"] == ("32" if architecture == "stdit2" else "102")
    assert (plan["fps"], plan["steps"], plan["guidance"]) == (
        ("8", "100", "7.0") if architecture == "stdit2" else ("24", "30", "7.0")
    )
    assert plan.get("aesthetic") == (None if architecture == "stdit2" else "6.5")


@each
def test_stage_3_goes_on(world: World, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With more frames, from the run before; an image model's weights are refused there."""
    run_dir = world.root / architecture
    if not run_dir.exists():
        assert train(world, architecture, run_dir) == 0
    buckets = {"data.buckets": [{"num_frames": 12, "resolution": "32x32", "batch_size": 2}], "train.steps": 1}
    arguments = overrides(world, architecture, tmp_path / "hq", **{"init.weights": run_dir, **buckets})
    assert stage3_hq.main([RECIPES[architecture], *arguments]) == 0
    assert "positions: frames 0.." in capsys.readouterr().out
    arguments = overrides(world, architecture, tmp_path / "image", **buckets)
    assert stage3_hq.main([RECIPES[architecture], *arguments]) == 2
