"""What a run writes about itself: JSON lines, TensorBoard events, samples that cannot be read, the progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.config import AutoencoderConfig, Config
from opensora_repro.data.dataset import BadSample
from opensora_repro.errors import DataError, TrainingError
from opensora_repro.run_folder import (
    ALARMS_FILE,
    BAD_STEPS_FILE,
    EVALUATION_FILE,
    EVENTS,
    METRICS_FILE,
    QUARANTINE_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
    Events,
    JsonLines,
)

if TYPE_CHECKING:
    from opensora_repro.training.track import Track

JUDGED_FROM = 20  # samples seen: the share of fewer says little, unless there are no more


class RunLog:
    """The run's JSON lines and TensorBoard events; on every rank but 0 it writes nothing."""

    def __init__(self, run_dir: Path, *, resumed_step: int, enabled: bool) -> None:
        self.enabled, self.run_dir = enabled, run_dir
        self.metrics = JsonLines(run_dir / METRICS_FILE)
        self.validation = JsonLines(run_dir / VALIDATION_FILE)
        self.evaluation = JsonLines(run_dir / EVALUATION_FILE)
        self.bad_steps = JsonLines(run_dir / BAD_STEPS_FILE)
        self.alarms = JsonLines(run_dir / ALARMS_FILE)
        self.starts = JsonLines(run_dir / STARTS_FILE)
        self._lines = (
            self.metrics, self.validation, self.evaluation, self.bad_steps, self.alarms, self.starts,
        )  # fmt: skip
        self._events = Events(run_dir / EVENTS, resumed_step)
        self._track: Track | None = None
        if enabled:
            for file in self._lines:
                file.truncate_after(resumed_step)

    def open_track(self, cfg: Config | AutoencoderConfig, say: Callable[[str], None]) -> None:
        """Tell `[track]`'s place, too, from here on. Raises ConfigError."""
        if self.enabled and cfg.track.wandb:
            from opensora_repro.training.track import Track

            self._track = Track(cfg, say)

    def step(self, line: Mapping[str, Any]) -> None:
        """One training step: step, loss, grad_norm, lr, seconds, data_seconds, samples, tokens."""
        if not self.enabled:
            return
        self.metrics.write(line)
        values = {f"train/{name}": line[name] for name in ("loss", "grad_norm", "lr")}
        values["speed/samples_per_second"] = line["samples"] / line["seconds"]
        values["speed/data_wait_share"] = line["data_seconds"] / line["seconds"]
        self._add(values, line["step"])

    def validate(self, line: Mapping[str, Any]) -> None:
        """One validation: step, and numbers by name; of losses by timestep: losses, timesteps."""
        if not self.enabled:
            return
        self.validation.write(line)
        by_timestep = zip(line.get("timesteps", ()), line.get("losses", ()), strict=True)
        values = {f"validation/loss_at_{timestep:g}": loss for timestep, loss in by_timestep}
        numbers = {f"validation/{name}": value for name, value in line.items() if isinstance(value, float)}
        self._add(numbers | values, line["step"])

    def evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """One evaluation: numbers by name."""
        if not self.enabled:
            return
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self.evaluation.write({"step": step, "metrics": finite})
        self._add({f"evaluation/{name}": value for name, value in finite.items()}, step)

    def bad_step(self, line: Mapping[str, Any]) -> None:
        """One skipped step: step, loss, grad_norm, sample_ids."""
        if self.enabled:
            self.bad_steps.write(line)

    def alarm(self, line: Mapping[str, Any]) -> None:
        """One alarm that goes off: step, alarm, message."""
        if self.enabled:
            self.alarms.write(line)
            for place in self._places:
                place.add_text(f"alarms/{line['alarm']}", line["message"], line["step"])

    def start(self, line: Mapping[str, Any]) -> None:
        """One start of the run: the step that it goes on from, when, where, with which clips."""
        if self.enabled:
            self.starts.write(line)

    def image(self, name: str, picture: Any, step: int) -> None:
        """A picture [H, W, 3] uint8 among the events."""
        for place in self._places if self.enabled else ():
            place.add_image(name, picture, step)

    def videos(self, files: Sequence[Path], together: np.ndarray, fps: float, step: int) -> None:
        """Videos by their mp4 files, and as one [T, H, W, 3] uint8, which is what TensorBoard gets."""
        if self.enabled and files:
            self._events.add_video("samples/moving", together, fps, step)
            if self._track is not None:
                self._track.add_videos("samples/moving", files, step)

    def _add(self, values: Mapping[str, float | None], step: int) -> None:
        self._events.add(values, step)
        if self._track is not None:
            self._track.add(values, step)

    @property
    def _places(self) -> list[Events | Track]:
        return [self._events] if self._track is None else [self._events, self._track]

    @property
    def error(self) -> TrainingError | None:
        """What could not be written first; None where all was."""
        files = (*self._lines, self._events)
        return next((file.error for file in files if file.error is not None), None)

    def close(self) -> None:
        for file in (*self._lines, *self._places):
            file.close()


