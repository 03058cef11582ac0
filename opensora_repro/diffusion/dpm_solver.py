"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), second-order multistep, for networks trained on discrete steps.

Continuous time runs from 1 (noise) to 1/N; the discrete step i of N sits at (i + 1) / N and log alpha is linear in
between, so the network sees fractional timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opensora_repro.diffusion.flow import NUM_TIMESTEPS, ModelFn

FEW_STEPS = 10  # below this the last step is first order, which keeps short runs stable


class ContinuousSchedule:
    """Interpolates a discrete schedule: x_t = alpha x_0 + sigma noise, with lambda = log(alpha / sigma)."""

    def __init__(self, betas: np.ndarray) -> None:
        self.num_steps = len(betas)
        self._times = np.arange(1, self.num_steps + 1) / self.num_steps
        self._log_alphas = 0.5 * np.cumsum(np.log(1 - betas))

    def log_alpha(self, t: float) -> float:
        return float(np.interp(t, self._times, self._log_alphas))

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(2 * self.log_alpha(t)))

    def log_snr(self, t: float) -> float:
        """lambda(t), half the logarithm of the signal-to-noise ratio."""
        return self.log_alpha(t) - math.log(self.sigma(t))

    def model_timestep(self, t: float) -> float:
        """What the network sees: 999 at t = 1, 0 at t = 1/N."""
        return (t - 1 / self.num_steps) * NUM_TIMESTEPS


def dpm_solver_sample(
    model_fn: ModelFn,
    x: Tensor,
    schedule: ContinuousSchedule,
    steps: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate x [B, C, T, H, W] from t = 1 to 1/N in `steps` uniform steps of one evaluation each.

    Order 2 except for the first step and, with fewer than ten steps, the last. `model_fn` predicts noise in its first C
    output channels; a predicted variance is ignored.
    """
    times: Sequence[float] = np.linspace(1, 1 / schedule.num_steps, steps + 1).tolist()
    older: tuple[float, Tensor] | None = None  # lambda and denoised sample of the step before
    for i, (now, after) in enumerate(pairwise(times)):
        timestep = torch.full((len(x),), schedule.model_timestep(now), device=x.device)
        eps = model_fn(x, timestep)[:, : x.shape[1]]
        x_0 = (x - schedule.sigma(now) * eps) / math.exp(schedule.log_alpha(now))
        log_snr = schedule.log_snr(now)
        step = schedule.log_snr(after) - log_snr
        target = x_0
        if older is not None and not (steps < FEW_STEPS and i == steps - 1):
            older_step = log_snr - older[0]
            target = x_0 + step / (2 * older_step) * (x_0 - older[1])  # extrapolated to the middle of the step
        older = (log_snr, x_0)
        shrink = schedule.sigma(after) / schedule.sigma(now)
        x = shrink * x - math.exp(schedule.log_alpha(after)) * math.expm1(-step) * target
        if progress is not None:
            progress(i + 1, steps)
    return x
