"""A stage on a video autoencoder: fewer latents than frames, from the manifest to an mp4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.data.video import probe
from stages import sample, stage2_video
from tests.tiny_models import make_tiny_video_vae
from tests.training_world import World, make_world, metrics


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: World, run_dir: Path, vae: Path, *flags: str, config: Path | None = None, **changes: Any) -> int:
    settings = {"vae__path": str(vae), "data__num_frames": 9, "data__draws": 2, "train__steps": 3, **changes}
    arguments = world.arguments(run_dir, "clips", **settings)
    return stage2_video.main([str(config or world.root / "empty.toml"), *arguments, *flags])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoencoderKLCogVideoX", "VideoAutoencoderPipeline"])
def test_a_run_and_its_samples(world: World, tmp_path: Path, kind: str) -> None:
    vae = make_tiny_video_vae(tmp_path / "vae", kind)
    watched: dict[str, Any] = {
        "data__val_manifest": str(world.manifest("val")), "validation__every": 3, "sample__every": 3,
        "sample__prompts": ["a red square"], "sample__sampler": "ddim", "sample__steps": 2,
    }  # fmt: skip
    assert train(world, tmp_path / "plain", vae, **watched) == 0
    assert probe(tmp_path / "plain/samples/step-00000003/0000.mp4").num_frames == 9
    cached = {"data__cache": str(tmp_path / "cache")}
    assert train(world, tmp_path / "cached", vae, **cached) == 0
    assert metrics(tmp_path / "cached") == metrics(tmp_path / "plain")
    first = json.loads((tmp_path / "plain/metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens"] == 2 * 3 * 2 * 2  # two samples; 9 frames are 3 latents, of 4x4 places in patches of 2x2

    options = ["--prompt", "a red square", "--sampler", "ddim", "--steps", "2", "--dtype", "fp32"]
    for frames in (9, 1, 17):
        out = tmp_path / f"out{frames}"
        assert sample.main([str(tmp_path / "plain"), *options, "--num-frames", str(frames), "--out", str(out)]) == 0
        assert frames == 1 or probe(out / "0000.mp4").num_frames == frames
    assert (tmp_path / "out1/0000.png").is_file()
    tiles = [
        str(tmp_path / "plain"),
        *options,
        "--num-frames",
        "9",
        "--vae-tile",
        "16",
        "--out",
        str(tmp_path / "out9"),
    ]
    assert sample.main(tiles) == 2  # other samples than those that are there
    assert sample.main([*tiles, "--overwrite"]) == 0
    assert probe(tmp_path / "out9/0000.mp4").num_frames == 9


@pytest.mark.slow
def test_frames_that_do_not_come_back_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the dry run, the run and its buckets, in the same words."""
    vae = make_tiny_video_vae(tmp_path / "vae", "AutoencoderKLWan")
    word = "an AutoencoderKLWan takes 4k + 1 frames, not 8: set 5 or 9"
    buckets = tmp_path / "buckets.toml"
    lines = [f'[[data.buckets]]\nnum_frames = {frames}\nresolution = "32x32"\n' for frames in (9, 8)]
    buckets.write_text("".join(lines))
    for flags, frames, config in ((["--dry-run"], 8, None), ([], 8, None), (["--dry-run"], 9, buckets)):
        assert train(world, tmp_path / "run", vae, *flags, config=config, data__num_frames=frames) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(world, tmp_path / "run", vae, "--dry-run") == 0
    assert "3x4x4" in capsys.readouterr().out.replace(" ", "")


def test_plan_reads_the_autoencoder(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from stages import plan

    vae = make_tiny_video_vae(tmp_path / "vae", "AutoencoderKLLTXVideo")
    arguments = world.arguments(tmp_path / "run", "clips", vae__path=str(vae), data__num_frames=17)
    assert plan.main([str(world.root / "empty.toml"), *arguments]) == 0
    assert "latents 4x3x2x2 -> 3 tokens" in capsys.readouterr().out
