"""Training steps of STDiT-XL/2 in bfloat16 on a GPU, at the published sizes, encoders apart.

`python -m benchmarks.train_step --gpu` and `make gpu` run the same cases: fused against eager kernels, one after the
other, since each wants the card's memory to itself; before each case the matrix products that set the limit. Each side
recomputes as few activations as its memory allows. Utilisation is model FLOPs, nothing counted twice, over the time,
over the limit measured here and over the data sheet's peak.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, save, side_by_side, summary, table
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opensora_repro.diffusion.gaussian import Objective
    from opensora_repro.parallel.engine import TorchEngine

STEPS, WARMUP = 6, 2
LEARNING_RATE = 1e-4
SIDES = {"ours": ("compiled", "auto"), "fused": ("fused", "auto"), "other": ("eager", "eager")}  # name, train.kernels
LIMIT_SECONDS, ENERGY_SECONDS = 2.0, 3.0
GOAL_UTILISATION, GOAL_TIMES = 0.5, 3.0
# Tokens a second a GPU that Open-Sora 1.0's training report gives for 8 H800, encoders included; a token is a patch of
# 2x2 latents. The last one is of two GPUs that share a sample and is not run here.
PUBLISHED = {"16x256": 28_000, "16x512": 23_000, "64x512": 25_000, "360x512, sequence parallel": 18_000}


@dataclass(frozen=True)
class Case:
    """A model and a GPU's batch of latents [C, T, H, W]."""

    cfg: STDiTConfig
    latents: tuple[int, int, int, int]
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.batch_size * math.prod(self.latents[1:]) // math.prod(self.cfg.patch_size)

    @property
    def flops(self) -> int:
        """Model FLOPs of a step, by the planner's formula."""
        from opensora_repro.planning.flops import forward_products
        from opensora_repro.planning.sizes import token_grid

        return self.batch_size * forward_products(self.cfg, token_grid(self.cfg, self.latents)).training_flops

    def counted_flops(self) -> int:
        """The same by torch's counter, on tensors without data."""
        import torch

        from benchmarks.limits import counted_flops
        from opensora_repro.models.stdit import STDiT

        with torch.device("meta"):
            model = STDiT(self.cfg)
            latents, timesteps = torch.empty(self.batch_size, *self.latents), torch.empty(self.batch_size)
            text = torch.empty(self.batch_size, self.cfg.model_max_length, self.cfg.caption_channels)
            return counted_flops(lambda: model(latents, timesteps, text).sum().backward())


CASES = {  # the published recipes; batches as in the released runs, and one clip where it is of 64 frames
    "16x256": Case(STDiTConfig(space_scale=0.5), (4, 16, 32, 32), 8),
    "16x512": Case(STDiTConfig(), (4, 16, 64, 64), 2),
    "64x512": Case(STDiTConfig(time_scale=2 / 3), (4, 64, 64, 64), 1),
}


# ---------------------------------------------------------------------------------------------------------------------
# Steps


@dataclass
class Training:
    """Everything that makes steps on one batch; call `step`, then `close`."""

    engine: TorchEngine
    objective: Objective
    predict: Callable[[Tensor, Tensor], Tensor]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    parameters: int
    in_backward: bool

    def step(self) -> tuple[Tensor, float, float]:
        """Loss [], seconds of the step, and of these the optimizer's."""
        start = self.now()
        loss = self.objective.losses(self.predict, self.latents, self.noise, self.timesteps).mean()
        if self.in_backward:
            self.engine.step_in_backward(LEARNING_RATE, 1.0)
        self.engine.backward(loss)
        norm = self.engine.squared_gradients().sqrt().item()
        computed = self.now()
        if not self.in_backward:
            self.engine.step(LEARNING_RATE, min(1.0, 1 / norm))
        self.engine.zero_grad()
        end = self.now()
        return loss.detach(), end - start, end - computed

    def now(self) -> float:
        import torch

        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Options:
    """How steps are made; the names are those of the config."""

    kernels: str = "auto"
    compiled: bool = False
    plugin: str = ""  # of ColossalAI; empty: the torch engine
    fused_optimizer: bool = True
    checkpointing: str = "full"
    offload_activations: bool = False
    offload: bool = False
    in_backward: bool = False


