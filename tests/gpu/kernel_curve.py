"""The training curve of a small STDiT with fused and with eager kernels, on the same samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.gpu.kernel_cases import using

if TYPE_CHECKING:
    import torch

    from opensora_repro.models.config import STDiTConfig


def curve(
    kernels: str,
    cfg: STDiTConfig,
    device: torch.device,
    *,
    dtype: str,
    steps: int,
    batch_size: int = 2,
    recompute: bool = False,
    size: tuple[int, int, int] = (2, 4, 6),
    lr: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Losses of `steps` steps (noise prediction, clipped AdamW), and at the end that of the averaged weights.

    The samples follow from the step alone; `seed` moves every first weight by a rounding error or so, to tell what of a
    difference between two curves is chance.
    """
    import torch

    from opensora_repro.config import OptimConfig
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.parallel.engine import TorchEngine
    from opensora_repro.training.optim import build_optimizer
    from opensora_repro.training.step import Ema, ModelRunner

    torch.manual_seed(0)
    model = STDiT(cfg)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # also what starts at zero, else half of the model is silent at first
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if seed:
                parameter.mul_(1 + 1e-7 * torch.randn(parameter.shape, generator=noise))
    model.activation_checkpointing = "full" if recompute else "none"
    model = model.to(device).train()
    engine = TorchEngine(device=str(device))
    with using(kernels, device):
        engine.prepare(model, build_optimizer(model, OptimConfig(lr=lr), fused=kernels == "triton"))
        ema = Ema(engine, 0.9)
        runner = ModelRunner(engine.train_forward, dtype, device)

        def loss_of(step: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(step)
            latents = torch.randn(batch_size, cfg.in_channels, *size, generator=generator)
            expected = torch.randn(latents.shape, generator=generator) + latents
            text = torch.randn(batch_size, cfg.model_max_length, cfg.caption_channels, generator=generator).to(device)
            mask = torch.ones(batch_size, cfg.model_max_length, dtype=torch.bool)
            timesteps = torch.rand(batch_size, generator=generator).mul(1000).to(device)
            found = runner.conditioned(text, mask)(latents.to(device), timesteps)
            return (found[:, : cfg.in_channels] - expected.to(device)).square().mean()

        losses = []
        for step in range(steps):
            loss = loss_of(step)
            engine.backward(loss)
            norm = float(engine.squared_gradients().sqrt())
            engine.step(lr, min(1.0, 1.0 / norm))
            ema.update()
            engine.zero_grad()
            losses.append(float(loss.detach()))
        with ema.applied(), torch.no_grad():
            losses.append(float(loss_of(steps)))
    engine.close()
    return losses


def largest_gap(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
