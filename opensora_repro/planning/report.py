"""A budget as lines for people and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from opensora_repro.config import Config
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.buckets import as_heaviest
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING
from opensora_repro.planning.budget import SECONDS_AN_HOUR, Budget
from opensora_repro.planning.gpus import GIB, Gpu
from opensora_repro.planning.memory import Memory
from opensora_repro.planning.placement import too_much

DAY = 24 * SECONDS_AN_HOUR


def plan_lines(cfg: Config, budget: Budget) -> list[str]:
    lines: list[str] = []
    heavy = as_heaviest(cfg)
    for title, rows in (
        ("WORK", _work(heavy, budget)),
        ("MEMORY of one process, as the config has it", _memory(cfg, budget)),
        ("LAYOUTS", _layouts(cfg, budget)),
        ("TIME AND COST", _time(budget)),
        ("SAMPLING with the trained model", _inference(heavy, budget)),
    ):
        lines += [title, *(f"  {line}" for line in rows), ""]
    return lines[:-1]


def as_json(budget: Budget) -> dict[str, Any]:
    """Plain values: bytes, seconds, FLOPs; the budget's own names."""
    smallest = budget.smallest
    return {**dataclasses.asdict(budget), "smallest": smallest and smallest.overrides}


def _work(cfg: Config, budget: Budget) -> list[str]:
    work = budget.work
    shape = "x".join(map(str, work.latents))
    data = cfg.data
    return [
        f"parameters  {work.parameters:,}",
        f"a sample    {data.num_frames} x {data.height}x{data.width} -> latents {shape} -> "
        f"{work.tokens_a_sample:,} tokens; {operations(work.forward_flops)} a forward pass",
        f"a step      {work.samples_a_step:,} samples, {work.tokens_a_step:,} tokens; "
        f"{operations(work.step_flops)} forward and backward",
        f"            plus {encoding_and_recomputation(work.encoder_flops, work.recomputed_flops)}",
        f"the run     {cfg.train.steps:,} steps, {work.run_tokens:,} tokens, {operations(work.run_flops)}"
        + (f", {number(work.epochs)} epochs" if work.epochs is not None else ""),
        "FLOPs count a multiplication and its addition as two; papers on DiT and PixArt count them as one",
    ]


def encoding_and_recomputation(encoder_flops: float, recomputed_flops: float) -> str:
    """What a step takes besides the model's forward and backward."""
    parts = {"in autoencoder and text encoder": encoder_flops, "for activations computed again": recomputed_flops}
    return ", ".join(f"{operations(flops)} {what}" for what, flops in parts.items() if flops) or "nothing"


def _memory(cfg: Config, budget: Budget) -> list[str]:
    fit = budget.configured
    if fit.memory is None:
        return [f"impossible: {fit.refused}"]
    memory = fit.memory
    notes = {
        "activations": f"{size(memory.activations.kept)} of them between forward and backward, "
        f"{size(memory.activations.workspace)} for attention's own sums on the way back",
        "encoding": "while nothing is trained",
    }
    kind = cfg.train.activation_checkpointing
    others = ", ".join(f"{size(peak)} with {name!r}" for name, peak in fit.peaks.items() if name != kind)
    lines = [f"{name:<12}{size(value):>10}  {notes.get(name, '')}".rstrip() for name, value in _parts(memory).items()]
    lines.append(f"{'at most':<12}{size(memory.peak):>10}  at one time, activation checkpointing '{kind}'; {others}")
    lines.append(fits_into(memory, budget.gpu))
    return lines


def _layouts(cfg: Config, budget: Budget) -> list[str]:
    smallest = budget.smallest
    lines = ["".join(f"{kind:>10}" for kind in ACTIVATION_CHECKPOINTING) + "  activation checkpointing"]
    for fit in budget.layouts:
        mark = "fits" if fit.fits else fit.refused
        peaks = [size(fit.peaks[kind]) if kind in fit.peaks else "-" for kind in ACTIVATION_CHECKPOINTING]
        lines.append("".join(f"{peak:>10}" for peak in peaks) + f"  {fit.overrides}: {mark}")
    if smallest is not None:
        return [*lines, f"smallest that fits: {smallest.overrides}"]
    lines.append(f"none fits on {budget.gpus} x {budget.gpu.name}: {_advice(cfg, budget)}")
    return lines


