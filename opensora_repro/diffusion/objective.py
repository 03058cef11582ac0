"""The training objectives behind one protocol, chosen by `diffusion.objective`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from opensora_repro.diffusion.flow import ModelFn, build_flow
from opensora_repro.diffusion.gaussian import GaussianDiffusion

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig


class Objective(Protocol):
    """What a training loop needs. Timesteps are what the network sees: float32 in [0, 1000]."""

    def draw_timesteps(self, generators: Sequence[torch.Generator], num_tokens: int, frames: int = 1) -> Tensor: ...

    def fixed_timesteps(self, shares: Sequence[float]) -> list[float]: ...

    def losses(self, model_fn: ModelFn, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...


def build_objective(cfg: DiffusionConfig) -> Objective:
    """Raise ValueError for an objective that does not exist."""
    if cfg.objective == "flow":
        return build_flow(cfg)
    if cfg.objective == "iddpm":
        return GaussianDiffusion()
    raise ValueError(f"diffusion.objective={cfg.objective!r} is unknown; expected 'iddpm' or 'flow'")