class Quarantine:
    """RUN/quarantine.jsonl: one line (id, path, reason) for a sample that cannot be read, kept over restarts.

    Bad samples are recorded and counted, and never replaced by others.
    What counts is the share of the samples seen since this start: repaired files of earlier starts do not.
    """

    def __init__(
        self, run_dir: Path, *, num_samples: int, max_fraction: float, writes: bool = True, kind: str = "samples"
    ) -> None:
        """`writes`: whether this process keeps the file; all count. `kind` is what messages call the samples."""
        self._file = JsonLines(run_dir / QUARANTINE_FILE)
        self.num_samples, self._max_fraction, self._writes, self._kind = num_samples, max_fraction, writes, kind
        self._known = {(line.get("id"), line.get("path")) for line in self._file.read()}
        self._bad: set[str] = set()
        self._latest: BadSample | None = None
        self._seen = np.zeros(num_samples, dtype=bool)
        self.num_seen = 0

    def saw(self, indices: Sequence[int] | np.ndarray) -> None:
        """These rows of the manifest were tried by some process, good or bad; a row counts once."""
        if self.num_seen < self.num_samples:
            self._seen[np.asarray(indices, dtype=np.int64)] = True
            self.num_seen = int(np.count_nonzero(self._seen))

    def add(self, sample: BadSample) -> bool:
        """Record a bad sample; True where it is news."""
        if sample.id in self._bad:
            return False
        self._bad.add(sample.id)
        self._latest = sample
        if self._writes and (sample.id, str(sample.path)) not in self._known:
            self._file.write({"id": sample.id, "path": str(sample.path), "reason": sample.reason})
        return True

    def check(self) -> None:
        """Raise DataError where more of the samples seen are bad than `max_fraction`."""
        if self.is_too_much(len(self._bad), self.num_seen):
            limit = f"more than data.max_bad_fraction = {self._max_fraction} allows"
            raise DataError(f"{self._share()} cannot be read, {limit}; {self.latest()}")

    def summary(self) -> str:
        """One line on the bad ones so far."""
        return f"{self._share()} cannot be read and are set aside; {self.latest()}"

    def _share(self) -> str:
        return f"{len(self._bad)} of {self.num_seen} {self._kind}"

    def is_too_much(self, num_bad: int, num_seen: int) -> bool:
        return num_seen >= min(JUDGED_FROM, self.num_samples) and num_bad / num_seen > self._max_fraction

    def latest(self) -> str:
        """The latest bad sample and where all are listed, for a message."""
        if self._latest is None:
            return "none was bad"
        sample = self._latest
        return f"the latest is {sample.id!r} ({sample.path}): {sample.reason}; all are listed in {self._file.path}"

    @property
    def error(self) -> TrainingError | None:
        """Why the file could not be written; None where it could."""
        return self._file.error

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._bad

    def __len__(self) -> int:
        return len(self._bad)

    def close(self) -> None:
        self._file.close()


class Progress:
    """A bar with loss, samples a second, share of time spent waiting for data, and time left."""

    def __init__(self, name: str, *, done: int, total: int, enabled: bool) -> None:
        from tqdm import tqdm

        # A log file gets a line now and then, a terminal a living bar.
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            desc=name, initial=done, total=total, unit="step", disable=not enabled, mininterval=interval,
            dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip
        self._interval = interval
        self._shown = 0.0
        self._loss: float | None = None
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0

    def close(self) -> None:
        self._bar.close()

    def step(self, line: Mapping[str, Any]) -> None:
        loss = line["loss"]
        if loss is not None and math.isfinite(loss):
            self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        self._samples += line["samples"]
        self._seconds += line["seconds"]
        self._waited += line["data_seconds"]
        if time.monotonic() - self._shown >= self._interval:
            self._show()
        self._bar.update(1)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def _show(self) -> None:
        self._shown = time.monotonic()
        rate, wait = self._samples / self._seconds, self._waited / self._seconds
        loss = "-" if self._loss is None else f"{self._loss:.4f}"
        self._bar.set_postfix_str(f"loss {loss}, {rate:.3g} samples/s, data wait {wait:.0%}", refresh=False)
        self._samples, self._seconds, self._waited = 0, 0.0, 0.0
