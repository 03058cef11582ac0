"""What tells that a training fails in silence: a line in the log, RUN/alarms.jsonl, TensorBoard and the run's report.

All of it is read off what is logged, validated and sampled anyway: no step waits for it. Bands are medians and median
deviations over many steps, so that no single step is an alarm; what has gone off is quiet until it is over.
"""

from __future__ import annotations

import math
import os
import statistics
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import reduce

from opensora_repro.config import Config
from opensora_repro.errors import TrainingError
from opensora_repro.process import available_cpus
from opensora_repro.run_folder import best_checkpoint, list_checkpoints, step_of
from opensora_repro.training.metrics import RunLog

Lines = Sequence[Mapping[str, Any]]

BLOCK, EARLIER, LEAST = 50, 400, 100  # steps: judged together; compared with; of these at least
SIGMA = 1.4826  # median deviations of a normal distribution's standard deviation
EASED = 0.5  # of its limit, below which an alarm is over
EARLY = 0.2  # share of a run in which its samples may still be noise, and captions unheard
MOST = 3e4  # an activation; float16 ends at 65504, bfloat16 counts in steps of 128 there
UNHEARD = 0.002  # of the loss: a caption gap that is none
FAINT = 8.0  # levels of 255 within a frame, below which it may be of one colour
MOMENT = 60.0  # seconds that a machine may be slow without a word


def is_due(step: int) -> bool:
    """Whether the steps up to this one are judged, whatever else happens then."""
    return step % BLOCK == 0


