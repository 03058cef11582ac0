"""AdamW and the weights' average, by the config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opensora_repro.config import Config, ConfigError, OptimConfig
from opensora_repro.kernels.adamw import FusedAdamW
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.offload import HostAdamW
from opensora_repro.training.step import Ema


def prepare_engine(engine: TorchEngine, model: nn.Module, cfg: Config, kernels: str) -> Ema:
    """Give the engine the model and its optimizer; the average that follows them. `kernels`: "eager" or "triton"."""
    # ColossalAI's plugins and FSDP hand the optimizer weights of their own.
    fused = kernels == "triton" and (cfg.parallel.engine, cfg.parallel.plugin) == ("torch", "ddp")
    engine.prepare(model, build_optimizer(model, cfg.optim, fused=fused), half=cfg.train.dtype == "bf16")
    return Ema(engine, cfg.ema.decay, offload=cfg.optim.offload)


def build_optimizer(model: nn.Module, cfg: OptimConfig, *, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over all trained parameters, one kernel call for all tensors of a device.

    `fused`: the gradients' factor and the weights' average are in that call, too, where it is the only one a step. It
    needs an optimizer that works on the model's own weights.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": cfg.lr, "betas": cfg.betas, "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    if cfg.offload:
        return HostAdamW(parameters, **options)
    if fused and not cfg.in_backward:
        return FusedAdamW(parameters, **options)
    return torch.optim.AdamW(parameters, **options, fused=True)


def check_processes(cfg: OptimConfig, world_size: int) -> None:
    """Raises ConfigError where so many processes cannot work as the config wants."""
    if cfg.in_backward and world_size > 1:
        raise ConfigError(
            f"optim.in_backward = true: expected false with {world_size} processes, whose gradients are averaged first"
        )
