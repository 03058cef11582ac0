"""A run's sampling made faster, part by part and together: `python -m benchmarks.sample RUN`.

Each part is beside the published sampler of its objective (`full`): its speed-up, how near its videos are to the full
sampler's of the same noise, and, of a run of the demo, how many show what was asked. Batches are sampled by all sides
in turn; a speed-up is the median over batches, from prompts to latents. On a CPU it is also told in seconds of the
processor, which others on the machine lengthen less.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import side_by_side, table

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.config import Config
    from opensora_repro.demo.shapes import Motion
    from opensora_repro.sampling.caches import StepCache
    from opensora_repro.sampling.source import ModelSource
    from opensora_repro.sampling.speedups import Speedups

FULL = {"flow": ("euler", 30), "iddpm": ("iddpm", 100)}  # as Open-Sora 1.2, and 1.0 and 1.1, were published
PROMPTS, BATCH, SEED = 24, 8, 0


@dataclass(frozen=True)
class Side:
    sampler: str
    steps: int
    speedups: Speedups | None = None


def sides(source: ModelSource, step_cache: StepCache | None) -> dict[str, Side]:
    from opensora_repro.sampling.caches import Broadcast
    from opensora_repro.sampling.speedups import Speedups, fast_options

    cfg = source.config
    sampler, steps = FULL[cfg.diffusion.objective]
    full_source = replace(source, config=replace(cfg, sample=replace(cfg.sample, sampler=sampler, steps=steps)))
    given = dict.fromkeys(("sampler", "steps", "guidance", "guidance_interval"))
    fast = fast_options(source, given)
    fast = {"steps": fast_options(full_source, given)["steps"], **fast}
    interval, broadcast = fast.get("guidance_interval"), Broadcast()
    quick = partial(Side, fast["sampler"], fast["steps"])
    found = {"full": Side(sampler, steps)}
    if (cfg.sample.sampler, cfg.sample.steps) != (sampler, steps):
        found["as the run has it"] = Side(cfg.sample.sampler, cfg.sample.steps)
    found["as few steps"] = Side("ddim" if sampler == "iddpm" else sampler, fast["steps"])
    found["second order"] = Side("dpm" if sampler == "iddpm" else "ab2", fast["steps"])
    if sampler == "euler":
        found["second order, Heun"] = Side("heun", fast["steps"] // 2)
    if interval is not None:
        found["guidance interval"] = Side(sampler, steps, Speedups(interval))
    found["broadcast"] = Side(sampler, steps, Speedups(None, broadcast))
    if step_cache is not None:
        found["step cache"] = Side(sampler, steps, Speedups(None, None, step_cache))
    found["--fast"] = quick(Speedups(interval))
    small = Broadcast(2, 2, 3)  # of few steps, fewer are alike
    found["--fast, broadcast"] = quick(Speedups(interval, small))
    if step_cache is not None:
        found["--fast, step cache"] = quick(Speedups(interval, None, step_cache))
        found["all together"] = quick(Speedups(interval, small, step_cache))
    return found


def demo_prompts(count: int) -> list[Motion]:
    """Captions that the demo trained, in a fixed random order."""
    from opensora_repro.demo.shapes import motions

    known = motions(held_out=False)
    random.Random(0).shuffle(known)
    return [known[i % len(known)] for i in range(count)]


def measure(
    path: Path,
    prompts: Sequence[str] | int,
    *,
    batch_size: int,
    cache: str | None,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """`prompts`: texts, or how many of the demo's, which are judged. Raises ConfigError."""
    import torch

    from opensora_repro.parallel.device import default_kind
    from opensora_repro.sampling.calibration import psnr, sampled
    from opensora_repro.sampling.generate import generate
    from opensora_repro.sampling.run import load_models
    from opensora_repro.sampling.source import find_source
    from opensora_repro.sampling.speedups import CALIBRATION, open_step_cache

    source = find_source(path)
    motions = demo_prompts(prompts) if isinstance(prompts, int) else []
    texts = [motion.caption for motion in motions] if isinstance(prompts, int) else list(prompts)
    there = cache is not None or (path / CALIBRATION).is_file()
    step_cache = open_step_cache(cache or "", source, path) if there else None
    found = sides(source, step_cache)
    device = torch.device(default_kind())
    model, vae, conditions, _ = load_models(source, device)

    def samples(side: Side) -> Callable[..., Iterator[tuple[int, np.ndarray]]]:
        cfg = with_side(source.config, side)
        if side.speedups is not None:
            side.speedups.check(cfg, source.model)
        return partial(generate, model, vae, conditions, cfg, texts, seed=SEED, speedups=side.speedups)

    batches = [range(i, min(i + batch_size, len(texts))) for i in range(0, len(texts), batch_size)]
    calls = {name: samples(side) for name, side in found.items()}
    videos: dict[str, list[Any]] = {name: [] for name in found}
    times: dict[str, list[float]] = {name: [] for name in found}
    processor: dict[str, list[float]] = {name: [] for name in found}
    with torch.autocast(device.type, torch.bfloat16, enabled=source.config.train.dtype == "bf16"):
        for call in calls.values():  # what is made at the first call
            sampled(call, batches[:1], clock=clock)
        for batch in batches:
            for name, call in calls.items():
                done = sampled(call, [batch], clock=clock)
                videos[name] += done.videos
                times[name] += done.seconds
                processor[name] += done.processor
    rows = [
        {
            "side": name,
            "sampler": side.sampler,
            "steps": side.steps,
            "speedups": {} if side.speedups is None else side.speedups.settings(),
            **side_by_side(times[name], times["full"]),
            "processor": side_by_side(processor[name], processor["full"]),
            "psnr": None if name == "full" else round(psnr(videos[name], videos["full"]), 2),
            "adherence": judged(videos[name], motions),
        }
        for name, side in found.items()
    ]
    about: dict[str, Any] = {"guidance": source.config.sample.guidance, "num_frames": source.config.data.num_frames}
    about |= {"device": device.type, "batch_size": batch_size, "seed": SEED}
    return {"prompts": len(texts), **about, "rows": rows}


def with_side(cfg: Config, side: Side) -> Config:
    return replace(cfg, sample=replace(cfg.sample, sampler=side.sampler, steps=side.steps))


def judged(videos: Sequence[np.ndarray], motions: Sequence[Motion]) -> dict[str, float] | None:
    """Shares of videos with the colour, shape and direction that were asked for."""
    from opensora_repro.demo.adherence import measure, shares

    if not motions:
        return None
    return shares([{"agrees": measure(video).agrees(motion)} for video, motion in zip(videos, motions, strict=True)])


def report(result: dict[str, Any]) -> str:
    lines = []
    for row in result["rows"]:
        adherence = row["adherence"] or {}
        shown = [f"{adherence[key]:.3f}" if key in adherence else "" for key in ("colour", "shape", "direction")]
        likeness = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        sampler = f"{row['sampler']}, {row['steps']}"
        cpu = [f"{row['processor']['ratio']:.2f}x"] if result["device"] == "cpu" else []
        ms = f"{row['ours']['median_ms']:.0f}"
        lines.append((row["side"], sampler, f"{row['ratio']:.2f}x", *cpu, ms, likeness, *shown))
    title = (
        f"{result['prompts']} prompts, {result['num_frames']} frames, guidance {result['guidance']:g}, "
        f"{result['threads']} thread(s), {result['clock']} (medians of {result['batch_size']} prompts at once)"
    )
    columns = ("speed-up", *(["in CPU s"] if result["device"] == "cpu" else []), "ms", "PSNR")
    return table(title, ("", "sampler, steps", *columns, "colour", "shape", "direction"), lines)
