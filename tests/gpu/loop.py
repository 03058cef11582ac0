"""GPU checks of the training loop: nobody waits for the device, and encoders run beside the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparisons import require

if TYPE_CHECKING:
    import torch

    from opensora_repro.models.config import STDiTConfig

TOLERANCE = 3e-2  # of bf16 losses


def loop_without_waiting(device: torch.device) -> dict[str, Any]:
    """Training steps on cached samples, with fused and eager kernels, under CUDA's ban on waiting for the device."""
    from benchmarks import loop
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.training.measure import MadeUp
    from tests.gpu.kernel_cases import using

    model = STDiTConfig(hidden_size=144, depth=2, num_heads=4, caption_channels=loop.DEMO_CAPTION, model_max_length=12)
    encoder = loop.demo_encoder(device, model.model_max_length)
    feed = MadeUp(lambda number: loop.made_up_encoding(number, (4, 2, 4, 4), (12, loop.DEMO_CAPTION)), 2)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("auto", "eager"):
            cfg = loop.loop_config(Path(folder) / kernels, model, size=32, frames=2, batch_size=2, steps=6)
            with using(kernels, device):
                trainer = loop.build_loop(cfg, encoder, feed, device, kind=loop.Strict)
                lines = loop.run_loop(trainer)
            assert all(line["loss"] > 0 for line in lines), lines
            found[f"{kernels}: strict steps"] = len(lines) - loop.Strict.FREE_STEPS
    return found


def encoders_beside(
    device: torch.device,
    model: STDiTConfig | None = None,
    *,
    vae: Callable[[Path], Path] | None = None,
    size: int = 256,
    frames: int = 16,
    batch_size: int = 4,
    steps: int = 12,
) -> dict[str, Any]:
    """STDiT-XL/2 on clips that an autoencoder of Stable Diffusion's size encodes, beside the step and in turn."""
    from benchmarks import loop
    from opensora_repro.models.config import STDiTConfig
    from opensora_repro.training.measure import MadeUp
    from tests.gpu.kernel_cases import using

    model = model or STDiTConfig(caption_channels=loop.DEMO_CAPTION, space_scale=0.5)
    clips = [loop.made_up_clip(number, frames, size) for number in range(batch_size)]  # making them takes time
    feed = MadeUp(lambda number: replace(clips[number % batch_size], id=f"sample {number}"), batch_size)
    with tempfile.TemporaryDirectory() as folder, using("auto", device):
        encoder = loop.demo_encoder(device, model.model_max_length, (vae or loop.random_vae)(Path(folder) / "vae"))
        run_dir = Path(folder) / "run"
        cfg = loop.loop_config(run_dir, model, size=size, frames=frames, batch_size=batch_size, steps=steps)
        result = loop.with_and_without_overlap(cfg, encoder, feed, device)
    return {**result, "largest_gap": require(result["largest_gap"], TOLERANCE, "losses")}
