"""The one training loop behind every stage."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opensora_repro.config import Config
from opensora_repro.data.dataset import BadSample
from opensora_repro.diffusion.objective import Objective
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.device import HostValues
from opensora_repro.parallel.engine import Engine
from opensora_repro.training.ahead import Assembler, ReadyBatches
from opensora_repro.training.batch import BatchBuilder
from opensora_repro.training.checkpoint import TrainState
from opensora_repro.training.ema import Ema
from opensora_repro.training.encode import Encoder
from opensora_repro.training.errors import TrainingError
from opensora_repro.training.feed import Feed
from opensora_repro.training.forward import ModelRunner
from opensora_repro.training.generate import NotFinite
from opensora_repro.training.grids import sample_prompts, write_samples
from opensora_repro.training.metrics import Progress, RunLog
from opensora_repro.training.optim import learning_rate
from opensora_repro.training.quarantine import Quarantine
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.signals import StopSignals
from opensora_repro.training.validate import Validator
from opensora_repro.training.verdict import Findings, StepTotals, judge


@dataclass
class GivenStep:
    """A step that the device has been given, and of which the host does not know yet how it went."""

    number: int
    lr: float
    seconds: float = 0.0
    seconds_waited: float = 0.0  # for samples
    ids: list[str] = field(default_factory=list)
    bad_samples: list[BadSample] = field(default_factory=list)
    findings: HostValues | None = None  # once all of the step has been given


@dataclass
class Trainer:
    """Everything a step touches. `run` trains up to `train.steps` or until it is asked to stop.

    The host gives the device a step while that still works on the one before. So what a step has come to, and with it
    its lines in the logs, a wish to stop and a non-finite loss, is known one step later, or when it is waited for:
    before weights are saved or used for anything else. Ranks go through all of this in the same order.
    """

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
        self._given: GivenStep | None = None
        self._stopping = False

    def run(self, title: str) -> None:
        """Raises TrainingError after `train.max_bad_steps` non-finite steps in a row, DataError with too many bad
        samples."""
        steps, state = self.cfg.train.steps, self.state
        first = state.step * self.cfg.train.accumulation
        samples = self.feed.batches(first, (steps - state.step) * self.cfg.train.accumulation)
        assembler = Assembler(self.encoder, self.builder, self.engine.members)
        self._batches = ReadyBatches(samples, assembler, self.engine.device, overlap=self.cfg.train.overlap)
        with Progress(title, done=state.step, total=steps, enabled=self.engine.is_main) as self.progress:
            self._settle_exchange()
            if state.step:
                self._evaluate(resuming=True)
            self._batches.prepare()
            while state.step < steps and not self._stopping:
                self._step()
                if self._stopping and state.step < steps:
                    break  # what is due at this step is made up for when the run is resumed
                self._evaluate()
                if state.step % self.cfg.checkpoint.every == 0:
                    self._save()
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

    def _step(self) -> None:
        """Give the device a global batch to train on; meanwhile see what has become of the step before."""
        started, waited = time.perf_counter(), self._batches.seconds_waited
        cfg, state = self.cfg, self.state
        given = GivenStep(state.step + 1, learning_rate(cfg.optim, state.step, cfg.train.steps))
        totals = StepTotals(torch.zeros((), dtype=torch.float64, device=self.engine.device))
        for number in range(cfg.train.accumulation):
            self._micro_batch(given, totals, last=number == cfg.train.accumulation - 1)
            self._batches.prepare()
        verdict = judge(
            self.engine,
            totals,
            stopping=self.stop.requested(),
            global_batch_size=state.global_batch_size,
            clip_norm=cfg.optim.clip_norm,
        )
        given.findings = HostValues(verdict.findings)
        self._settle()  # the weights are still those that the step before has left
        if not cfg.optim.in_backward:
            self.engine.step(given.lr, verdict.factor, verdict.skip)
        self.engine.zero_grad()
        state.step += 1
        state.position += state.global_batch_size
        given.seconds = time.perf_counter() - started
        given.seconds_waited = self._batches.seconds_waited - waited
        self._given = given
        if cfg.optim.in_backward:  # the next backward pass will move the weights that the average is due
            self._await_device()

    def _micro_batch(self, given: GivenStep, totals: StepTotals, *, last: bool) -> None:
        """Forward and backward; gradients gather as if every sample of the step were good."""
        self.engine.watchdog.progress(f"step {given.number}")
        ready = self._batches.take()
        batch = ready.batch
        if self.cfg.optim.in_backward and batch.ids:
            self.engine.step_in_backward(given.lr, self.state.global_batch_size / len(batch.ids))
        with self.engine.accumulating(last=last):
            model_fn = self.train_runner.conditioned(batch.text, batch.mask, batch.drop_text)
            losses = self.objective.losses(model_fn, batch.latents, batch.noise, batch.timesteps)
            share = batch.weight / (self.cfg.train.batch_size * self.cfg.train.accumulation)
            self.engine.backward(losses.sum() * share)
        totals.loss += losses.detach().double().sum() * batch.weight
        totals.samples += len(batch.ids)
        totals.bad += ready.num_bad
        totals.tokens += batch.num_tokens
        given.ids += batch.ids
        given.bad_samples += ready.bad_samples

    # What a step leaves behind

    def _await_device(self) -> None:
        """Settle the last step now; it takes as long as the host waits."""
        if self._given is not None and self._given.findings is not None:
            started = time.perf_counter()
            self._given.findings.read()
            self._given.seconds += time.perf_counter() - started
        self._settle()

    def _settle(self) -> None:
        """Average, count and write down what the last step has come to. Raises as `run` does."""
        given, self._given = self._given, None
        if given is None or given.findings is None:
            return
        found = Findings.of(given.findings.read())
        self._stopping = found.stopping
        if found.bad:
            self._record_bad_samples(given)
        if found.stepped:
            self.ema.update()
        self.state.samples_seen += found.samples
        self.state.bad_steps = 0 if found.finite else self.state.bad_steps + 1
        line = {
            "step": given.number,
            "loss": found.loss if found.samples else None,
            "grad_norm": found.grad_norm if found.samples else None,
            "lr": given.lr,
            "seconds": round(given.seconds, 6),
            "data_seconds": round(given.seconds_waited, 6),
            "samples": found.samples,
            "tokens": found.tokens,
        }
        self.log.step(line)
        self.progress.step(line)
        if not found.finite:
            self._record_bad_step(given, found)

    def _record_bad_samples(self, given: GivenStep) -> None:
        for sample in (sample for samples in self.engine.peers.gather(given.bad_samples) for sample in samples):
            if self.quarantine.add(sample):
                self.progress.say(f"sample {sample.id!r} set aside ({sample.path}): {sample.reason}")

    def _record_bad_step(self, given: GivenStep, found: Findings) -> None:
        ids = list(dict.fromkeys(name for names in self.engine.peers.gather(given.ids) for name in names))
        step, loss, norm, limit = given.number, found.loss, found.grad_norm, self.cfg.train.max_bad_steps
        self.log.bad_step({"step": step, "loss": loss, "grad_norm": norm, "sample_ids": ids})
        self.progress.say(f"step {step} skipped: loss {loss}, gradient norm {norm} (non-finite)")
        if self.state.bad_steps >= limit:
            raise TrainingError(
                f"{limit} non-finite steps in a row (train.max_bad_steps), up to step {step}: the samples are in "
                f'{self.log.bad_steps.path}; a lower optim.lr or train.dtype="fp32" may help, in a new run.dir'
            )

    def _save(self) -> None:
        if self._saved_step == self.state.step:
            return
        self._await_device()
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
        self._await_device()
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
        try:
            videos = sample_prompts(self.cfg, self.model, self.engine.eval_forward, self.encoder)
        except NotFinite as error:
            self.progress.say(f"warning: no samples of step {self.state.step}: {error}")
            return
        if self.engine.is_main:
            folder, grid = write_samples(self.cfg, videos, self.state.step)
            self.log.image("samples", grid, self.state.step)
            self.progress.say(f"samples of step {self.state.step}: {folder / 'grid.png'}")
