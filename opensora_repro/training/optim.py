"""AdamW and its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from opensora_repro.config import OptimConfig


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all trained parameters, one kernel call for all tensors of a device (fused)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True
    )


def learning_rate(cfg: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: linear warm-up, constant, linear decay over the last `decay_steps`."""
    rate = cfg.lr
    if step < cfg.warmup_steps:
        rate *= (step + 1) / cfg.warmup_steps
    if num_steps - step <= cfg.decay_steps:
        rate *= (num_steps - step) / (cfg.decay_steps + 1)
    return rate


def global_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm of all gradients together, a scalar on their device."""
    norms = torch._foreach_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return torch.linalg.vector_norm(torch.stack(norms))


def scale_gradients(parameters: list[nn.Parameter], factor: float) -> None:
    torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)
