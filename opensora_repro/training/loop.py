"""The one training loop behind every stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.buckets import as_sampled
from opensora_repro.data.sampler import Schedule
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.errors import DataError, TrainingError, cannot_write, is_out_of_memory, out_of_memory
from opensora_repro.files import digest, one_line
from opensora_repro.frozen.encoder import Encoder
from opensora_repro.frozen.text import EncodedPrompts
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.parallel.device import HostValues
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.process import StopSignals
from opensora_repro.run_folder import REPORT_FILE, JsonLines, TrainState, list_checkpoints, mark_best
from opensora_repro.sampling.generate import NotFinite
from opensora_repro.sampling.grids import moving_grid, sample_prompts, write_samples
from opensora_repro.training.adapters import dropout_keys
from opensora_repro.training.alarms import Alarms, is_due
from opensora_repro.training.batches import Batch, BatchBuilder, Collator, Feed, Fetched, PackedBatch, Prefetcher
from opensora_repro.training.checkpoint import UnwritableCheckpoint
from opensora_repro.training.metrics import Progress, Quarantine, RunLog
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.step import (
    Ema,
    ModelRunner,
    PendingStep,
    StepResult,
    StepTotals,
    decide,
    learning_rate,
    packed_losses,
)
from opensora_repro.training.validate import Validator, largest_activation

REPORTS_REST = 50  # times as long as the last one took
SHOWN_METRICS = ("loss", "caption_gap", "motion_gap", "frechet", "kernel", "clip_score")
MAX_EMPTY_STEPS = 8  # in a row: nothing is learned, and more of the same is to be expected


class BadWeights(TrainingError):
    """The weights are no longer worth saving."""


class Evaluates(Protocol):
    """What measures the model as it is, for `[evaluate]`. Collective."""

    def measure(self, runner: ModelRunner, model: CaptionedModel) -> dict[str, float]: ...


@dataclass
class Trainer:
    """Everything a step touches. `run` trains up to `train.steps` or until it is asked to stop.

    The host gives the device a step while that still works on the one before. So what a step has come to, and with it
    its lines in the logs, a request to stop and a non-finite loss, is known one step later, or when it is waited for:
    before weights are saved or used for anything else. Ranks go through all of this in the same order.
    """

    cfg: Config
    engine: TorchEngine
    model: CaptionedModel
    objective: Objective
    encoder: Encoder
    ema: Ema
    schedule: Schedule
    feed: Feed
    state: TrainState
    writer: CheckpointWriter
    log: RunLog
    quarantine: Quarantine
    validator: Validator | None
    evaluation: Evaluates | None
    alarms: Alarms
    stop: StopSignals

    def __post_init__(self) -> None:
        self._build_parts()
        self._data_ranks = self.engine.mesh.data_size
        self._saved_step = self.state.step
        self._pending: PendingStep | None = None
        self._stopping = False
        self._empty_steps = 0  # in a row
        self._moving = False  # whether weights may be between two steps
        self._next_report = 0.0
        self._dropout = dropout_keys(self.model)

    def run(self, title: str) -> None:
        """Raises what ended the training early, after the trained steps were saved.

        TrainingError: `train.max_bad_steps` non-finite steps in a row, a file that cannot be written, a loader that
        died, no memory. DataError: too many bad samples. Both also where no step was trained at all.
        """
        steps, state = self.cfg.train.steps, self.state
        first = state.step * self.cfg.train.accumulation
        samples = self.feed.batches(first, (steps - state.step) * self.cfg.train.accumulation)
        self._batches = self._prefetcher(samples)
        self.progress = Progress(title, done=state.step, total=steps, enabled=self.engine.is_main)
        with contextlib.closing(self.progress):
            try:
                self._train()
            except Exception as error:
                rescued = self._rescued(error)
                if rescued is error:
                    raise
                raise rescued from error
            finally:
                self._await_writer()

    def close(self) -> None:
        self.log.close()
        self.quarantine.close()

    def _train(self) -> None:
        steps, state = self.cfg.train.steps, self.state
        self._settle_exchange()
        if state.step:
            self._evaluate(resuming=True)
            self._mark_best()
        self._batches.prefetch()
        while state.step < steps and not self._stopping:
            self._step()
            if self._stopping:
                self._await_device()  # it may have to be taken back
            if self._stopping and state.step < steps:
                break  # what is due at this step is made up for when the run is resumed
            self._evaluate()
            due = state.step % self.cfg.checkpoint.every == 0
            if due:
                self._save()
            self._look_for_alarms(due)
            if due:
                self._report()
        self._save()
        self._look_for_alarms(True)
        self._report(last=True)
        with self.engine.watchdog.paused():
            self.writer.wait()
        self.log.close()
        self.engine.world.agree(self._own_error())
        if state.step == steps and not self._trained:
            raise self._nothing_trained()

    # What another stage's trainer has its own of

    def _build_parts(self) -> None:
        dtype, device = self.cfg.train.dtype, self.engine.device
        self.builder = BatchBuilder(self.cfg, self.encoder.vae, self.objective, device)
        self.train_runner = ModelRunner(self.engine.train_forward, dtype, device)
        self.eval_runner = ModelRunner(self.engine.eval_forward, dtype, device)

    def _prefetcher(self, samples: Iterator[Fetched]) -> Prefetcher:
        spread = self.encoder.text.shards is not None and not self.cfg.data.cache
        collator = Collator(self.encoder, self.builder, self.engine.members, spread=spread)
        # Encoding beside the training, two streams would exchange at once, each process in an order of its own.
        overlap = self.cfg.train.overlap and not spread
        return Prefetcher(samples, collator, self.engine.device, overlap=overlap)

    def _parts_of(self, pending: PendingStep) -> dict[str, float]:
        """What else a step's line has."""
        return {}

    # One step

    def _settle_exchange(self) -> None:
        """DDP orders its gradients anew after a process's first backward, and sums in that order from then on.

        So let the first be nobody's: then a resumed run adds up as the uninterrupted one does, bit for bit.
        """
        if self.engine.mesh.world_size > 1:
            batch = self.builder.stand_in()
            self.engine.backward(self._losses(batch).sum() * batch.weight)
            self.engine.zero_grad()

    def _losses(self, batch: Batch | PackedBatch) -> Tensor:
        """Of each sample, float32 [B]."""
        if isinstance(batch, PackedBatch):
            return packed_losses(self.train_runner, self.objective, batch)
        if self._dropout is not None:
            self._dropout.seeds = batch.dropout_seeds
        model_fn = self.train_runner.conditioned(
            batch.text, batch.mask, batch.drop_text, frame_mask=batch.frame_mask, **batch.conditions
        )
        drawn = batch.latents, batch.noise, batch.timesteps
        return self.objective.losses(model_fn, *drawn, frame_mask=batch.frame_mask)

    def _step(self) -> None:
        """Give the device a global batch to train on; meanwhile see what has become of the step before."""
        started, waited = time.perf_counter(), self._batches.seconds_waited
        cfg, state = self.cfg, self.state
        pending = PendingStep(state.step + 1, learning_rate(cfg.optim, state.step, cfg.train.steps))
        pending.rows = self.schedule.step(state.step).rows
        totals = StepTotals(torch.zeros((), dtype=torch.float64, device=self.engine.device))
        for number in range(cfg.train.accumulation):
            self._micro_batch(pending, totals, last=number == cfg.train.accumulation - 1)
            self._batches.prefetch()
        decision = decide(
            self.engine,
            totals,
            stopping=self.stop.received is not None or self._own_error() is not None,
            global_batch_size=len(pending.rows),
            clip_norm=cfg.optim.clip_norm,
        )
        pending.result = HostValues(decision.result)
        self._settle()  # the weights are still those that the step before has left
        if not cfg.optim.in_backward:
            self._moving = True
            self.engine.step(pending.lr, decision.factor, decision.skip)
        self._moving = False
        self.engine.zero_grad()
        state.step += 1
        pending.seconds = time.perf_counter() - started
        pending.seconds_waited = self._batches.seconds_waited - waited
        self._pending = pending
        if cfg.optim.in_backward:  # the next backward pass will move the weights that the average is due
            self._await_device()

    def _micro_batch(self, pending: PendingStep, totals: StepTotals, *, last: bool) -> None:
        """Forward and backward; gradients gather as if every sample of the step were good."""
        self.engine.watchdog.progress(f"step {pending.number}")
        ready = self._batches.take()
        for batch in ready.batches:
            self._backward(pending, totals, batch, last=last and batch is ready.batches[-1])
        totals.bad += ready.num_bad
        totals.lost |= ready.lost
        pending.bad_samples += ready.bad_samples

    def _backward(self, pending: PendingStep, totals: StepTotals, batch: Batch | PackedBatch, *, last: bool) -> None:
        if self.cfg.optim.in_backward and batch.ids:
            self._moving = True
            self.engine.step_in_backward(pending.lr, len(pending.rows) / len(batch.ids))
        with self.engine.accumulating(last=last):
            losses = self._losses(batch)
            share = batch.weight / (len(pending.rows) // self._data_ranks)
            self.engine.backward(losses.sum() * share)
        totals.loss += losses.detach().double().sum() * batch.weight
        totals.samples += len(batch.ids)
        totals.tokens += batch.num_tokens
        pending.ids += batch.ids

    # What becomes of a step

    def _await_device(self) -> None:
        """Settle the last step now; it takes as long as the host waits."""
        if self._pending is not None and self._pending.result is not None:
            started = time.perf_counter()
            self._pending.result.read()
            self._pending.seconds += time.perf_counter() - started
        self._settle()

    def _settle(self) -> None:
        """Average, count and write down what the last step has come to. Raises as `run` does."""
        pending, self._pending = self._pending, None
        if pending is None or pending.result is None:
            return
        found = StepResult.of(pending.result.read())
        self._stopping = found.stopping
        if found.lost:  # as if it had not begun
            self.state.step -= 1
            return
        self.quarantine.saw(pending.rows)
        if found.bad:
            self._record_bad_samples(pending)
        if found.stepped:
            self.ema.update()
        self.state.samples_seen += found.samples
        self.state.bad_steps = 0 if found.finite else self.state.bad_steps + 1
        line = {
            "step": pending.number,
            "loss": found.loss if found.samples else None,
            "grad_norm": found.grad_norm if found.samples else None,
            "lr": pending.lr,
            "seconds": round(pending.seconds, 6),
            "data_seconds": round(pending.seconds_waited, 6),
            "samples": found.samples,
            "tokens": found.tokens,
            **self._parts_of(pending),
        }
        self.log.step(line)
        self.progress.step(line)
        if not found.finite:
            self._record_bad_step(pending, found)
        self._check_samples(found)

    def _check_samples(self, found: StepResult) -> None:
        """Raise DataError, in all processes alike, where too few samples can be read to go on."""
        self.quarantine.check()
        self._empty_steps = 0 if found.samples else self._empty_steps + 1
        if self._empty_steps == MAX_EMPTY_STEPS:
            raise DataError(
                f"{MAX_EMPTY_STEPS} steps in a row without a sample that could be read, up to step {self.state.step} "
                f"({len(self.quarantine)} of the {self.quarantine.num_seen} samples seen are bad); "
                f"{self.quarantine.latest()}"
            )

    def _record_bad_samples(self, pending: PendingStep) -> None:
        for sample in (sample for samples in self.engine.world.gather(pending.bad_samples) for sample in samples):
            if self.quarantine.add(sample):
                self.progress.say(f"sample {sample.id!r} set aside ({sample.path}): {sample.reason}")

    def _record_bad_step(self, pending: PendingStep, found: StepResult) -> None:
        ids = list(dict.fromkeys(name for names in self.engine.world.gather(pending.ids) for name in names))
        step, loss, norm, limit = pending.number, found.loss, found.grad_norm, self.cfg.train.max_bad_steps
        self.log.bad_step({"step": step, "loss": loss, "grad_norm": norm, "sample_ids": ids})
        self.progress.say(f"step {step} skipped: loss {loss}, gradient norm {norm} (non-finite)")
        if self.state.bad_steps >= limit:
            raise BadWeights(
                f"{limit} non-finite steps in a row (train.max_bad_steps), up to step {step}: the samples are in "
                f"{self.log.bad_steps.path}. {self._advice()}"
            )

    # Between two steps

    def _weights_are_finite(self) -> bool:
        """Of all processes. Collective."""
        bad = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for value in self.engine.masters.values():
            bad += (~value.detach().isfinite()).sum().to(bad)
        return self.engine.sum(bad).item() == 0

    def _save(self) -> None:
        self._await_device()
        if self._saved_step == self.state.step or not self._trained:
            return
        if not self._weights_are_finite():
            raise BadWeights(f"step {self.state.step} is not saved. {self._advice()}")
        self.state.ema_updates = self.ema.updates
        with self.engine.watchdog.paused():
            self.writer.save(self.state, self.ema)
        self._saved_step = self.state.step

    def _look_for_alarms(self, now: bool) -> None:
        """Of what the log has; in the process that writes it, whose `_own_error` ends the run for all."""
        step = self.state.step
        if self.engine.is_main and step and (now or is_due(step)):
            newest = int(self.schedule.step(step - 1).epochs.max())
            self._say_all(self.alarms.look(step, newest))

    def _say_all(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.progress.say(line)

    def _evaluate(self, *, resuming: bool = False) -> None:
        """Validate, evaluate and sample where due, on averaged weights; after resuming only what had not been done."""
        step, cfg = self.state.step, self.cfg
        validate = self.validator is not None and self._due(cfg.validation.every)
        measure = self.evaluation is not None and self._due(cfg.evaluate.every)
        sample = bool(cfg.sample.prompts) and self._due(cfg.sample.every)
        if resuming:
            validate = validate and step not in self._recorded(self.log.validation)
            measure = measure and step not in self._recorded(self.log.evaluation)
            folder = Path(cfg.run.dir) / "samples" / f"step-{step:08d}"
            sample = sample and not self.engine.world.on_first(folder.exists)
        if not (validate or measure or sample):
            return
        self._await_device()
        if self.state.step != step:
            return  # it was lost
        if self._dropout is not None:
            self._dropout.seeds = []
        of_trained = self._validate_trained() if validate else {}
        with self.ema.applied(), self.engine.watchdog.paused():
            if validate:
                self._validate(of_trained)
            if measure:
                self._measure()
            if sample:
                encoded = EncodedPrompts(self.encoder.text, cfg.sample.prompts)  # by all, who may each hold a share
                self.engine.on_first_model(lambda: self._sample(encoded))  # every process gets its error

    def _mark_best(self) -> None:
        """What resuming has measured, or measures by, may tell of another one."""
        if self.cfg.checkpoint.keep_best:
            self.engine.world.on_first(lambda: mark_best(self.writer.run_dir, self.cfg.checkpoint.keep_best))

    def _recorded(self, lines: JsonLines) -> list[int]:
        found: list[int] = self.engine.world.on_first(lambda: [line["step"] for line in lines.read()])
        return found

    def _measure(self) -> None:
        assert self.evaluation is not None
        metrics = self.evaluation.measure(self.eval_runner, self.model)
        self.log.evaluate(self.state.step, metrics)
        shown = ", ".join(f"{name} {metrics[name]:.4g}" for name in SHOWN_METRICS if name in metrics)
        self.progress.say(f"evaluation of step {self.state.step}: {shown}")

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.cfg.train.steps)

    def _validate_trained(self) -> dict[str, float]:
        """At one noise level, without the average: whether that lags behind."""
        assert self.validator is not None
        with self.engine.watchdog.paused():
            self.engine.show(self.engine.masters)  # FSDP gathers whole weights by this, others copy nothing
            return {"of_trained": self.validator.losses(self.eval_runner, [self.validator.middle])[0]}

    def _validate(self, of_trained: dict[str, float]) -> None:
        validator = self.validator
        assert validator is not None
        with largest_activation(self.model) as seen:
            by_clip = validator.by_clip(self.eval_runner)
        losses: list[float] = np.mean(list(by_clip.values()), axis=0).tolist()
        found = {"losses": losses, "timesteps": validator.timesteps, "samples": validator.num_samples}
        found |= of_trained | {"of_average": losses[validator.timesteps.index(validator.middle)]}
        found |= {
            "clips": digest(list(by_clip), size=8),
            "of_clips": [float(f"{mean(of):.7g}") for of in by_clip.values()],
        }
        largest = max(self.engine.world.gather(seen[0].item() if seen else 0.0))
        line = {"step": self.state.step, "loss": sum(losses) / len(losses), **found, "activation": largest}
        self.log.validate(line)

    def _sample(self, encoded: EncodedPrompts) -> None:
        try:
            videos = sample_prompts(
                as_sampled(self.cfg), self.model, self.engine.eval_forward, self.encoder.vae, encoded
            )
        except NotFinite as error:
            self.progress.say(f"warning: no samples of step {self.state.step}: {error}")
            videos = []
        stride = self.encoder.vae.spatial_stride
        if self.engine.is_main:
            self._say_all(self.alarms.look_at_samples(self.state.step, videos, stride))
        if self.engine.is_main and videos:
            try:
                folder, grid = write_samples(self.cfg, videos, self.state.step)
            except OSError as error:
                raise TrainingError(cannot_write(error)) from error
            self.log.image("samples", grid, self.state.step)
            self.log.videos(sorted(folder.glob("*.mp4")), moving_grid(videos), sample_fps(self.cfg), self.state.step)
            self.progress.say(f"samples of step {self.state.step}: {folder / 'grid.png'}")

    def _report(self, *, last: bool = False) -> None:
        """RUN/report.html, which no training depends on: the page of a long run waits until it is worth its time."""
        if not self.engine.is_main or (not last and time.monotonic() < self._next_report):
            return
        started = time.monotonic()
        try:
            self._write_report()
        except Exception as error:
            self.progress.say(f"warning: no {REPORT_FILE}: {type(error).__name__}: {one_line(error)}")
        seconds = time.monotonic() - started
        self._next_report = started + (1 + REPORTS_REST) * seconds

    def _write_report(self) -> None:
        from opensora_repro.report.page import write_report

        write_report([self.log.run_dir], self.log.run_dir / REPORT_FILE)

    # How it ends early

    def _own_error(self) -> TrainingError | None:
        """Why this process cannot go on, though the others could: all stop together."""
        return self._batches.error or self.log.error or self.quarantine.error or self.alarms.error

    @property
    def _trained(self) -> bool:
        return self.ema.updates > 0

    def _nothing_trained(self) -> Exception:
        if self.state.samples_seen:
            return TrainingError(f"no step was trained: none was finite. {self._advice()}")
        seen = f"the {self.quarantine.num_seen} samples seen"
        return DataError(f"no step was trained: not one of {seen} could be read; {self.quarantine.latest()}")

    def _rescued(self, error: Exception) -> Exception:
        """What to raise for the error, with what was saved in its line."""
        if isinstance(error, BadWeights):
            return error
        if isinstance(error, UnwritableCheckpoint):
            return UnwritableCheckpoint(f"{error}; {self._newest()}")
        if isinstance(error, DataError | TrainingError):  # of all processes alike
            return type(error)(f"{error}; {self._saved_now()}")
        alone = self.engine.mesh.world_size == 1 and not self._moving
        saved = self._saved_now() if alone else "nothing was saved since the last checkpoint"
        if is_out_of_memory(error):
            return TrainingError(f"{out_of_memory(error)}; {saved}")
        if isinstance(error, OSError):
            return TrainingError(f"{cannot_write(error)}; {saved}")
        return error

    def _saved_now(self) -> str:
        """Save the trained steps, and say so."""
        try:
            self.engine.zero_grad()
            self._save()
            with self.engine.watchdog.paused():
                self.writer.wait()
        except Exception as error:
            return f"step {self.state.step} could not be saved: {error}; {self._newest()}"
        return self._newest()

    def _newest(self) -> str:
        newest = list_checkpoints(self.writer.run_dir)[-1:]
        return f"saved: {newest[0]}" if newest else "no trained step was saved"

    def _await_writer(self) -> None:
        """What was begun is written to its end, whatever ends the run; its own error comes second."""
        try:
            with self.engine.watchdog.paused():
                self.writer.wait()
        except UnwritableCheckpoint as error:
            self.progress.say(f"warning: {error}")

    def _advice(self) -> str:
        """What may help against steps that are not finite. Collective."""
        optim = self.cfg.optim
        if not self._weights_are_finite():
            return (
                "The weights themselves are no longer finite, and no later step can mend them: go back to earlier ones "
                f"({self._newest()}), with a lower optim.lr in a new run.dir"
            )
        remedies = ["a lower optim.lr"]
        if not optim.clip_norm and not optim.in_backward:
            remedies.append("optim.clip_norm=1")
        if self.cfg.train.dtype != "fp32":
            remedies.append('train.dtype="fp32"')
        return f"{' or '.join(remedies)} may help, in a new run.dir; or these samples are at fault"