def build_training(device: torch.device, case: Case, options: Options) -> Training:
    """As a run of `stages` has it."""
    import torch

    from opensora_repro.config import DiffusionConfig, OptimConfig, ParallelConfig
    from opensora_repro.diffusion.gaussian import build_objective
    from opensora_repro.kernels import ops
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.parallel.build import build_engine
    from opensora_repro.training.optim import build_optimizer
    from opensora_repro.training.step import ModelRunner

    cfg, size = case.cfg, case.batch_size
    torch.manual_seed(0)
    with device:
        model = STDiT(cfg).train()
    model.activation_checkpointing = options.checkpointing
    model.offload_activations = options.offload_activations
    if options.compiled:
        model.compile_blocks()
    one_pass = options.fused_optimizer and not options.plugin and ops.fused(model.x_embedder.proj.weight)
    optim = OptimConfig(lr=LEARNING_RATE, offload=options.offload, in_backward=options.in_backward)
    optimizer = build_optimizer(model, optim, fused=one_pass)
    if not options.fused_optimizer:
        optimizer.param_groups[0]["fused"] = False
    parallel = ParallelConfig("colossalai", options.plugin) if options.plugin else ParallelConfig()
    engine = build_engine(parallel, device.type)
    engine.prepare(model, optimizer)
    latents, noise = torch.randn(2, size, *case.latents, device=device).unbind(0)
    text = torch.randn(size, cfg.model_max_length, cfg.caption_channels, device=device)
    mask = torch.ones(size, cfg.model_max_length, dtype=torch.bool)  # in host memory, as training keeps it
    return Training(
        engine=engine,
        objective=build_objective(DiffusionConfig()),
        predict=ModelRunner(engine.train_forward, "bf16", device).conditioned(text, mask),
        latents=latents,
        noise=noise,
        timesteps=torch.linspace(100, 900, size, device=device).round(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        in_backward=options.in_backward,
    )


def measure(
    device: torch.device, case: Case, *, steps: int = STEPS, with_energy: bool = False, **options: Any
) -> tuple[dict[str, Any], list[float]]:
    """What a step takes, and the seconds of each. Raises AssertionError where the loss does not fall on one batch."""
    import torch

    from benchmarks.resources import energy
    from tests.gpu.kernel_cases import using

    on_gpu, chosen = device.type == "cuda", Options(**options)
    with using(chosen.kernels, device):
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        training = build_training(device, case, chosen)
        try:
            done = [training.step() for _ in range(WARMUP + steps)]
            peak = torch.cuda.max_memory_allocated() if on_gpu else None
            joules = energy(training.step, device, ENERGY_SECONDS) if with_energy else None
        finally:
            training.engine.close()
    losses = torch.stack([loss for loss, _, _ in done]).tolist()
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    assert losses[-1] < losses[0], f"the loss does not fall on one batch: {losses}"
    seconds = [whole for _, whole, _ in done[WARMUP:]]
    step = statistics.median(seconds)
    return {
        "parameters": training.parameters,
        "latents": [case.batch_size, *case.latents],
        "checkpointing": chosen.checkpointing,
        "step_ms": round(1000 * step, 1),
        "update_ms": round(1000 * statistics.median(update for _, _, update in done[WARMUP:]), 1),
        "samples_per_second": round(case.batch_size / step, 3),
        "tokens_per_second": round(case.tokens / step),
        "peak_memory_gib": None if peak is None else round(peak / 2**30, 2),
        "energy_joules": None if joules is None else round(joules, 1),
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }, seconds


def measure_in_memory(device: torch.device, case: Case, **options: Any) -> tuple[dict[str, Any], list[float]]:
    """`measure` with the least recomputation that the card's memory allows."""
    import torch

    for checkpointing in ACTIVATION_CHECKPOINTING[:-1]:
        try:
            return measure(device, case, checkpointing=checkpointing, **options)
        except torch.cuda.OutOfMemoryError:
            pass
        gc.collect()  # what the failed attempt still holds, outside the handler that kept its frames
        torch.cuda.empty_cache()
    return measure(device, case, checkpointing=ACTIVATION_CHECKPOINTING[-1], **options)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def measure_row(
    device: torch.device, name: str, case: Case, published: int | None, steps: int = STEPS
) -> dict[str, Any]:
    """Compiled blocks, as a run on a GPU has them, and fused kernels against eager ones; of each the utilisation.

    Of ours also the speed beside the published.
    """
    import torch

    from benchmarks.limits import data_sheet, layer_shapes, measure_matmul_limit, share_of_limit

    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    limit = measure_matmul_limit(layer_shapes(case.cfg, case.tokens), dtype, device, LIMIT_SECONDS)
    sheet = data_sheet(torch.cuda.get_device_name(device)) if on_gpu else None
    peak = None if sheet is None else 1e12 * sheet.half_tflops
    sides, times = {}, {}
    for side, (_, kernels) in SIDES.items():
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        sides[side], times[side] = measure_in_memory(
            device, case, kernels=kernels, compiled=side == "ours" and on_gpu, steps=steps, with_energy=True
        )
        sides[side] |= share_of_limit(case.flops, times[side], limit)
        reached = case.flops / statistics.median(times[side])
        sides[side]["share_of_data_sheet"] = None if peak is None else round(reached / peak, 3)
    timed = side_by_side(times["ours"], times["other"])
    return {
        "case": name,
        "other_side": "eager kernels",
        "flops": {"formula": case.flops, "counted": case.counted_flops()},
        "matmul_limit": limit,
        "data_sheet_tflops": sheet and sheet.half_tflops,
        "published_tokens_per_second": published,
        "times_published": published and round(sides["ours"]["tokens_per_second"] / published, 2),
        "ratio": timed["ratio"],
        "fused_ratio": side_by_side(times["fused"], times["other"])["ratio"],
        **{side: sides[side] | summary(times[side]) for side in sides},
    }


def measure_case(device: torch.device, name: str) -> dict[str, Any]:
    return measure_row(device, name, CASES[name], PUBLISHED[name])


def run(out: Path | None) -> int:
    """Measure all cases, print a table and save it; without a GPU say so."""
    import torch

    result: dict[str, Any] = {"benchmark": "train_step_gpu", "gpu": None, "environment": environment()}
    if not torch.cuda.is_available():
        path = save("train_step_gpu", {**result, "missing": "no NVIDIA GPU here"}, out)
        print(f"no NVIDIA GPU here: no step is measured; written to {path}")
        return 0
    device = torch.device("cuda", 0)
    result |= {"gpu": torch.cuda.get_device_name(device), "dtype": "bf16", "published": PUBLISHED}
    result["goals"] = {"share_of_data_sheet": GOAL_UTILISATION, "times_published": GOAL_TIMES}
    result["rows"], result["failed"] = each_case(lambda name: measure_case(device, name), CASES)
    path = save("train_step_gpu", result, out)
    print(report(result["gpu"], result["rows"], result["failed"]))
    for name, reason in result["failed"].items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    print(f"written to {path}")
    return 1 if result["failed"] else 0


def each_case(
    measure: Callable[[str], dict[str, Any]], names: Iterable[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of what could be measured, and why the others could not: one that needs too much costs no other."""
    rows, failed = [], {}
    for name in names:
        try:
            rows.append(measure(name))
        except Exception as error:  # whatever a card, its driver or the compiler raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return rows, failed


def report(gpu: str, rows: Sequence[dict[str, Any]], failed: Iterable[str] = ()) -> str:
    columns = (
        "", "kernels", "step ms", "tokens/s", "published", "of the peak", "of the limit", "peak GiB", "recomputed", "J"
    )  # fmt: skip
    lines: list[tuple[object, ...]] = []
    for row in rows:
        for side, (kernels, _) in SIDES.items():
            found = row[side]
            peak = found["share_of_data_sheet"]
            lines.append((
                row["case"], kernels, found["step_ms"], found["tokens_per_second"], row["published_tokens_per_second"],
                "" if peak is None else f"{100 * peak:.0f} %", f"{100 * found['share_of_limit']:.0f} %",
                found["peak_memory_gib"], found["checkpointing"], found["energy_joules"],
            ))  # fmt: skip
    lines += [(name, "failed", *[""] * (len(columns) - 2)) for name in failed]
    return table(f"STDiT-XL/2, bf16, a training step on one {gpu}, encoders apart (medians)", columns, lines)
