"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), second-order multistep, for networks trained on discrete steps.

Continuous time runs from 1 (noise) to 1/N; the discrete step i of N sits at (i + 1) / N and log alpha is linear in
between, so the network sees fractional timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from opensora_repro.diffusion.flow import NUM_TIMESTEPS, ModelFn
from opensora_repro.diffusion.frame_masks import GivenFrames, per_frame

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

    def sampling_times(self, steps: int) -> list[float]:
        """Uniform steps from 1 to 1/N: [steps + 1]."""
        times: list[float] = np.linspace(1, 1 / self.num_steps, steps + 1).tolist()
        return times


def dpm_solver_sample(
    model_fn: ModelFn,
    x: Tensor,
    schedule: ContinuousSchedule,
    steps: int,
    *,
    given: GivenFrames | None = None,
    next_noise: Callable[[], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate x [B, C, T, H, W] from t = 1 to 1/N in `steps` uniform steps of one evaluation each.

    Order 2 except for the first step and, with fewer than ten steps, the last. `model_fn` predicts noise in its first C
    output channels; a predicted variance is ignored. Of `given` frames one of edit ratio w below 1 stays as it is while
    t > w; then it takes of `next_noise()`, drawn at each step, and moves from there on, its first step of order 1.
    """
    times = schedule.sampling_times(steps)
    older: tuple[float, Tensor] | None = None  # lambda and denoised sample of the step before
    masks: list[Tensor] = []  # the frame mask [B, T], where there is one
    if given is not None:
        x, masks = given.into(x), [given.moving(1.0, x.device)]
    for i, (now, after) in enumerate(pairwise(times)):
        joining = None
        if given is not None and next_noise is not None:
            before, masks = masks, [given.moving(now, x.device)]
            joining = per_frame(masks[0] & ~before[0])
            noised = math.exp(schedule.log_alpha(now)) * x + schedule.sigma(now) * next_noise()
            x = torch.where(joining, noised, x)
        timestep = torch.full((len(x),), schedule.model_timestep(now), device=x.device)
        eps = model_fn(x, timestep, *masks)[:, : x.shape[1]]
        x_0 = (x - schedule.sigma(now) * eps) / math.exp(schedule.log_alpha(now))
        if watch is not None:
            watch(i + 1, torch.where(per_frame(masks[0]), x_0, x) if masks else x_0)
        log_snr = schedule.log_snr(now)
        step = schedule.log_snr(after) - log_snr
        target = x_0
        if older is not None and not (steps < FEW_STEPS and i == steps - 1):
            older_step = log_snr - older[0]
            target = x_0 + step / (2 * older_step) * (x_0 - older[1])  # extrapolated to the middle of the step
            if joining is not None:
                target = torch.where(joining, x_0, target)
        older = (log_snr, x_0)
        shrink = schedule.sigma(after) / schedule.sigma(now)
        stepped = shrink * x - math.exp(schedule.log_alpha(after)) * math.expm1(-step) * target
        x = torch.where(per_frame(masks[0]), stepped, x) if masks else stepped
        if progress is not None:
            progress(i + 1, steps)
    return x
