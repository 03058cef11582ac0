"""The real training loop with random weights, for measuring it: on samples that are read, or on ones made up."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.training.loop import Trainer
from opensora_repro.training.measure import Loop

if TYPE_CHECKING:
    import torch

    from opensora_repro.config import Config
    from opensora_repro.data.dataset import Clip
    from opensora_repro.frozen.encoder import Encoded, Encoder
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.training.batches import Feed

PUBLISHED_VAE: dict[str, Any] = {  # Stable Diffusion's
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 256,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


REPO = Path(__file__).resolve().parent.parent
DEMO_CAPTION = 64  # channels of the demo's text encoder


class Strict(Loop):
    """After the first steps, which fill tables that are kept, CUDA refuses every wait for the device."""

    FREE_STEPS = 3

    def _step(self) -> None:
        import torch

        if self.state.step < self.FREE_STEPS or self.engine.device.type != "cuda":
            super()._step()
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            super()._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def loop_config(
    run_dir: Path, model: STDiTConfig, *, size: int, frames: int, batch_size: int, steps: int, dtype: str = "bf16"
) -> Config:
    from opensora_repro.config import CheckpointConfig, Config, DataConfig, RunConfig, TrainConfig

    return Config(
        run=RunConfig(dir=str(run_dir)),
        data=DataConfig(num_frames=frames, height=size, width=size),
        model=model,
        train=TrainConfig(steps=steps, batch_size=batch_size, dtype=dtype),
        checkpoint=CheckpointConfig(every=steps),
    )


def demo_encoder(device: torch.device, max_length: int, vae: Path | None = None) -> Encoder:
    """The demo's text encoder and, unless another is given, its autoencoder."""
    import torch

    from opensora_repro.config import TextConfig, VaeConfig
    from opensora_repro.frozen.encoder import Encoder
    from opensora_repro.frozen.text import open_text_encoder
    from opensora_repro.frozen.vae import open_vae

    folder, dtype = REPO / "checkpoints" / "demo", torch.bfloat16 if device.type == "cuda" else torch.float32
    return Encoder(
        open_vae(VaeConfig(path=str(vae or folder / "vae")), device, dtype),
        open_text_encoder(TextConfig(path=str(folder / "text")), max_length, device, dtype),
        device,
        half=dtype == torch.bfloat16,
    ).load()


def build_loop(
    cfg: Config, encoder: Encoder, feed: Feed, device: torch.device, *, kind: type[Trainer] = Loop
) -> Trainer:
    """A run of the torch engine from its first step on, without validation; its lines go to `run.dir`."""
    import torch

    from opensora_repro.data.sampler import Schedule, everything
    from opensora_repro.diffusion.gaussian import build_objective
    from opensora_repro.kernels import ops
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.process import StopSignals
    from opensora_repro.run_folder import TrainState
    from opensora_repro.training.alarms import Alarms
    from opensora_repro.training.metrics import Quarantine, RunLog
    from opensora_repro.training.optim import build_optimizer
    from opensora_repro.training.save import CheckpointWriter
    from opensora_repro.training.step import Ema
    from opensora_repro.weights.families import family_of

    run_dir = Path(cfg.run.dir)
    run_dir.mkdir(parents=True)
    engine = TorchEngine(cfg.parallel, str(device))
    torch.manual_seed(cfg.run.seed)
    with device:
        model = family_of(cfg.model).network(cfg.model)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    fused = ops.fused(model.x_embedder.proj.weight)
    engine.prepare(model, build_optimizer(model, cfg.optim, fused=fused))
    objective = build_objective(cfg.diffusion)
    log = RunLog(run_dir, resumed_step=0, enabled=True)
    return kind(
        cfg=cfg, engine=engine, model=model, objective=objective, encoder=encoder,
        ema=Ema(engine, cfg.ema.decay), feed=feed,
        state=TrainState(),
        schedule=Schedule(everything(10), [cfg.train.batch_size * cfg.train.accumulation], cfg.run.seed),
        writer=CheckpointWriter(run_dir, engine, "[run]\n", keep=1, background=False),
        log=log, quarantine=Quarantine(run_dir, num_samples=10, max_fraction=0.5), validator=None, evaluation=None,
        alarms=Alarms(cfg, log), stop=StopSignals(),
    )  # fmt: skip


def run_loop(trainer: Trainer) -> list[dict[str, Any]]:
    """Train to the end; the lines of metrics.jsonl."""
    with contextlib.closing(trainer):
        trainer.run("loop")
        lines = trainer.log.metrics.read()
    trainer.engine.close()
    return lines


def times(lines: Sequence[dict[str, Any]], warmup: int) -> dict[str, float]:
    """Median milliseconds of a step, and the share of all steps' time that was spent waiting for samples."""
    measured = lines[warmup:]
    seconds = [line["seconds"] for line in measured]
    waited = sum(line["data_seconds"] for line in measured)
    return {
        "step_ms": round(1000 * statistics.median(seconds), 2),
        "waiting_share": round(waited / sum(seconds), 4),
    }


def with_and_without_overlap(
    cfg: Config, encoder: Encoder, feed: Feed, device: torch.device, *, warmup: int = 3
) -> dict[str, Any]:
    """Steps with the next micro-batch encoded beside them and with it encoded in turn; losses must agree."""
    found: dict[str, Any] = {}
    losses: dict[bool, list[float]] = {}
    for overlap in (False, True):
        run = replace(cfg.run, dir=f"{cfg.run.dir}/{'beside' if overlap else 'in turn'}")
        lines = run_loop(
            build_loop(replace(cfg, run=run, train=replace(cfg.train, overlap=overlap)), encoder, feed, device)
        )
        found["beside" if overlap else "in turn"] = times(lines, warmup)
        losses[overlap] = [line["loss"] for line in lines]
    gaps = [abs(a - b) / abs(b) for a, b in zip(losses[True], losses[False], strict=True)]
    return {
        **found,
        "ratio": round(found["in turn"]["step_ms"] / found["beside"]["step_ms"], 3),
        "largest_gap": max(gaps),
    }


def made_up_clip(number: int, frames: int, size: int) -> Clip:
    import torch

    from opensora_repro.data.dataset import Clip

    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (frames, size, size, 3), dtype=torch.uint8, generator=generator)
    return Clip(f"sample {number}", f"a red circle number {number}", pixels, False, 8.0)


def made_up_encoding(number: int, latents: Sequence[int], text: Sequence[int]) -> Encoded:
    """`latents` is [C, T, h, w], `text` [L, Ct]."""
    import torch

    from opensora_repro.frozen.encoder import Encoded

    generator = torch.Generator().manual_seed(number)
    moments = torch.randn(2 * latents[0], *latents[1:], generator=generator)
    mask = torch.arange(text[0]) <= number % text[0]
    return Encoded(f"sample {number}", moments, torch.randn(*text, generator=generator), mask, torch.tensor(8.0))


def random_vae(folder: Path) -> Path:
    """Stable Diffusion's autoencoder with random weights, on disk: its time does not depend on them."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(**PUBLISHED_VAE).save_pretrained(folder)
    return folder
