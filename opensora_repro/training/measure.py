"""What a step takes on this device: a run's own loop on made-up samples of any size, of which nothing is kept."""

from __future__ import annotations

import contextlib
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import encodes_after_start, sample_fps
from opensora_repro.data.buckets import Bucket
from opensora_repro.data.dataset import BadSample, Clip
from opensora_repro.data.sampler import Schedule, everything
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.errors import TrainingError, is_out_of_memory
from opensora_repro.frozen.encoder import Encoded, open_encoder
from opensora_repro.kernels.ops import choose
from opensora_repro.parallel.build import build_engine
from opensora_repro.parallel.device import forget_peak, peak_memory
from opensora_repro.parallel.mesh import launched_as
from opensora_repro.planning.batch_sizes import Entry, of_one_size, require_one, too_large
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.sizes import latent_shape
from opensora_repro.process import StopSignals
from opensora_repro.run_folder import TrainState
from opensora_repro.sampling.generate import check_fit
from opensora_repro.training.alarms import Alarms
from opensora_repro.training.batches import Fetched
from opensora_repro.training.loop import Trainer
from opensora_repro.training.metrics import Quarantine, RunLog
from opensora_repro.training.model import apply_compile, build_model, compiles
from opensora_repro.training.optim import prepare_engine
from opensora_repro.training.save import CheckpointWriter

# The first steps build tables, programs and moments; the last one waits for what the device has still to do.
FIRST_STEPS, TIMED_STEPS, LAST_STEPS = 2, 2, 1


class MadeUp:
    """A feed of samples that are made from their number alone."""

    def __init__(self, make: Callable[[int], Clip | Encoded | BadSample], batch_size: int) -> None:
        self.make, self.batch_size = make, batch_size

    def batches(self, first: int, count: int) -> Iterator[Fetched]:
        for number in range(first, first + count):
            yield Fetched((0, self.make(number * self.batch_size + i)) for i in range(self.batch_size))


class Loop(Trainer):
    """Saves and reports nothing, but waits for the device where a run would save."""

    def _save(self) -> None:
        self._await_device()

    def _report(self, *, last: bool = False) -> None:
        pass


class _Seconds(RunLog):
    """Of each step; nothing is written."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, resumed_step=0, enabled=False)
        self.seconds: list[float] = []

    def step(self, line: Mapping[str, Any]) -> None:
        self.seconds.append(line["seconds"])


class OutOfMemory(Exception):
    """The device had no room for a step."""


@dataclass(frozen=True)
class Step:
    seconds: float
    memory: float  # bytes at most: of a GPU, its tensors; on a CPU, of the whole process


class Bench:
    """The config's model, optimizer, average and, where its steps encode, frozen models, in this one process."""

    def __init__(self, cfg: Config) -> None:
        """Raises ConfigError, EngineError, ModelNotFound."""
        model_size = cfg.parallel.tp_size * cfg.parallel.sp_size
        if launched_as()[1] > 1 or model_size > 1:
            why = "parallel.tp_size x sp_size" if model_size > 1 else "torchrun's processes"
            raise ConfigError(f"{why}: expected 1, steps are measured in one process; --plan knows layouts of several")
        self.cfg = cfg
        self.engine = build_engine(cfg.parallel)
        device = self.engine.device
        kernels = choose(cfg.train.kernels, device.type)
        self.encoder = open_encoder(cfg, device)
        self.model, _ = build_model(cfg, device, load_init=False)
        if compiles(cfg, device.type):
            apply_compile(self.model, cfg)
        if encodes_after_start(cfg):
            self.encoder.load()
        self.ema = prepare_engine(self.engine, self.model, cfg, kernels)

    def measure(self, bucket: Bucket, batch_size: int) -> Step:
        """A few steps with so many samples a micro-batch. Raises ConfigError, OutOfMemory."""
        cfg = of_one_size(self.cfg, bucket, batch_size)
        cfg = replace(
            cfg,
            train=replace(cfg.train, steps=FIRST_STEPS + TIMED_STEPS + LAST_STEPS),
            optim=replace(cfg.optim, lr=0.0),  # made-up samples shall not spoil the weights
            sample=replace(cfg.sample, every=0),
        )
        check_fit(cfg, self.encoder.vae, self.encoder.text)
        gc.collect()
        forget_peak(self.engine.device)
        try:
            with tempfile.TemporaryDirectory() as folder:  # nothing comes into it
                log = _Seconds(Path(folder))
                with contextlib.closing(self._loop(cfg, Path(folder), log)) as loop:
                    loop.run(f"{bucket}, batch size {batch_size}")
            timed = log.seconds[FIRST_STEPS : FIRST_STEPS + TIMED_STEPS]
        except (TrainingError, RuntimeError, MemoryError) as error:
            if not any(is_out_of_memory(each) for each in (error, error.__cause__) if each is not None):
                raise
        else:
            return Step(min(timed), peak_memory(self.engine.device))  # others on this machine only add to it
        self.engine.zero_grad()
        raise OutOfMemory  # here: the error holds all that the step had in memory

    def _loop(self, cfg: Config, folder: Path, log: RunLog) -> Loop:
        samples = cfg.train.batch_size * cfg.train.accumulation
        return Loop(
            cfg=cfg, engine=self.engine, model=self.model, objective=build_objective(cfg.diffusion),
            encoder=self.encoder, ema=self.ema, feed=MadeUp(self._maker(cfg), cfg.train.batch_size),
            state=TrainState(), schedule=Schedule(everything(samples), [samples], cfg.run.seed),
            writer=CheckpointWriter(folder, self.engine, "", keep=1, background=False), log=log,
            quarantine=Quarantine(folder, num_samples=samples, max_fraction=1.0, writes=False),
            validator=None, evaluation=None, alarms=Alarms(cfg, log), stop=StopSignals(),
        )  # fmt: skip

    def _maker(self, cfg: Config) -> Callable[[int], Clip | Encoded]:
        """Samples of one content and ids of their own: clips as loaders give them, or what a cache holds of them."""
        data, length, rate = cfg.data, cfg.model.model_max_length, float(sample_fps(cfg))
        if not data.cache:
            pixels = torch.randint(256, (data.num_frames, data.height, data.width, 3), dtype=torch.uint8)
            words = " a" * length  # enough for the model to read nothing else
            return lambda number: Clip(str(number), f"{number}{words}", pixels, False, rate)
        channels, *sizes = latent_shape(cfg)
        moments = torch.randn(2 * channels, *sizes)
        text = torch.randn(length, cfg.model.caption_channels, dtype=self.encoder.text_dtype)
        mask = torch.ones(length, dtype=torch.bool)
        return lambda number: Encoded(str(number), moments, text, mask, torch.tensor(rate))