def _advice(cfg: Config, budget: Budget) -> str:
    usable = budget.gpu.usable_bytes
    for kind in ("selective", "full"):
        helped = [fit for fit in budget.layouts if kind in fit.peaks and fit.peaks[kind] <= usable]
        if helped:
            return f"with train.activation_checkpointing={kind} {helped[0].overrides} would"
    packed, buckets = cfg.data.packing_tokens > 0, cfg.data.buckets
    smaller = ["lower train.batch_size"] * (cfg.train.batch_size > 1)
    if packed or buckets:
        smaller = ["lower data.packing_tokens" if packed else "lower the batch_size of data.buckets"]
    remedies = [*smaller, "lower vae.micro_batch_size"]
    if cfg.train.overlap and not (cfg.data.cache or cfg.text.shard):
        remedies.append("set train.overlap=false")
    spread = "text.shard=true, " * (budget.gpus > 1)
    remedies.append(f"set {spread}text.offload=true or optim.offload=true")
    return ", or ".join([*remedies, "take more or larger GPUs"])


def _time(budget: Budget) -> list[str]:
    time = budget.time
    lines = [
        f"{time.utilisation:.0%} of the peak of {budget.gpus} x {budget.gpu.name} in model FLOPs "
        f"({time.utilisation_from}); they work at {time.busy:.0%} with what is computed again",
        f"a step      {duration(time.step_seconds)}; {number(time.samples_a_second)} samples/s, "
        f"{time.tokens_a_second_a_gpu:,.0f} tokens/s a GPU",
        f"the run     {duration(time.run_seconds)}, {number(time.gpu_hours)} GPU-hours"
        + (f", costs {time.cost:,.2f}" if time.cost is not None else ""),
    ]
    if time.busy > 1:
        lines.append("no GPU reaches that: give a lower --utilisation, or set train.activation_checkpointing=none")
    return lines


def _inference(cfg: Config, budget: Budget) -> list[str]:
    found, sample = budget.inference, cfg.sample
    what = "picture" if cfg.data.num_frames == 1 else "clip"
    lines = [
        f"a {what:<10}{sample.steps} steps, guidance {sample.guidance:g}: {found.evaluations} forward passes, "
        f"{operations(found.transformer_flops)}; decoding {operations(found.decode_flops)}, "
        f"text {operations(found.text_flops)}",
        f"            {duration(found.clip_seconds)} of one {budget.gpu.name} at the same utilisation"
        + (f", costs {found.cost_a_clip:.4g}" if found.cost_a_clip is not None else ""),
    ]
    if what == "picture":
        lines.append(f"a GPU-hour  {number(found.clips_a_gpu_hour)} pictures")
    else:
        lines.append(
            f"a GPU-hour  {number(found.clips_a_gpu_hour)} clips, {number(found.video_minutes_a_gpu_hour)} minutes of "
            f"video ({found.clip_duration:.3g} s a clip at {sample_fps(cfg):g} frames/s)"
        )
    lines.append(f"break-even  {found.break_even_clips:,.0f} {what}s take as many FLOPs as the training")
    return lines


def fits_into(memory: Memory, gpu: Gpu) -> str:
    fits = "does NOT fit" if too_much(memory, gpu) else "fits"
    return (
        f"{fits} into the {size(gpu.usable_bytes)} usable of a {gpu.name} ({gpu.memory_gib:g} GB); unverified on a GPU"
    )


def memory_parts(memory: Memory) -> str:
    """One line of the parts that make the peak."""
    return ", ".join(f"{name} {size(value)}" for name, value in _parts(memory).items() if value)


def _parts(memory: Memory) -> dict[str, float]:
    states, activations = memory.states, memory.activations
    most = max(activations.forward_peak, activations.backward_peak)
    return {
        "weights": states.weights, "gradients": states.gradients, "optimizer": states.optimizer,
        "average": states.average, "activations": most, "encoders": memory.encoders, "encoding": memory.encoding,
    }  # fmt: skip


def size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.3g} MiB"


def operations(flops: float) -> str:
    for unit, value in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= value:
            return f"{flops / value:,.4g} {unit}"
    return f"{flops / 1e6:,.4g} MFLOP"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    for unit, value in (("days", DAY), ("hours", SECONDS_AN_HOUR), ("min", 60)):
        if seconds >= 2 * value:
            return f"{seconds / value:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
