"""Stage 0 as its user runs it: killed and resumed, its folders taken by others, and a laptop's four stages."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch

from opensora_repro.config import TextConfig, VaeConfig
from opensora_repro.data.manifest import read_manifest, write_manifest
from opensora_repro.data.video import read_frames
from opensora_repro.frozen.text import open_text_encoder
from opensora_repro.frozen.vae import open_vae
from stages import stage0_autoencoder
from tests.training_world import (
    Command,
    World,
    make_world,
    metrics,
    newest_hashes,
    start_processes,
    succeed,
    wait_for_step,
)

STAGE0 = "stages.stage0_autoencoder"
REPO = Path(__file__).resolve().parents[2]
VIDEO = REPO.parent / "shared" / "videos" / "fx_dev_vfr.webm"
TINY = {
    "model.channels": [16, 16], "model.norm_groups": 4, "model.layers_per_block": 1, "model.latent_channels": 4,
    "model.attention": False, "data.num_frames": 4, "data.frame_interval": 1, "data.height": 32, "data.width": 32,
    "data.num_workers": 0, "optim.lr": 3e-4, "train.steps": 8, "train.batch_size": 2, "train.dtype": "fp32",
    "train.activation_checkpointing": "none", "ema.decay": 0.8, "checkpoint.every": 4, "validation.every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    places = {"run.dir": str(run_dir), "data.manifest": str(world.manifest("clips"))}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {**TINY, **places, "data.val_manifest": str(world.manifest("val")), **changes}
    return [str(world.root / "empty.toml"), *(f"{name}={json.dumps(value)}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def image_run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with everything that has random numbers."""
    root = tmp_path_factory.mktemp("image")
    succeed(STAGE0, arguments(world, root / "run", **EVERYTHING), root / "log")
    return root / "run"


EVERYTHING = {
    "loss__latent_noise": 0.3, "loss__discriminator": 0.5, "loss__discriminator_start": 3,
    "loss__discriminator_channels": 4, "loss__discriminator_layers": 1, "data__draws": 2, "text__vocab_size": 50,
}  # fmt: skip


