"""GPU checks of attention to captions and of sampling: the kernel for sequences end to end, text prepared once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import require, rms_error
from benchmarks.sides import random_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOLERANCE = {"output": 3e-2, "gradients": 6e-2}  # of bf16: root mean square of the difference over that of the values


def captions_end_to_end(device: torch.device) -> dict[str, Any]:
    """bf16 with lengths known to the host, so that torch's varlen kernel runs, against float32 on the CPU; no waiting.

    The twin behind a mask, whose lengths nobody knows, stands beside it: both must be as near.
    """
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.cross_attention import varlen_kernel
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    model = random_weights(
        STDiT(STDiTConfig(hidden_size=144, depth=3, num_heads=2, caption_channels=32, model_max_length=12))
    )
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, 5, 8, 16, generator=generator)
    timestep, text = torch.tensor([999.0, 12.5, 505.0]), torch.randn(3, 12, 32, generator=generator)
    empty, holes = torch.arange(12) < 0, torch.arange(12) % 3 == 1
    mask = torch.stack([torch.arange(12) < 9, empty, holes])

    def work(where: torch.device, mask: Tensor, half: bool, strict: bool = False) -> dict[str, Tensor]:
        model.to(where).zero_grad(set_to_none=True)
        inputs = [value.to(where) for value in (latents, timestep, text)]
        with waiting_forbidden(strict and where.type == "cuda"):
            with torch.autocast(where.type, torch.bfloat16, enabled=half):
                out = model(*inputs, mask)
            out.square().mean().backward()
        return {"output": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    if device.type == "cuda":
        assert varlen_kernel(device, torch.bfloat16, 72) is not None, f"torch {torch.__version__} has no varlen kernel"
    expected = {name: value.cpu() for name, value in work(torch.device("cpu"), mask, half=False).items()}
    found: dict[str, Any] = {}
    for name, where in (("end to end", "cpu"), ("behind a mask", device)):
        work(device, mask.to(where), half=True)  # fills tables that are kept
        results = work(device, mask.to(where), half=True, strict=True)
        errors = {key: rms_error(results[key], value) for key, value in expected.items() if value.any()}
        worst = {"output": errors.pop("output"), "gradients": max(errors.values())}
        for what, error in worst.items():
            found[f"{name}, {what}"] = require(error, TOLERANCE[what], f"{name}, {what}")
    return found


def packed_rows(device: torch.device) -> dict[str, Any]:
    """bf16, batches of four shapes in a row, through the kernel for sequences end to end; no waiting.

    Against the same model in float32 on the CPU, which goes batch by batch.
    """
    import torch

    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.packing import PackedSTDiT

    torch.manual_seed(0)
    model = random_weights(
        PackedSTDiT(STDiTConfig(hidden_size=144, depth=3, num_heads=2, caption_channels=32, model_max_length=12))
    )
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, 4, 4, 8, 16), (1, 4, 1, 12, 8), (3, 4, 5, 6, 6), (1, 4, 3, 8, 16)]
    latents = [torch.randn(size, generator=generator) for size in sizes]
    timestep, text = 1000 * torch.rand(7, generator=generator), torch.randn(7, 12, 32, generator=generator)
    mask = torch.arange(12) < torch.tensor([12, 9, 0, 1, 5, 5, 12])[:, None]

    def work(where: torch.device, packed: bool, half: bool, strict: bool = False) -> dict[str, Tensor]:
        model.to(where).zero_grad(set_to_none=True)
        batches, *rest = [x.to(where) for x in latents], timestep.to(where), text.to(where), mask
        with waiting_forbidden(strict and where.type == "cuda"):
            with torch.autocast(where.type, torch.bfloat16, enabled=half):
                counts = [len(batch) for batch in batches]
                alone = zip(batches, *(value.split(counts) for value in rest), strict=True)
                outputs = model(batches, *rest) if packed else [model(*batch) for batch in alone]
            torch.stack([out.square().mean() for out in outputs]).sum().backward()
        found = {"output": torch.cat([out.detach().flatten() for out in outputs])}
        return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = {name: value.cpu() for name, value in work(torch.device("cpu"), packed=False, half=False).items()}
    work(device, packed=True, half=True)  # fills tables that are kept
    results = work(device, packed=True, half=True, strict=True)
    errors = {key: rms_error(results[key], value) for key, value in expected.items() if value.any()}
    worst = {"output": errors.pop("output"), "gradients": max(errors.values())}
    return {what: require(error, TOLERANCE[what], what) for what, error in worst.items()}


@contextlib.contextmanager
def waiting_forbidden(forbidden: bool) -> Iterator[None]:
    """Whatever would make the host wait for the GPU raises."""
    import torch

    if forbidden:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if forbidden:
            torch.cuda.set_sync_debug_mode("default")


def sampling_full_size(device: torch.device, steps: int = 5) -> dict[str, Any]:
    """STDiT-XL/2, 16x256, bf16 with guidance: text prepared once against text read at every step; seconds a step."""
    import torch

    from opensora_repro.config import DiffusionConfig
    from opensora_repro.diffusion.samplers import LatentSampler
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.models.stdit import STDiT

    torch.manual_seed(0)
    with device:
        model = random_weights(STDiT(STDiTConfig(space_scale=0.5))).eval()
    text = torch.randn(1, 120, 4096, generator=torch.Generator().manual_seed(1)).to(device)
    found: dict[str, Any] = {}
    latents = {}
    for name, prepare in (("prepared", model.prepare_text), ("not prepared", None)):
        for _ in range(2):  # the first run is the warm-up
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                latents[name] = LatentSampler(
                    DiffusionConfig(), "ddim", steps=steps, guidance=7.0, prepare_text=prepare
                )(
                    model,
                    text,
                    torch.arange(120)[None] < 25,
                    model.null_condition(),
                    shape=(4, 16, 32, 32),
                    generators=[torch.Generator().manual_seed(0)],
                )
            torch.cuda.synchronize()
            found[f"{name}, ms a step"] = round(1000 * (time.perf_counter() - began) / steps, 1)
    error = rms_error(latents["prepared"], latents["not prepared"])
    return {**found, "rms": require(error, TOLERANCE["gradients"], "latents with text prepared")}
