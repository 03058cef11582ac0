"""From noise to latents: classifier-free guidance and the samplers of both objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_repro.diffusion.dpm_solver import ContinuousSchedule, dpm_solver_sample
from opensora_repro.diffusion.flow import NUM_TIMESTEPS, ModelFn, build_flow
from opensora_repro.diffusion.gaussian import GaussianDiffusion, linear_betas
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.layers import count_frames, count_tokens

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig

IDDPM_SAMPLERS = ("iddpm", "ddim", "dpm")
FLOW_SAMPLERS = ("euler", "ab2")
NUM_GUIDED_CHANNELS = 3  # published models guide the first three noise channels under IDDPM (inherited from DiT)

Progress = Callable[[int, int], None]  # (steps done, steps in all)
# (text, mask, null=the null caption or None) -> what the model takes in place of both; the null half follows the text
PrepareText = Callable[..., Any]
# The guided model -> what samples with it call in its place within the context
CallContext = Callable[[ModelFn], AbstractContextManager[ModelFn]]


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal [B, *shape] on `device`, sample i from generator i alone, so that neighbours never matter."""
    return to_device(torch.stack([torch.randn(tuple(shape), generator=g, device=g.device) for g in generators]), device)


def guided_model(
    model: Callable[..., Tensor],
    condition: Tensor,
    mask: Tensor | None,
    null_condition: Tensor,
    *,
    guidance: float,
    num_guided: int | None = None,
    prepare_text: PrepareText | None = None,
) -> ModelFn:
    """Classifier-free guidance (Ho & Salimans 2022) in one forward of [conditional; null].

    The condition is text [B, L, Ct] or labels [B]; the null condition is one sample's, [L, Ct] or []. The null caption
    is cut by each prompt's own mask [B, L], as in the published model. The output's first `num_guided` channels (None:
    all) are guided; the others are the conditional half's. A guidance of 1 needs no null half.
    With the model's `prepare_text` what it makes of the text alone is computed here, once, and both halves share their
    latents.
    """
    if guidance == 1:
        if prepare_text is not None:
            condition, mask = prepare_text(condition, mask, null=None), None
        return lambda x, timestep: model(x, timestep, condition, mask)
    if prepare_text is not None:
        prepared = prepare_text(condition, mask, null=null_condition)

        def both_halves(x: Tensor, timestep: Tensor) -> Tensor:
            return model(x, timestep, prepared)

    else:
        both = torch.cat([condition, null_condition.to(condition).expand_as(condition)])
        both_mask = None if mask is None else torch.cat([mask, mask])

        def both_halves(x: Tensor, timestep: Tensor) -> Tensor:
            return model(torch.cat([x, x]), torch.cat([timestep, timestep]), both, both_mask)

    def guided(x: Tensor, timestep: Tensor) -> Tensor:
        cond, null = both_halves(x, timestep).chunk(2)  # each [B, C_out, T, H, W]
        mixed = null + guidance * (cond - null)
        return mixed if num_guided is None else torch.cat([mixed[:, :num_guided], cond[:, num_guided:]], dim=1)

    return guided


def euler_sample(model_fn: ModelFn, x: Tensor, times: Tensor, progress: Progress | None = None) -> Tensor:
    """Follow the velocity from times[0] = 1 (noise) to times[-1] = 0 (data) by Euler steps; x is [B, C, T, H, W]."""
    grid, num_channels = times.tolist(), x.shape[1]
    for i, (now, after) in enumerate(pairwise(grid)):
        timestep = torch.full((len(x),), NUM_TIMESTEPS * now, device=x.device)
        x = x + (after - now) * model_fn(x, timestep)[:, :num_channels]
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


def ab2_sample(model_fn: ModelFn, x: Tensor, times: Tensor, progress: Progress | None = None) -> Tensor:
    """As `euler_sample`, but to second order: each velocity is carried on as it changed since the one before.

    Adams and Bashforth's two-step method for steps of any sizes; a step calls the model once, as one of Euler's does.
    """
    grid, num_channels = times.tolist(), x.shape[1]
    before, step_before = torch.zeros_like(x), math.inf  # the first step is Euler's
    for i, (now, after) in enumerate(pairwise(grid)):
        timestep = torch.full((len(x),), NUM_TIMESTEPS * now, device=x.device)
        velocity, step = model_fn(x, timestep)[:, :num_channels], after - now
        x = x + step * (velocity + step / (2 * step_before) * (velocity - before))
        before, step_before = velocity, step
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