@dataclass
class Alarms:
    """The alarms of a run, in the process that writes its log. `look` and `look_at_samples` return lines to print."""

    cfg: Config
    log: RunLog
    clips: Callable[[], Sequence[np.ndarray]] = list  # a few training clips, uint8 [T, H, W, 3] each
    noise: Callable[[], Sequence[np.ndarray]] = list  # what the autoencoder makes of noise
    settled: Sequence[int] = ()  # steps after which the loss is another one, as the learning rate's warm-up ends

    def __post_init__(self) -> None:
        self.error: TrainingError | None = None  # why the run is to end
        self._on: set[str] = set()
        self._loss_then: dict[int, float] = {}  # training's median loss before each validation
        self._usual: tuple[Look, Look] | None = None  # of clips, of noise
        self._has_shown = False  # more than noise
        self._speeds: list[Speed] = []  # of this start's blocks: a resumed run may be on another machine
        if self.log.enabled:  # what is over by now shows at the first look; what ended the run ends it again
            self._on = {str(line.get("alarm")) for line in self.log.alarms.read()} - set(self.cfg.alarms.stop)

    def look(self, step: int, epoch: int) -> list[str]:
        """Judge what the log has. `epoch`: of the newest sample, counted from 0."""
        lines = self.log.metrics.read_last(EARLIER + BLOCK)
        since = max((last for last in self.settled if last < step), default=0)
        steady = [line for line in lines if line["step"] > since]
        validations = self.log.validation.read()
        self._note_losses(validations, lines)
        self._note_speed(step, lines)
        cfg, late = self.cfg, step >= EARLY * self.cfg.train.steps
        return list(self._changes(step, {
            "loss": loss_rises(steady, self._ease("loss")),
            "gradient": gradient_leaves(steady, self._ease("gradient")),
            "throughput": throughput_falls(self._speeds, self._ease("throughput")),
            "overfitting": overfits(validations, self._loss_then, self._ease("overfitting")),
            "saturation": saturates(validations, self._ease("saturation")),
            "average": average_lags(validations, self._ease("average")),
            "text": text_is_ignored(self.log.evaluation.read()) if late else "",
            "repeats": repeats(epoch, cfg.alarms.epochs),
        }))  # fmt: skip

    def look_at_samples(self, step: int, videos: Sequence[np.ndarray], stride: int) -> list[str]:
        """Judge what was sampled, uint8 [T, H, W, 3] each; none: it was not finite. `stride`: pixels of a latent."""
        if not videos:
            return list(self._changes(step, {"noise": "samples are not finite"}))
        if self._usual is None:
            self._usual = Look.of(self.clips(), stride), Look.of(self.noise(), stride)
        found, (usual, noise) = Look.of(videos, stride), self._usual
        self._has_shown |= not found.is_noise(usual, noise, 1)
        late = self._has_shown or step >= EARLY * self.cfg.train.steps
        return list(self._changes(step, {
            "noise": found.is_noise(usual, noise, self._ease("noise")) if late else "",
            "flat": found.is_flat(usual, self._ease("flat")),
            "motion": found.is_still(usual, self._ease("motion")),
        }))  # fmt: skip

    def _ease(self, name: str) -> float:
        return EASED if name in self._on else 1.0

    def _changes(self, step: int, found: Mapping[str, str]) -> Iterator[str]:
        for name, message in found.items():
            if not message:
                self._on.discard(name)
            elif name not in self._on and name not in self.cfg.alarms.off:
                self._on.add(name)
                self.log.alarm({"step": step, "alarm": name, "message": message})
                yield f"alarm: {name}, step {step}: {message}"
                if name in self.cfg.alarms.stop and self.error is None:
                    self.error = TrainingError(
                        f"stopped by alarm {name!r} of alarms.stop: {message}; best checkpoint: {self._best()}"
                    )

    def _best(self) -> str:
        """What is kept as the best, else the checkpoint with the lowest held-out loss, else the newest."""
        run_dir = self.log.run_dir
        losses = {line["step"]: _known(line["loss"]) for line in self.log.validation.read()}
        newest_first = list_checkpoints(run_dir)[::-1]
        lowest = min(newest_first, key=lambda path: losses.get(step_of(path), math.inf), default="none yet")
        return str(best_checkpoint(run_dir) or lowest)

    def _note_speed(self, step: int, lines: Lines) -> None:
        if is_due(step) and len(lines) >= BLOCK:
            self._speeds = [*self._speeds[-_slow_blocks(self._speeds) - EARLIER // BLOCK :], Speed.of(lines[-BLOCK:])]

    def _note_losses(self, validations: Lines, lines: Lines) -> None:
        """A resumed run looks its earlier losses up once."""
        missing = [line["step"] for line in validations if line["step"] not in self._loss_then]
        if len(missing) > 1:
            lines = self.log.metrics.read()
        steps = [line["step"] for line in lines]
        for step in missing:
            before = lines[bisect_right(steps, step - EARLIER) : bisect_right(steps, step)]
            losses = [line["loss"] for line in before if line["loss"] is not None]
            self._loss_then[step] = statistics.median(losses or [math.inf])


# ---------------------------------------------------------------------------------------------------------------------
# Of steps. `ease` multiplies limits: less than 1 while the alarm is on. "" is no alarm.


def loss_rises(lines: Lines, ease: float) -> str:
    """A twentieth of the loss is as little a deviation as counts: large batches have nearly none."""
    found = [_known(line.get("l1", line["loss"])) for line in lines]  # stage 0's adversarial parts come and go
    if len(found) < LEAST + BLOCK:
        return ""
    usual, deviation, now = _band(found)
    if now > usual + 4 * ease * max(deviation, abs(usual) / 20):
        return f"the loss is {now:.3g} over {BLOCK} steps, {usual:.3g} over those before"
    return ""


def gradient_leaves(lines: Lines, ease: float) -> str:
    """To four times as much, or a twentieth, and far outside of what single steps have."""
    found = [math.log(max(_known(line["grad_norm"]), 1e-30)) for line in lines]
    if len(found) < LEAST + BLOCK:
        return ""
    usual, deviation, now = _band(found)
    above = now - usual > ease * max(6 * deviation, math.log(4))
    if above or usual - now > ease * max(6 * deviation, math.log(20)):
        return f"the gradient's norm is {math.exp(now):.3g} over {BLOCK} steps, {math.exp(usual):.3g} over those before"
    return ""


@dataclass(frozen=True)
class Speed:
    """Of a block of steps, waiting counted: where batches come in bursts, most single steps are as quick as ever."""

    rate: float  # tokens a second, or samples of a model that counts none
    seconds: float
    waited: float  # of them, for data

    @staticmethod
    def of(lines: Lines) -> Speed:
        seconds = max(sum(line["seconds"] for line in lines), 1e-9)
        done = sum(line["tokens"] or line["samples"] for line in lines)
        return Speed(done / seconds, seconds, sum(line["data_seconds"] for line in lines))


def throughput_falls(blocks: Sequence[Speed], ease: float) -> str:
    """To two fifths, for a minute and two blocks: a machine that others use, too, has half at times, a moment less."""
    count = _slow_blocks(blocks)
    before, last = blocks[: len(blocks) - count], blocks[len(blocks) - count :]
    if len(before) * BLOCK < LEAST or sum(block.seconds for block in last) < MOMENT:
        return ""
    usual, now = statistics.median(block.rate for block in before), max(block.rate for block in last)
    if now >= usual * 0.4 / (0.8 if ease < 1 else 1) ** 2:
        return ""
    seconds = sum(block.seconds for block in last)
    waited = sum(block.waited for block in last) / seconds
    found = f"{now / usual:.0%} of the speed of the steps before, for {seconds:.0f} s; "
    found += f"{waited:.0%} of that is waiting for data"
    if hasattr(os, "getloadavg"):  # whoever else is at work here
        found += f", the machine's load is {os.getloadavg()[0]:.1f} on {available_cpus()} CPUs"
    return found


def _slow_blocks(blocks: Sequence[Speed]) -> int:
    """How many of the last ones are judged together."""
    seconds = 0.0
    for count, block in enumerate(reversed(blocks), start=1):
        seconds += block.seconds
        if count >= 2 and seconds >= MOMENT:
            return count
    return len(blocks)


def repeats(epoch: int, most: int) -> str:
    return f"every clip has been seen {epoch} times" if 0 < most <= epoch else ""


def _band(found: Sequence[float]) -> tuple[float, float, float]:
    """Median and deviation of what was before the last block, and that block's median."""
    earlier = found[:-BLOCK]
    usual = statistics.median(earlier)
    deviation = SIGMA * statistics.median(abs(value - usual) for value in earlier) if math.isfinite(usual) else 0.0
    return usual, deviation, statistics.median(found[-BLOCK:])


def _known(value: float | None) -> float:
    """JSON has no infinity: a skipped step has none, nor a validation that overflows."""
    return math.inf if value is None else value


# ---------------------------------------------------------------------------------------------------------------------
# Of validations and evaluations


def overfits(validations: Lines, training: Mapping[int, float], ease: float) -> str:
    """Held-out loss has risen at three validations since its lowest, by a thirtieth; training's has fallen since."""
    if len(validations) < 4:
        return ""
    losses = [_known(line["loss"]) for line in validations]
    lowest = losses.index(min(losses))
    rises = ease < 1 or (len(losses) - lowest > 3 and losses[-1] > losses[-2] > losses[-3])
    before, now = (training[validations[place]["step"]] for place in (lowest, -1))
    if rises and losses[-1] > (1 + 0.03 * ease) * losses[lowest] and now < before:
        step = validations[lowest]["step"]
        return (
            f"held-out loss is {losses[-1]:.3g}, it was {losses[lowest]:.3g} at step {step}; "
            f"training's has fallen from {before:.3g} to {now:.3g} since"
        )
    return ""


def saturates(validations: Lines, ease: float) -> str:
    found = [_known(line["activation"]) for line in validations if "activation" in line]
    if not found:
        return ""
    *earlier, now = found
    usual = statistics.median(earlier[-10:]) if len(earlier) >= 3 else math.inf
    if now > ease * min(MOST, 10 * usual):
        before = "" if not earlier else f", {earlier[-1]:.3g} a validation before"
        return f"the largest activation of the last block is {now:.3g}{before}"
    return ""


def average_lags(validations: Lines, ease: float) -> str:
    """Twice in a row: a young average lags for a while."""
    lines = [line for line in validations[-2:] if "of_trained" in line]
    found = [(_known(line["of_average"]), _known(line["of_trained"])) for line in lines]
    if len(found) == 2 and all(ours > (1 + 0.1 * ease) * trained for ours, trained in found):
        ours, trained = found[-1]
        return f"averaged weights have a held-out loss of {ours:.3g}, the trained ones {trained:.3g}: lower ema.decay"
    return ""


def text_is_ignored(evaluations: Lines) -> str:
    """Twice in a row, other clips' captions serve as well."""
    found = [line["metrics"] for line in evaluations if "caption_gap" in line.get("metrics", {})][-2:]
    gaps = [_value(metrics["caption_gap"]) for metrics in found]
    losses = [_value(metrics.get("loss", 1.0)) for metrics in found]
    if len(found) == 2 and all(gap < UNHEARD * loss for gap, loss in zip(gaps, losses, strict=True)):
        return f"captions of other clips cost only {gaps[-1]:.2g} of held-out loss (caption_gap): text is ignored"
    return ""


def _value(found: Any) -> float:
    """Of a metric, with or without its interval."""
    return float(found["value"] if isinstance(found, Mapping) else found)


# ---------------------------------------------------------------------------------------------------------------------
# Of samples


@dataclass(frozen=True)
class Look:
    """What videos look like in numbers, one a video, levels of 255."""

    likeness: tuple[float, ...]  # correlation of neighbouring latents' squares, in space and time: noise has little
    contrast: tuple[float, ...]  # standard deviation within a frame
    motion: tuple[float, ...]  # mean difference of following frames; of videos

    @staticmethod
    def of(videos: Iterable[np.ndarray], stride: int) -> Look:
        found = [_look(video, stride) for video in videos]
        likeness, contrast, motion = zip(*found, strict=True) if found else ((), (), ())
        return Look(likeness, contrast, tuple(value for value in motion if value is not None))

    def is_noise(self, usual: Look, noise: Look, ease: float) -> str:
        """Nearer to what the autoencoder makes of noise than to clips, or, while that is on, not near enough to these.

        Between them lies little where it smoothes what it decodes.
        """
        low, high = statistics.median(noise.likeness or (0.0,)), statistics.median(usual.likeness or (0.9,))
        limit = low + (high - low) * (0.5 if ease == 1 else 0.65)
        return self._most(self.likeness, limit, "look like noise: neighbouring places have nothing in common")

    def is_flat(self, usual: Look, ease: float) -> str:
        """A model of one colour leaves some of its noise: 5 levels, where clips have 22."""
        limit = min(FAINT, statistics.median(usual.contrast) / 4) if usual.contrast else FAINT
        return self._most(self.contrast, limit / ease, "are of one colour")

    def is_still(self, usual: Look, ease: float) -> str:
        limit = 0.1 * statistics.median(usual.motion) if usual.motion else 0.0
        return self._most(self.motion, limit / ease, "hardly move, against a tenth of the training clips' motion")

    def _most(self, found: Sequence[float], limit: float, what: str) -> str:
        below = sum(value < limit for value in found)
        return f"{below} of {len(found)} samples {what}" if 2 * below > len(found) else ""


def _look(video: np.ndarray, stride: int) -> tuple[float, float, float | None]:
    grey = video.astype(np.float32).mean(axis=-1)
    height, width = (side // stride * stride for side in grey.shape[1:])
    squares = reduce(grey[:, :height, :width], "t (h y) (w x) -> t h w", "mean", y=stride, x=stride)
    squares -= squares.mean(axis=(1, 2), keepdims=True)
    power = float((squares**2).mean())
    pairs = [(squares[:, 1:], squares[:, :-1]), (squares[:, :, 1:], squares[:, :, :-1]), (squares[1:], squares[:-1])]
    likeness = [float((one * other).mean()) for one, other in pairs if one.size]
    moved = float(np.abs(np.diff(grey, axis=0)).mean()) if len(grey) > 1 else None
    alike = statistics.mean(likeness) / power if likeness and power > 1 else 1.0  # one colour is no noise
    return alike, float(grey.std(axis=(1, 2)).mean()), moved