class Line:
    """What was measured at some batch sizes, and a + b * n between and beyond them: a planner's `Cost`."""

    def __init__(self, a_sample: float) -> None:
        """`a_sample`: bytes by formula, which count while a single batch size was measured."""
        self.a_sample, self.most, self.steps = a_sample, 0, dict[int, Step]()

    def add(self, batch_size: int, step: Step) -> None:
        """Ascending; beyond the last one nothing is known to fit until `most` is set."""
        for before in self.steps.values():  # more samples never take less: what else is measured is others' work
            step = Step(max(step.seconds, before.seconds), max(step.memory, before.memory))
        self.steps[batch_size], self.most = step, batch_size

    def seconds(self, batch_size: int) -> float:
        return self._at(batch_size).seconds

    def memory(self, batch_size: int) -> float:
        return self._at(batch_size).memory if batch_size <= self.most else math.inf

    def _at(self, batch_size: int) -> Step:
        known = list(self.steps.items())
        if len(known) == 1:
            ((count, step),) = known
            known.insert(0, (0, Step(0.0, step.memory - count * self.a_sample)))
        above = next((i for i, (count, _) in enumerate(known) if i and count >= batch_size), len(known) - 1)
        (low, first), (high, second) = known[above - 1], known[above]
        share = (batch_size - low) / (high - low)
        return Step(*(a + (b - a) * share for a, b in zip(astuple(first), astuple(second), strict=True)))


def explore(bench: Bench, entry: Entry, *, aim: float, limit: float, most: int | None) -> Line:
    """Measure a bucket at 1, 2, 4, ... samples, until a step takes `aim` seconds or more would not fit.

    At two batch sizes at least, where they fit. Raises ConfigError where one sample does not.
    """
    one, two = (of_one_size(bench.cfg, entry.bucket, count) for count in (1, 2))
    mesh, kind = bench.engine.mesh, bench.engine.device.type
    line, count = Line(needed_memory(two, mesh, kind).peak - needed_memory(one, mesh, kind).peak), 1
    while True:
        try:
            line.add(count, bench.measure(entry.bucket, count))
        except OutOfMemory:
            if not line.steps:
                raise too_large(entry, "runs out of memory", limit) from None
            line.most = max(line.steps)
            print(f"{entry.name}: out of memory at batch size {count}, goes on with {line.most}", flush=True)
            return line
        require_one(entry, line, limit)
        if count == most or (count > 1 and line.seconds(count) >= aim):
            return line
        count = min(2 * count, most or 2 * count)
        line.most = count
        if line.memory(count) > limit:
            line.most -= 1
            return line