def iddpm_sample(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Tensor,
    next_noise: Callable[[], Tensor],
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling over all steps of `diffusion`; x and every `next_noise()` are [B, C, T, H, W]."""
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        x, _ = diffusion.p_sample(model_fn, x, t, next_noise())
        if progress is not None:
            progress(diffusion.num_steps - i, diffusion.num_steps)
    return x


def ddim_sample(
    diffusion: GaussianDiffusion, model_fn: ModelFn, x: Tensor, *, progress: Progress | None = None
) -> Tensor:
    """Deterministic DDIM sampling (eta 0) over all steps of `diffusion`; x is [B, C, T, H, W]."""
    for i in reversed(range(diffusion.num_steps)):
        x = diffusion.ddim_sample(model_fn, x, torch.full((len(x),), i, device=x.device))
        if progress is not None:
            progress(diffusion.num_steps - i, diffusion.num_steps)
    return x


@dataclass(frozen=True)
class LatentSampler:
    """From noise to latents of a trained model.

    `name` chooses among IDDPM's samplers or the flow's, where all but "ab2" are Euler steps. Latents of patches of
    `patch_size` are tokens, whose number sets the flow's shift. `prepare_text` is the model's own, see `guided_model`;
    without it the model is called as in training, whatever stands between. The guided model is called within its
    `call_context`, which ends with the sampling, alike at every step.
    """

    objective: DiffusionConfig
    name: str
    steps: int
    guidance: float
    patch_size: Sequence[int] = (1, 2, 2)
    prepare_text: PrepareText | None = None
    call_context: CallContext = nullcontext
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling needs at least one step, got {self.steps}")
        if self.objective.objective != "flow" and self.name not in IDDPM_SAMPLERS:
            expected = ", ".join(IDDPM_SAMPLERS)
            raise ValueError(f"sampler {self.name!r} does not fit an IDDPM model; choose from {expected}")

    def __call__(
        self,
        model: Callable[..., Tensor],
        condition: Tensor,
        mask: Tensor | None,
        null_condition: Tensor,
        *,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Return float32 latents [B, *shape] on the condition's device; `shape` is (C, T, H, W) of one sample.

        `condition` is text [B, L, Ct] with its `mask` [B, L], or labels [B]; `null_condition` is a single sample's.
        Sample i draws from `generators[i]` alone.
        """

        def next_noise() -> Tensor:
            return draw_noise(shape, generators, condition.device)

        flow = self.objective.objective == "flow"
        # What stands between may keep tensors that training goes on with, which inference mode would spoil.
        with torch.inference_mode() if self.prepare_text is not None else torch.no_grad():
            model_fn = guided_model(
                model,
                condition,
                mask,
                null_condition,
                guidance=self.guidance,
                num_guided=NUM_GUIDED_CHANNELS if not flow and self.name in ("iddpm", "ddim") else None,
                prepare_text=self.prepare_text,
            )
            noise = next_noise()
            with self.call_context(model_fn) as model_fn:
                if flow:
                    tokens, frames = count_tokens(shape, self.patch_size), count_frames(shape, self.patch_size)
                    times = build_flow(self.objective).sampling_times(self.steps, tokens, frames)
                    follow = ab2_sample if self.name == "ab2" else euler_sample
                    return follow(model_fn, noise, times, self.progress)
                if self.name == "dpm":
                    schedule = ContinuousSchedule(linear_betas())
                    return dpm_solver_sample(model_fn, noise, schedule, self.steps, self.progress)
                diffusion = GaussianDiffusion.spaced(self.steps)
                if self.name == "ddim":
                    return ddim_sample(diffusion, model_fn, noise, progress=self.progress)
                return iddpm_sample(diffusion, model_fn, noise, next_noise, progress=self.progress)
