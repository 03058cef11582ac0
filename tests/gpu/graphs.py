"""GPU checks of CUDA graphs in sampling: the same samples with and without, what cannot be recorded, and the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import relative_error, require, rms_error
from benchmarks.sides import random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opensora_repro.diffusion.samplers import CallContext
    from opensora_repro.parallel.cuda_graph import CudaGraph
    from opensora_repro.sampling.graphs import StepGraphs

STEPS = 12  # of small models
FULL_STEPS = 50
BATCHES = (3, 1)
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # largest difference over largest value; the kernels are the very same
FULL_TOLERANCE = 6e-2  # root mean square, bf16, after many steps


class Rerun:
    """Stands in for a graph where there is no GPU: runs the call again and writes where a graph would."""

    def __init__(self, device: torch.device) -> None:
        self.replays = 0

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        return call()

    def capture(self, call: Callable[[], Tensor]) -> Tensor:
        self._call, self._output = call, call().fill_(float("nan"))  # recording computes nothing
        return self._output

    def replay(self) -> None:
        self.replays += 1
        self._output.copy_(self._call())

    def close(self) -> None:
        if self.replays:
            self._output.fill_(float("nan"))  # whoever still reads it will notice


def recording(device: torch.device) -> tuple[StepGraphs, list[Any]]:
    """Sample through the first; the second then holds the graphs that it made."""
    from opensora_repro.parallel.cuda_graph import CudaGraph
    from opensora_repro.sampling.graphs import StepGraphs

    made: list[Any] = []

    def new_graph(where: torch.device) -> CudaGraph | Rerun:
        made.append(CudaGraph(where) if where.type == "cuda" else Rerun(where))
        return made[-1]

    return StepGraphs(new_graph), made


def same_samples(device: torch.device) -> dict[str, Any]:
    """STDiT and DiT, float32 and bf16, eager and fused kernels; the last batch is smaller."""
    import torch

    from opensora_repro.models.config import DiTConfig, STDiTConfig
    from opensora_repro.models.dit import DiT
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    stdit = STDiT(STDiTConfig(hidden_size=144, depth=3, num_heads=2, caption_channels=32, model_max_length=12))
    dit = DiT(DiTConfig(hidden_size=144, depth=3, num_heads=2, num_classes=10))
    errors: dict[str, Any] = {}
    for name, model in (("stdit", stdit), ("dit", dit)):
        model = random_weights(model).to(device).eval()
        for kernels in ("eager", "auto"):
            for dtype in TOLERANCE:
                what = f"{name}, {kernels}, {dtype}"
                errors[what] = largest_difference(model, device, kernels, dtype, what)
    return errors


def largest_difference(model: Any, device: torch.device, kernels: str, dtype: str, what: str) -> float:
    import torch

    from tests.gpu.kernel_cases import using

    graphs, made = recording(device)
    worst = 0.0
    with using(kernels, device), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        for batch in BATCHES:
            plain, replayed = (sample_small(model, batch, way) for way in (nullcontext, graphs))
            worst = max(worst, relative_error(replayed, plain))
    assert graphs.usable and len(made) == len(BATCHES), f"{what}: not recorded"
    return require(worst, TOLERANCE[dtype], what)


def sample_small(model: Any, batch: int, graphs: CallContext) -> Tensor:
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.samplers import LatentSampler

    device, prepare = next(model.parameters()).device, getattr(model, "prepare_text", None)
    condition, mask = torch.arange(batch, device=device), None
    if prepare is not None:
        condition = torch.randn(batch, 12, 32, generator=torch.Generator().manual_seed(1)).to(device)
        mask = torch.arange(12)[None] < torch.tensor([[12], [5], [9]])[:batch]
    return LatentSampler(
        DiffusionConfig(), "dpm", steps=STEPS, guidance=4.0, prepare_text=prepare, call_context=graphs
    )(
        model,
        condition,
        mask,
        model.null_condition(),
        shape=(4, 3, 8, 8),
        generators=[torch.Generator().manual_seed(i) for i in range(batch)],
    )


def unrecordable(device: torch.device) -> dict[str, Any]:
    """A call that waits for the GPU spoils its recording: it is called on, and nothing is recorded from then on."""
    import torch

    if device.type != "cuda":
        return {"nothing can spoil": str(device)}
    weight = torch.randn(64, 64, device=device)

    def sound(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.sin(x @ weight) * timestep[:, None]

    def waits(x: Tensor, timestep: Tensor) -> Tensor:
        assert x.sum().item() < float("inf")
        return sound(x, timestep)

    for model_fn in (waits, sound):
        graphs, _ = recording(device)
        with torch.inference_mode(), graphs(model_fn) as call:
            for step in range(6):
                x, timestep = torch.randn(2, 64, device=device), torch.full((2,), float(step), device=device)
                assert torch.equal(call(x, timestep), model_fn(x, timestep)), f"{model_fn.__name__}, step {step}"
        assert not graphs.usable, model_fn.__name__
    return {"goes on": True}


def full_size(device: torch.device, steps: int = FULL_STEPS) -> dict[str, Any]:
    """STDiT-XL/2 in bf16 with guidance, one prompt: seconds a step and memory, for 16x256 and for one frame."""
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    with device:
        model = random_weights(STDiT(STDiTConfig(space_scale=0.5))).eval()
    found: dict[str, Any] = {}
    for size, frames in (("16x256", 16), ("1x256", 1)):
        latents = {}
        for way in ("plain", "replayed"):
            measured = [sample_full(model, frames, steps, way) for _ in range(2)][-1]  # the first run is the warm-up
            latents[way], found[f"{size}, {way}, ms a step"], found[f"{size}, {way}, peak GiB"] = measured
        error = rms_error(latents["replayed"], latents["plain"])
        found[f"{size}, rms"] = require(error, FULL_TOLERANCE, size)
    return found


def sample_full(model: Any, frames: int, steps: int, way: str) -> tuple[Tensor, float, float]:
    """Latents, ms a step with all that recording takes, GiB reserved."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.samplers import LatentSampler

    device = next(model.parameters()).device
    graphs, made = recording(device)
    text = torch.randn(1, 120, 4096, generator=torch.Generator().manual_seed(1)).to(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        latents = LatentSampler(
            DiffusionConfig(),
            "ddim",
            steps=steps,
            guidance=7.0,
            prepare_text=model.prepare_text,
            call_context=graphs if way == "replayed" else nullcontext,
        )(
            model,
            text,
            torch.arange(120)[None] < 25,
            model.null_condition(),
            shape=(4, frames, 32, 32),
            generators=[torch.Generator().manual_seed(0)],
        )
        torch.cuda.synchronize(device)
    milliseconds = 1000 * (time.perf_counter() - began) / steps
    assert graphs.usable and bool(made) == (way == "replayed")
    peak = torch.cuda.max_memory_reserved(device) / 2**30
    return latents, round(milliseconds, 2), round(peak, 2)
