"""What a run writes about itself: JSON lines, TensorBoard events, and the progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
BAD_STEPS_FILE, QUARANTINE_FILE = "bad_steps.jsonl", "quarantine.jsonl"


class JsonLines:
    """An append-only file of JSON objects, created by its first line.

    Every line goes to the operating system at once, so that a killed process loses none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close())
        self._file.write(json.dumps({key: _finite(value) for key, value in line.items()}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return list(_whole_lines(self.path))

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run writes again, and a last line cut short."""
        if not self.path.exists():
            return
        kept = [line for line in _whole_lines(self.path) if line["step"] <= step]
        beside = self.path.with_name(f".{self.path.name}.tmp")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(beside, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(value, dict):
            yield value


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """The run's JSON lines and TensorBoard events; on every rank but 0 it writes nothing."""

    def __init__(self, run_dir: Path, *, resumed_step: int, enabled: bool) -> None:
        self.enabled = enabled
        self.metrics = JsonLines(run_dir / METRICS_FILE)
        self.validation = JsonLines(run_dir / VALIDATION_FILE)
        self.bad_steps = JsonLines(run_dir / BAD_STEPS_FILE)
        self._events_folder, self._resumed_step = run_dir / "tensorboard", resumed_step
        self._events_file: SummaryWriter | None = None
        if enabled:
            for file in (self.metrics, self.validation, self.bad_steps):
                file.truncate_after(resumed_step)

    def step(self, line: Mapping[str, Any]) -> None:
        """One training step: step, loss, grad_norm, lr, seconds, data_seconds, samples, tokens."""
        if not self.enabled:
            return
        self.metrics.write(line)
        for name in ("loss", "grad_norm", "lr"):
            if line[name] is not None:
                self._events.add_scalar(f"train/{name}", line[name], line["step"])
        self._events.add_scalar("speed/samples_per_second", line["samples"] / line["seconds"], line["step"])
        self._events.add_scalar("speed/data_wait_share", line["data_seconds"] / line["seconds"], line["step"])

    def validate(self, line: Mapping[str, Any]) -> None:
        """One validation: step, loss, losses (by timestep), timesteps, samples."""
        if not self.enabled:
            return
        self.validation.write(line)
        self._events.add_scalar("validation/loss", line["loss"], line["step"])
        for timestep, loss in zip(line["timesteps"], line["losses"], strict=True):
            self._events.add_scalar(f"validation/loss_at_{timestep:g}", loss, line["step"])

    def bad_step(self, line: Mapping[str, Any]) -> None:
        """One skipped step: step, loss, grad_norm, sample_ids."""
        if self.enabled:
            self.bad_steps.write(line)

    def image(self, name: str, picture: Any, step: int) -> None:
        """A picture [H, W, 3] uint8 among the events."""
        if self.enabled:
            self._events.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        for file in (self.metrics, self.validation, self.bad_steps):
            file.close()
        if self._events_file is not None:
            self._events_file.close()

    @property
    def _events(self) -> SummaryWriter:
        if self._events_file is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of steps that a killed process had gone beyond the checkpoint are hidden.
            purge_step = self._resumed_step + 1
            self._events_file = SummaryWriter(
                str(self._events_folder), purge_step=purge_step, max_queue=1000, flush_secs=20
            )
        return self._events_file


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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
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
