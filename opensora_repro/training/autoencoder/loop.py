"""Stage 0's trainer: the one loop of all stages with other batches, losses, validation and results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_repro.config import AutoencoderConfig
from opensora_repro.errors import TrainingError, cannot_write
from opensora_repro.training.autoencoder.batches import VideoBuilder, VideoCollator
from opensora_repro.training.autoencoder.losses import PARTS
from opensora_repro.training.autoencoder.model import RESULT, Trained
from opensora_repro.training.autoencoder.report import write_stage0_report
from opensora_repro.training.autoencoder.validate import HeldOut
from opensora_repro.training.batches import Fetched, Prefetcher
from opensora_repro.training.loop import Trainer
from opensora_repro.training.step import PendingStep, StepTotals


@dataclass
class AutoencoderTrainer(Trainer):
    """`model` is an AutoencoderLosses; `objective` and `encoder` are not there."""

    stage0: AutoencoderConfig = None  # type: ignore[assignment]
    autoencoder: Trained = None  # type: ignore[assignment]
    held_out: HeldOut = None  # type: ignore[assignment]

    def _build_parts(self) -> None:
        self.builder: Any = VideoBuilder(self.stage0, self.autoencoder, self.engine.device)
        self.half = self.cfg.train.dtype == "bf16"
        self.validator: Any = self.held_out if self.cfg.validation.every else None

    def _prefetcher(self, samples: Iterator[Fetched]) -> Prefetcher:
        collator = VideoCollator(self.builder)
        return Prefetcher(samples, collator, self.engine.device, overlap=self.cfg.train.overlap)

    def _losses(self, batch: Any) -> Tensor:
        """Of each sample, float32 [B]."""
        with torch.autocast(self.engine.device.type, torch.bfloat16, enabled=self.half):
            losses, self._latest = self.engine.train_forward(batch.video, batch.drawn, self.state.step)
        return losses.float()

    def _backward(self, pending: PendingStep, totals: StepTotals, batch: Any, *, last: bool) -> None:
        super()._backward(pending, totals, batch, last=last)
        pending.parts.append(self._latest)

    def _parts_of(self, pending: PendingStep) -> dict[str, float]:
        """Means over this process's micro-batches; those of parts that are not trained with are 0."""
        values = torch.stack(pending.parts).double().mean(dim=0).tolist()
        return dict(zip(PARTS, values, strict=True))

    def _validate_trained(self) -> dict[str, float]:
        return {}

    def _validate(self, of_trained: dict[str, float]) -> None:
        """Collective, with the averaged weights in place."""
        found = self.held_out.measure(self.autoencoder)
        line = {"step": self.state.step, "loss": found.l1, "psnr": found.psnr, "ssim": found.ssim}
        self.log.validate({**line, "samples": found.samples})
        self.progress.say(f"step {self.state.step}: PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.3f}")
        self.engine.world.on_first(self._show)

    def _show(self) -> None:
        run_dir, step = Path(self.cfg.run.dir), self.state.step
        try:
            folder, grid = self.held_out.write_grid(self.autoencoder, run_dir, step)
        except OSError as error:
            raise TrainingError(cannot_write(error)) from error
        self.log.image("reconstructions", grid, step)
        self.progress.say(f"reconstructions of step {step}: {folder / 'grid.png'}")

    def _write_report(self) -> None:
        write_stage0_report(Path(self.cfg.run.dir), self.stage0)

    def _save(self) -> None:
        """The result first: whoever finds the last checkpoint finds it, too."""
        self._await_device()
        if self._saved_step != self.state.step and self._trained and self._weights_are_finite():
            with self.ema.applied(), self.engine.watchdog.paused():
                self.engine.world.on_first(self._write_result)
        super()._save()

    def _write_result(self) -> None:
        run_dir = Path(self.cfg.run.dir)
        try:
            self.autoencoder.save(run_dir / RESULT, *self.held_out.latent_statistics(self.autoencoder))
        except OSError as error:
            raise TrainingError(cannot_write(error)) from error
