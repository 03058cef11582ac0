"""The one training loop behind every stage."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.dataset import BadSample, Clip
from opensora_repro.data.sampler import interleave
from opensora_repro.diffusion.objective import Objective
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.engine import Engine
from opensora_repro.training.batch import Batch, BatchBuilder, Encoded
from opensora_repro.training.checkpoint import TrainState
from opensora_repro.training.ema import Ema
from opensora_repro.training.encode import Encoder
from opensora_repro.training.errors import TrainingError
from opensora_repro.training.feed import Feed, Sample
from opensora_repro.training.forward import ModelRunner
from opensora_repro.training.grids import sample_prompts, write_samples
from opensora_repro.training.metrics import Progress, RunLog
from opensora_repro.training.optim import learning_rate
from opensora_repro.training.quarantine import Quarantine
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.signals import StopSignals
from opensora_repro.training.validate import Validator


@dataclass
class StepTotals:
    """A step's sums over this data rank's micro-batches, then over all of them."""

    loss: Tensor  # float64 scalar: sum of the good samples' losses
    samples: int = 0
    bad: int = 0
    tokens: int = 0


@dataclass
class Trainer:
    """Everything a step touches. `run` trains up to `train.steps` or until it is asked to stop."""

    cfg: Config
    engine: Engine
    model: STDiT
    objective: Objective
    encoder: Encoder
    builder: BatchBuilder
    ema: Ema
    feed: Feed
    state: TrainState
    writer: CheckpointWriter
    log: RunLog
    quarantine: Quarantine
    validator: Validator | None
    stop: StopSignals

    def __post_init__(self) -> None:
        dtype, device = self.cfg.train.dtype, self.engine.device
        self.train_runner = ModelRunner(self.engine.train_forward, dtype, device)
        self.eval_runner = ModelRunner(self.engine.eval_forward, dtype, device)
        self._saved_step = self.state.step
        self._waited = 0.0
        self._bad_samples: list[BadSample] = []
        self._ids: list[str] = []

    def run(self, title: str) -> None:
        """Raises TrainingError after `train.max_bad_steps` non-finite steps in a row, DataError with too many bad
        samples."""
        steps, state = self.cfg.train.steps, self.state
        first = state.step * self.cfg.train.accumulation
        batches = self.feed.batches(first, (steps - state.step) * self.cfg.train.accumulation)
        with Progress(title, done=state.step, total=steps, enabled=self.engine.is_main) as self.progress:
            self._settle_exchange()
            if state.step:
                self._evaluate(resuming=True)
            self._pending = self._fetch(batches)
            while state.step < steps:
                stopping = self._step(batches)
                if stopping and state.step < steps:
                    self._save()  # what is due at this step is made up for when the run is resumed
                    break
                self._evaluate()
                if state.step % self.cfg.checkpoint.every == 0 or state.step == steps:
                    self._save()
        with self.engine.watchdog.paused():
            self.writer.wait()

    def close(self) -> None:
        self.log.close()
        self.quarantine.close()

    def _settle_exchange(self) -> None:
        """DDP orders its gradients anew after a process's first backward, and sums in that order from then on.

        So let the first be nobody's: then a resumed run adds up as the uninterrupted one does, bit for bit.
        """
        if self.engine.mesh.world_size > 1:
            batch = self.builder.stand_in()
            model_fn = self.train_runner.conditioned(batch.text, batch.mask, batch.drop_text)
            losses = self.objective.losses(model_fn, batch.latents, batch.noise, batch.timesteps)
            self.engine.backward(losses.sum() * batch.weight)
            self.engine.zero_grad()

    # One step

    def _step(self, batches: Iterator[list[Sample]]) -> bool:
        """Train on one global batch; True where a rank was asked to stop."""
        started = time.perf_counter()
        self._waited, self._ids, self._bad_samples = 0.0, [], []
        totals = StepTotals(torch.zeros((), dtype=torch.float64, device=self.engine.device))
        lr = learning_rate(self.cfg.optim, self.state.step, self.cfg.train.steps)
        for number in range(self.cfg.train.accumulation):
            self._micro_batch(totals, lr, last=number == self.cfg.train.accumulation - 1)
            self._pending = self._fetch(batches)
        stopping, loss, norm = self._exchange(totals)
        if totals.bad:
            self._record_bad_samples()
        bad_in_a_row = self._update(loss, norm, lr, totals.samples)
        state = self.state
        state.step += 1
        state.samples_seen += totals.samples
        state.position += state.global_batch_size
        line = {
            "step": state.step,
            "loss": loss if totals.samples else None,
            "grad_norm": norm if totals.samples else None,
            "lr": lr,
            "seconds": round(time.perf_counter() - started, 6),
            "data_seconds": round(self._waited, 6),
            "samples": totals.samples,
            "tokens": totals.tokens,
        }
        self.log.step(line)
        self.progress.step(line)
        if bad_in_a_row:
            self._record_bad_step(loss, norm)
        return stopping

    def _micro_batch(self, totals: StepTotals, lr: float, *, last: bool) -> None:
        """Forward and backward; gradients gather as if every sample of the step were good."""
        self.engine.watchdog.progress(f"step {self.state.step + 1}")
        batch, num_bad = self._assemble(self._pending)
        self._ids += batch.ids
        if self.cfg.optim.in_backward and batch.ids:
            self.engine.step_in_backward(lr, self.state.global_batch_size / len(batch.ids))
        with self.engine.accumulating(last=last):
            model_fn = self.train_runner.conditioned(batch.text, batch.mask, batch.drop_text)
            losses = self.objective.losses(model_fn, batch.latents, batch.noise, batch.timesteps)
            share = batch.weight / (self.cfg.train.batch_size * self.cfg.train.accumulation)
            self.engine.backward(losses.sum() * share)
        totals.loss += losses.detach().double().sum() * batch.weight
        totals.samples += len(batch.ids)
        totals.bad += num_bad
        totals.tokens += batch.num_tokens

    def _exchange(self, totals: StepTotals) -> tuple[bool, float, float]:
        """Add up the ranks' totals in place; whether to stop, mean loss, and norm of the mean loss's gradient."""
        counts = [totals.samples, totals.bad, totals.tokens, int(self.stop.requested())]
        sums = torch.cat([totals.loss[None], torch.tensor(counts).to(totals.loss)])
        sums /= self.engine.mesh.model_size  # as many ranks have counted the same samples
        sums = self.engine.sum(torch.cat([sums, self.engine.squared_gradients()[None]]))
        # The step's only wait for the device; the next micro-batch has been fetched meanwhile.
        loss, samples, bad, tokens, stopping, square = sums.tolist()
        norm = math.sqrt(square)
        totals.samples, totals.bad, totals.tokens = int(samples), int(bad), int(tokens)
        good = max(totals.samples, 1)
        return bool(stopping), loss / good, norm * self.state.global_batch_size / good

    def _update(self, loss: float, norm: float, lr: float, num_good: int) -> bool:
        """Clip, step and average; a non-finite step leaves weights, optimizer and average alone and returns True.

        Where the backward pass has made the step, it cannot be undone: a non-finite one ends the run, unsaved.
        """
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite and num_good:
            if not self.cfg.optim.in_backward:
                self.engine.step(lr, self._factor(norm, num_good))
            self.ema.update()
        self.engine.zero_grad()
        self.state.bad_steps = 0 if finite else self.state.bad_steps + 1
        return not finite

    def _factor(self, norm: float, num_good: int) -> float:
        """What the gradients are multiplied with."""
        clip = self.cfg.optim.clip_norm
        factor = self.state.global_batch_size / num_good
        return factor * (clip / norm) if clip and norm > clip else factor

    def _fetch(self, batches: Iterator[list[Sample]]) -> list[Sample]:
        """The next micro-batch (after the last one, an empty list); the time it takes is time waited for data."""
        started = time.perf_counter()
        samples = next(batches, [])
        self._waited += time.perf_counter() - started
        return samples

    def _assemble(self, samples: list[Sample]) -> tuple[Batch, int]:
        """Encode what is not yet encoded, set bad samples aside, draw the random numbers; also how many were bad.

        Ranks that work on the same samples have read and encoded a share each.
        """
        own = [(epoch, self._encoded(sample)) for epoch, sample in samples]
        everyone = interleave(self.engine.members.gather(own))
        good = [(epoch, encoded) for epoch, encoded in everyone if encoded is not None]
        return self.builder.build(good) if good else self.builder.stand_in(), len(everyone) - len(good)

    def _encoded(self, sample: Clip | Encoded | BadSample) -> Encoded | None:
        if isinstance(sample, BadSample):
            self._bad_samples.append(sample)
            return None
        encoded = sample if isinstance(sample, Encoded) else self.encoder.encode(sample)
        return encoded if self.engine.members.size == 1 else encoded.cpu()

    # What a step leaves behind

    def _record_bad_samples(self) -> None:
        for sample in (sample for samples in self.engine.peers.gather(self._bad_samples) for sample in samples):
            if self.quarantine.add(sample):
                self.progress.say(f"sample {sample.id!r} set aside ({sample.path}): {sample.reason}")

    def _record_bad_step(self, loss: float, norm: float) -> None:
        ids = list(dict.fromkeys(name for names in self.engine.peers.gather(self._ids) for name in names))
        state, limit = self.state, self.cfg.train.max_bad_steps
        self.log.bad_step({"step": state.step, "loss": loss, "grad_norm": norm, "sample_ids": ids})
        self.progress.say(f"step {state.step} skipped: loss {loss}, gradient norm {norm} (non-finite)")
        if state.bad_steps >= limit:
            raise TrainingError(
                f"{limit} non-finite steps in a row (train.max_bad_steps), up to step {state.step}: the samples are in "
                f'{self.log.bad_steps.path}; a lower optim.lr or train.dtype="fp32" may help, in a new run.dir'
            )

    def _save(self) -> None:
        if self._saved_step == self.state.step:
            return
        self.state.ema_updates = self.ema.updates
        with self.engine.watchdog.paused():
            self.writer.save(self.state, self.ema)
        self._saved_step = self.state.step

    def _evaluate(self, *, resuming: bool = False) -> None:
        """Validate and sample where due, with averaged weights; after resuming only what had not been done."""
        step, cfg = self.state.step, self.cfg
        validate = self.validator is not None and self._due(cfg.validation.every)
        sample = bool(cfg.sample.prompts) and self._due(cfg.sample.every)
        if resuming:
            recorded = self.engine.peers.on_first(lambda: [line["step"] for line in self.log.validation.read()])
            validate = validate and step not in recorded
            folder = Path(cfg.run.dir) / "samples" / f"step-{step:08d}"
            sample = sample and not self.engine.peers.on_first(folder.exists)
        if not (validate or sample):
            return
        with self.ema.applied(), self.engine.watchdog.paused():
            if validate:
                self._validate()
            if sample:
                self.engine.on_first_model(self._sample)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.cfg.train.steps)

    def _validate(self) -> None:
        assert self.validator is not None
        losses = self.validator.losses(self.eval_runner)
        line: dict[str, Any] = {
            "step": self.state.step,
            "loss": sum(losses) / len(losses),
            "losses": losses,
            "timesteps": self.validator.timesteps,
            "samples": self.validator.num_samples,
        }
        self.log.validate(line)

    def _sample(self) -> None:
        videos = sample_prompts(self.cfg, self.model, self.engine.eval_forward, self.encoder)
        if self.engine.is_main:
            folder, grid = write_samples(self.cfg, videos, self.state.step)
            self.log.image("samples", grid, self.state.step)
            self.progress.say(f"samples of step {self.state.step}: {folder / 'grid.png'}")
