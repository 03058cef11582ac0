"""Tiny runs with frozen models to sample from, and `stages.sample` called on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from opensora_repro.config import Config, DataConfig, DiffusionConfig, SampleConfig, TrainConfig, dump_toml
from opensora_repro.models.config import STDiTConfig
from stages.sample import main
from tests.checkpoints import write_checkpoint

PROMPTS = ["a red circle moving left", "a blue square moving up", "../../etc/passwd; rm -rf ~"]


def save_run(run: Path, cfg: Config, *, steps: tuple[int, ...]) -> None:
    """A run's folder with a checkpoint of other random weights at each of `steps`."""
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.run_folder import TrainState

    for step in steps:
        torch.manual_seed(step)
        model = STDiT(cfg.model)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        write_checkpoint(run, model, dump_toml(cfg), TrainState(step=step), shrink_average=0.8)


def make_home(home: Path) -> None:
    """Fill a folder with `vae`, `text` and the runs `flow` (two checkpoints), `iddpm` and `empty`."""
    from diffusers import AutoencoderKL

    from opensora_repro.demo.text_encoder import MAX_LENGTH, words
    from opensora_repro.frozen.own_words import build_encoder, build_tokenizer, vocabulary

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(home / "vae")
    build_encoder(len(vocabulary(words())), seed=0).save_pretrained(home / "text")
    build_tokenizer(words(), MAX_LENGTH, prose=False).save_pretrained(home / "text")
    cfg = Config(
        model=STDiTConfig(
            hidden_size=32, depth=2, num_heads=2, caption_channels=64, model_max_length=12, pred_sigma=False
        ),
        data=DataConfig(num_frames=6, height=32, width=48),
        diffusion=DiffusionConfig(objective="flow", shift=2.0),
        sample=SampleConfig(sampler="euler", steps=3, guidance=2.0, fps=8),
        train=TrainConfig(dtype="fp32"),
    )
    cfg = replace(cfg, vae=replace(cfg.vae, path=str(home / "vae")), text=replace(cfg.text, path=str(home / "text")))
    save_run(home / "flow", cfg, steps=(5, 20))
    cfg = replace(cfg, diffusion=DiffusionConfig(), model=replace(cfg.model, pred_sigma=True))
    save_run(home / "iddpm", replace(cfg, sample=replace(cfg.sample, sampler="dpm")), steps=(1,))
    (home / "empty").mkdir()


def sample(source: Path, out: Path, *args: str, prompts: list[str] = PROMPTS) -> list[np.ndarray]:
    """Run the command; return the written videos."""
    texts = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert main([str(source), *texts, "--out", str(out), "--seed", "3", "--device", "cpu", *args]) == 0
    return [decode(path) for path in sorted(out.glob("*.mp4"))]


def generate_samples(source: Path, *, batch_size: int, prompts: list[str] = PROMPTS) -> list[np.ndarray]:
    """What the command would write from the same seed, as it is before any file is coded."""
    from opensora_repro.sampling.generate import generate
    from opensora_repro.sampling.run import load_models
    from opensora_repro.sampling.source import find_source

    found = find_source(source)
    model, vae, encoder, _ = load_models(found, torch.device("cpu"))
    videos = generate(model, vae, encoder, found.config, prompts, seed=3, batch_size=batch_size)
    return [video.astype(int) for _, video in videos]


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


def check_mistake(args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if "--device" in args else ["--device", "cpu"]
    assert main([*args, "--out", str(tmp_path / "out"), *device]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
