"""How far a step cache may go, measured on a run's own prompts: `stages.calibrate`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from opensora_repro.config import ConfigError
from opensora_repro.diffusion.samplers import num_calls
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.parallel.device import default_kind
from opensora_repro.sampling.caches import StepCache, attended, relative_change, replaced
from opensora_repro.sampling.generate import ProgressBar, generate
from opensora_repro.sampling.run import load_models
from opensora_repro.sampling.source import ModelSource, weights_sha256
from opensora_repro.sampling.speedups import Speedups

DEGREE = 4  # of the polynomial, TeaCache's
SKIPS = (0.5, 1.0, 1.5, 2.5, 4.0, 6.0)  # thresholds to try, in median changes a call
MIN_CALLS = 5
MOST_DB = 99.0  # of equal videos

# (speedups, further arguments of `generate`) -> numbers and videos
Samples = Callable[..., Iterator[tuple[int, np.ndarray]]]


@dataclass
class Changes:
    """A model's `run_blocks` that notes how much, from call to call, the blocks' input and their residual change."""

    model: CaptionedModel
    inputs: list[float] = field(default_factory=list)
    residuals: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run, self._first = self.model.run_blocks, self.model.in_order()[0]
        self.begin()

    def begin(self) -> None:
        """Another batch follows."""
        self._before: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, texts: Any, modulation: Tensor, captions: Any, temporal: Tensor | None) -> Tensor:
        found = self._run(x, texts, modulation, captions, temporal)
        repeats = len(found) // len(x)
        seen, residual = attended(self._first, x, modulation), found - x.repeat(repeats, 1, 1, 1)
        if self._before is not None and self._before[1].shape == residual.shape:
            change = relative_change(residual, self._before[1]).unflatten(0, (repeats, -1)).mean(0)  # [B], over halves
            self.inputs += relative_change(seen, self._before[0]).tolist()
            self.residuals += change.tolist()
        self._before = seen, residual
        return found


def fitted(inputs: Sequence[float], residuals: Sequence[float]) -> dict[str, Any]:
    """The polynomial that foretells the residual's change from the input's, of the highest power first; its span."""
    degree = min(DEGREE, len(set(inputs)) - 1)
    found = np.polynomial.Polynomial.fit(inputs, residuals, degree).convert().coef
    return {"polynomial": tuple(found[::-1].tolist()), "span": (min(inputs), max(inputs))}


@dataclass(frozen=True)
class Sampled:
    videos: list[np.ndarray]
    seconds: list[float]  # of each batch, from its prompts to its latents
    processor: list[float] = field(default_factory=list)  # likewise, of this process's CPUs


def sampled(
    samples: Samples,
    batches: Sequence[Sequence[int]],
    before: Callable[[], None] = lambda: None,
    *,
    clock: Callable[[], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sampled:
    """All batches, one after the other; on a CPU seconds of the processor, which others do not lengthen."""
    clock = clock or (time.process_time if default_kind() == "cpu" else time.perf_counter)
    found = Sampled([], [])
    for batch in batches:
        before()
        ends = [(clock(), time.process_time())]

        def step(done: int, total: int, ends: list[tuple[float, float]] = ends) -> None:
            if progress is not None:
                progress(done, total)
            if done == total:
                torch.zeros(1, device=default_kind()).item()  # waits for a GPU
                ends.append((clock(), time.process_time()))

        found.videos.extend(video for _, video in samples(only=batch, batch_size=len(batch), progress=step))
        found.seconds.append(ends[-1][0] - ends[0][0])
        found.processor.append(ends[-1][1] - ends[0][1])
    return found


def psnr(found: Sequence[np.ndarray], full: Sequence[np.ndarray]) -> float:
    """Decibels of uint8 videos, each against its own; their mean."""
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(found, full, strict=True)]
    return float(np.mean([min(MOST_DB, 20 * math.log10(255) - 10 * math.log10(error + 1e-9)) for error in errors]))


def calibrate(
    source: ModelSource,
    prompts: Sequence[str],
    device: torch.device,
    *,
    seed: int,
    batch_size: int,
    least_psnr: float,
) -> dict[str, Any]:
    """What a step cache's file has: a polynomial, thresholds with their speed-up and PSNR, and which of them is taken.

    That is the fastest that keeps `least_psnr` to the full sampler's videos, or the first. Raises ConfigError.
    """
    cfg = source.config
    if source.model.conditioning != "t5":
        raise ConfigError(f"{source.path}: DiT and Latte have no step cache, STDiT, STDiT2 and STDiT3 have")
    if num_calls(cfg.sample.sampler, cfg.sample.steps) < MIN_CALLS:
        raise ConfigError(f"--steps {cfg.sample.steps}: expected at least {MIN_CALLS}, or there is nothing to skip")
    model, vae, conditions, report = load_models(source, device)
    tqdm.write(str(report))
    samples = partial(generate, model, vae, conditions, cfg, prompts, seed=seed)
    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    assert isinstance(model, CaptionedModel)
    with (
        closing(ProgressBar("calibrating")) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.dtype == "bf16"),
    ):
        changes = Changes(model)
        with replaced(model, "run_blocks", changes):
            full = sampled(samples, batches, changes.begin, progress=bar)
        full = Sampled(full.videos, sampled(samples, batches, progress=bar).seconds)  # without noting anything
        fit = fitted(changes.inputs, changes.residuals)
        tqdm.write(
            f"{len(prompts)} prompts sampled in {num_calls(cfg.sample.sampler, cfg.sample.steps)} calls of the model"
        )
        rows = []
        for skips in SKIPS:
            threshold = float(f"{skips * float(np.median(changes.residuals)):.2g}")
            runs = Counted(model)
            with replaced(model, "run_blocks", runs):
                faster = partial(samples, speedups=Speedups(step_cache=StepCache(threshold, **fit)))
                found = sampled(faster, batches, progress=bar)
            ratio = float(np.median(np.divide(full.seconds, found.seconds)))
            row = {"threshold": threshold, "blocks_run": round(runs.calls / len(batches), 1)}
            rows.append(row | {"speed_up": round(ratio, 2), "psnr": round(psnr(found.videos, full.videos), 2)})
            line = "threshold {threshold:<8g} blocks run {blocks_run:g} times  {speed_up:.2f}x  {psnr:.1f} dB"
            tqdm.write(line.format(**rows[-1]))
    good = [row for row in rows if row["psnr"] >= least_psnr]
    taken = max(good, key=lambda row: row["speed_up"]) if good else rows[0]
    data, sample = cfg.data, cfg.sample
    return {
        "weights_sha256": weights_sha256(source),
        **{"sampler": sample.sampler, "steps": sample.steps, "guidance": sample.guidance},
        **{"num_frames": data.num_frames, "height": data.height, "width": data.width},
        "prompts": list(prompts),
        **fit,
        "threshold": taken["threshold"],
        "least_psnr": least_psnr,
        "thresholds": rows,
    }


class Counted:
    """A model's `run_blocks`, counting."""

    def __init__(self, model: CaptionedModel) -> None:
        self._run, self.calls = model.run_blocks, 0

    def __call__(self, *inputs: Any) -> Tensor:
        self.calls += 1
        return self._run(*inputs)