def test_a_killed_run_goes_on_bit_for_bit(world: World, image_run: Path, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", {**EVERYTHING}
    command = Command(STAGE0, arguments(world, run_dir, **settings), tmp_path / "first")
    wait_for_step(run_dir, 5, command)
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, "it ended before it was killed"
    last = succeed(STAGE0, arguments(world, run_dir, **settings), tmp_path / "last")
    assert "resuming" in last.out
    assert metrics(run_dir) == metrics(image_run)
    assert newest_hashes(run_dir) == newest_hashes(image_run)
    for name in ("validation.jsonl", "vae/diffusion_pytorch_model.safetensors", "vae/config.json"):
        assert (run_dir / name).read_bytes() == (image_run / name).read_bytes()


def test_its_folders_are_what_the_other_stages_take(image_run: Path, world: World) -> None:
    vae = open_vae(VaeConfig(path=str(image_run / "vae")), "cpu", torch.float32)
    assert (vae.latent_channels, vae.spatial_stride) == (4, 2)
    frames = read_frames(world.root / "val" / "clip0.mp4", start=0, count=2)
    video = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    latents = vae.sample_latents(vae.encode_moments(video), None)
    assert latents.shape == (4, 2, 16, 16) and 0.2 < latents.std() < 5
    assert (vae.decode(latents[None], num_frames=2)[0] - video).abs().mean() < 0.3
    text = open_text_encoder(TextConfig(path=str(image_run / "text")), 8, torch.device("cpu"), torch.float32)
    embedded, mask = text.encode(["a red square number 1"])
    assert embedded.shape == (1, 8, 64) and mask.sum() == 6


def test_what_it_tells(image_run: Path) -> None:
    lines = [json.loads(line) for line in (image_run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert all(5 < line["psnr"] < 60 and 0 < line["ssim"] <= 1 and line["samples"] == 3 for line in lines)
    steps = [json.loads(line) for line in (image_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["discriminator"] > 0 for line in steps] == [False] * 3 + [True] * 5
    page = (image_run / "report.html").read_text()
    assert f"{lines[-1]['psnr']:.2f}" in page and "data:image/jpeg" in page
    assert "is one unknown token" in page  # what the text encoder cannot do
    assert {path.name for path in (image_run / "samples" / "step-00000008").iterdir()} >= {"grid.png", "0000.mp4"}


def test_other_settings_are_refused(world: World, image_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage0_autoencoder.main([*arguments(world, image_run, **EVERYTHING), "loss.kl=1"]) == 2
    error = capsys.readouterr().err
    assert "loss.kl = 1e-06 there, 1.0 here" in error and error.count("\n") == 1


def test_a_dry_run_says_what_would_be(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage0_autoencoder.main([*arguments(world, tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 x 16x16 latents" in out and "8 steps" in out and not (tmp_path / "run").exists()
    missing = [*arguments(world, tmp_path / "run"), f"init.weights={tmp_path}", "--dry-run"]
    assert stage0_autoencoder.main(missing) == 2
    assert "init.weights" in capsys.readouterr().err


def test_what_a_run_refuses_a_dry_run_refuses(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"train.batch_size": 10**9}, "do not make one step of 1,000,000,000 samples"),
        ({"train.kernels": "triton"}, 'train.kernels = "triton" cannot run here'),
        ({"loss.lpips": 1.0, "loss.lpips_path": str(world.vae)}, "no VGG16 in torchvision's layout"),
    ):
        for flags in (["--dry-run"], []):
            assert stage0_autoencoder.main([*arguments(world, tmp_path / "run", **changes), *flags]) == 2
            assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_other_ids_are_refused_by_a_dry_run_too(
    world: World, image_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = tmp_path / "fewer.parquet"
    write_manifest(read_manifest(world.manifest("clips")).slice(1), fewer)
    words = arguments(world, image_run, **{**EVERYTHING, "data.manifest": str(fewer), "train.steps": 99})
    for flags in (["--dry-run"], []):
        assert stage0_autoencoder.main([*words, *flags]) == 2
        assert "has changed since" in capsys.readouterr().err


def test_clips_without_captions_will_do_without_a_text_encoder(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(world.manifest("clips"))
    nothing = pa.nulls(len(manifest), pa.string())
    at = manifest.column_names.index("caption")
    write_manifest(manifest.set_column(at, "caption", nothing), tmp_path / "bare.parquet")
    given = {"data__manifest": str(tmp_path / "bare.parquet"), "data__val_manifest": str(tmp_path / "bare.parquet")}

    def dry(**changes: Any) -> tuple[int, str]:
        code = stage0_autoencoder.main([*arguments(world, tmp_path / "run", **given, **changes), "--dry-run"])
        told = capsys.readouterr()
        return code, told.out + told.err

    assert dry()[0] == 0
    code, told = dry(text__vocab_size=50)
    assert code == 2 and "caption" in told


@pytest.mark.slow
def test_the_demos_autoencoder_is_made_by_it(tmp_path: Path) -> None:
    places = [f"run.dir={tmp_path / 'run'}", f"data.manifest={tmp_path / 'pictures' / 'manifest.parquet'}"]
    steps = ["train.steps=2", "validation.every=0", "data.num_workers=0"]
    command = ["--out", str(tmp_path / "vae"), "--pictures", "40", *places, *steps]
    succeed("opensora_repro.demo.autoencoder", command, tmp_path / "log")
    vae = open_vae(VaeConfig(path=str(tmp_path / "vae")), "cpu", torch.float32)
    assert (vae.latent_channels, vae.spatial_stride) == (4, 8)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size < 4_000_000


@pytest.mark.slow
def test_the_temporal_one_on_a_frozen_image_one(world: World, image_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    changes = {
        "model__kind": "video", "model__image": str(image_run / "vae"), "model__channels": [8, 8, 16],
        "mixture__image_share": 0.3, "mixture__random_length": True, "loss__image_latents": 1.0,
        "data__num_frames": 9, "train__steps": 4,
    }  # fmt: skip
    succeed(STAGE0, arguments(world, run_dir, **changes), tmp_path / "log")
    vae = open_vae(VaeConfig(path=str(run_dir / "vae")), "cpu", torch.float32)
    assert (vae.spatial_stride, vae.temporal_stride, vae.latent_frames(9)) == (2, 4, 3)
    latents = vae.sample_latents(vae.encode_moments(torch.zeros(3, 9, 32, 32)), None)
    assert vae.decode(latents[None], num_frames=9).shape == (1, 3, 9, 32, 32)
    for own, frozen in zip(_image_weights(vae.vae), _image_weights_of(image_run / "vae"), strict=True):
        assert torch.equal(own, frozen)
    tokens = [json.loads(line)["tokens"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(set(tokens)) > 1  # of several lengths


def _image_weights(vae: Any) -> list[torch.Tensor]:
    return [value for _, value in sorted(vae.spatial_vae.module.state_dict().items())]


def _image_weights_of(folder: Path) -> list[torch.Tensor]:
    frozen = open_vae(VaeConfig(path=str(folder)), "cpu", torch.float32).vae
    return [value for _, value in sorted(frozen.state_dict().items())]


@pytest.mark.slow
def test_two_processes_train_what_one_does(world: World, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"train__steps": 4, "data__draws": 2, "validation__every": 2}
    succeed(STAGE0, arguments(world, one, **changes), tmp_path / "log1")
    for command in start_processes(STAGE0, arguments(world, two, **changes, train__batch_size=1), 2, tmp_path / "log2"):
        assert command.wait() == 0, command.err
    for name in ("metrics", "validation"):
        first, second = (
            [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()] for run in (one, two)
        )
        assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not VIDEO.is_file(), reason="the shared videos are not here")
def test_a_laptops_four_stages_on_own_footage(tmp_path: Path) -> None:
    """The recipes of configs/laptop, with the steps of a minute, from a video to a sampled one."""
    (tmp_path / "footage").mkdir()
    shutil.copy(VIDEO, tmp_path / "footage")
    log = tmp_path / "log"
    clips = tmp_path / "clips"
    succeed("data_tools.split", [str(tmp_path / "footage"), "--out", str(clips), "--short-side", "144"], log / "split")
    words = tmp_path / "captions.csv"
    rows = [
        f"{name},a scene with number {n % 4}"
        for n, name in enumerate(pd.read_parquet(clips / "manifest.parquet")["id"])
    ]
    words.write_text("\n".join(["id,caption", *rows]) + "\n")
    captioned = tmp_path / "captioned"
    sidecar = ["--sidecar", str(words), "--out", str(captioned)]
    succeed("data_tools.caption", [str(clips / "manifest.parquet"), *sidecar], log / "caption")
    shared = [f"data.manifest={captioned / 'manifest.parquet'}", "data.num_workers=0", "data.draws=1", "train.steps=3"]
    runs = [tmp_path / f"stage{number}" for number in range(4)]
    own = [
        (STAGE0, ["validation.every=3"]),
        ("stages.stage1_image", ["train.batch_size=4"]),
        ("stages.stage2_video", ["train.batch_size=2", f"init.weights={runs[1]}"]),
        ("stages.stage3_hq", ["train.batch_size=1", f"init.weights={runs[2]}", "data.frame_interval=1"]),
    ]
    for number, (module, changes) in enumerate(own):
        given = [str(REPO / "configs" / "laptop" / f"stage{number}.toml"), f"run.dir={runs[number]}", *shared, *changes]
        if number:
            given += [f"vae.path={runs[0] / 'vae'}", f"text.path={runs[0] / 'text'}"]
            given += [f"data.cache={tmp_path / f'cache{number}'}"]
        succeed(module, given, log / f"stage{number}")
    out = tmp_path / "out"
    prompt = ["--prompt", "a scene with number 2", "--out", str(out), "--seed", "0", "--steps", "2"]
    succeed("stages.sample", [str(runs[3]), *prompt], log / "sample")
    frames = read_frames(out / "0000.mp4", start=0, count=16)
    assert frames.shape == (16, 96, 96, 3)
