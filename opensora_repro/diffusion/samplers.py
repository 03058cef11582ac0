"""From noise to latents: classifier-free guidance and the samplers of both objectives.

With frames that are given (`GivenFrames`) the loops are those of Open-Sora 1.1 (IDDPM) and 1.2 (flow), but what is to
be kept is kept: 1.1 lets the last step alter it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.diffusion.dpm_solver import ContinuousSchedule, dpm_solver_sample
from opensora_repro.diffusion.flow import NUM_TIMESTEPS, ModelFn, RectifiedFlow, Size, build_flow
from opensora_repro.diffusion.frame_masks import GivenFrames, per_frame
from opensora_repro.diffusion.gaussian import GaussianDiffusion, linear_betas
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.layers import count_frames, count_tokens

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig

IDDPM_SAMPLERS = ("iddpm", "ddim", "dpm")
FLOW_SAMPLERS = ("euler", "ab2", "heun")
NUM_GUIDED_CHANNELS = 3  # published models guide the first three noise channels under IDDPM (inherited from DiT)
EVERYWHERE = (0.0, 1.0)  # all noise levels

NextNoise = Callable[[], Tensor]  # as much as the first, from the samples' own generators
Progress = Callable[[int, int], None]  # (steps done, steps in all)
Watch = Callable[[int, Tensor], None]  # (steps done, what the clean latents [B, C, T, H, W] would be by now)
# (text, mask, null=the null caption or None) -> what the model takes in place of both; the null half follows the text
PrepareText = Callable[..., Any]
# The guided model -> what samples with it call in its place within the context
CallContext = Callable[[ModelFn], AbstractContextManager[ModelFn]]


def num_calls(sampler: str, steps: int) -> int:
    """How often a sampler of that name calls the model."""
    return 2 * steps - 1 if sampler == "heun" else steps


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
    conditions: Mapping[str, Tensor] | None = None,
    null_mask: Tensor | None = None,
) -> ModelFn:
    """Classifier-free guidance (Ho & Salimans 2022) in one forward of [conditional; null].

    The condition is text [B, L, Ct] or labels [B]; the null condition is one sample's, [L, Ct] or []. The null caption
    is cut by each prompt's own mask [B, L], as in the published model; with `null_mask` [L] it is a text, a negative
    prompt, whose own tokens are read, as diffusers' pipelines do. The output's first `num_guided` channels (None:
    all) are guided; the others are the conditional half's. A guidance of 1 needs no null half.
    With the model's `prepare_text` what it makes of the text alone is computed here, once, and both halves share their
    latents. `conditions`: what else the model is told, [B] each. The guided model takes a frame mask [B, T] third,
    where frames are given.
    """
    told = dict(conditions or {})

    def given(frame_mask: Tensor | None) -> dict[str, Tensor]:
        return told if frame_mask is None else told | {"frame_mask": frame_mask}

    if guidance == 1:
        if prepare_text is not None:
            condition, mask = prepare_text(condition, mask, null=None), None
        return lambda x, timestep, frame_mask=None: model(x, timestep, condition, mask, **given(frame_mask))
    if prepare_text is not None:
        prepared = prepare_text(condition, mask, null=null_condition, null_mask=null_mask)

        def both_halves(x: Tensor, timestep: Tensor, frame_mask: Tensor | None) -> Tensor:
            return model(x, timestep, prepared, **given(frame_mask))

    else:
        both = torch.cat([condition, null_condition.to(condition).expand_as(condition)])
        both_mask = None
        if mask is not None:
            both_mask = torch.cat([mask, mask if null_mask is None else null_mask.expand_as(mask)])
        told = {name: torch.cat([value, value]) for name, value in told.items()}

        def both_halves(x: Tensor, timestep: Tensor, frame_mask: Tensor | None) -> Tensor:
            frame_mask = None if frame_mask is None else torch.cat([frame_mask, frame_mask])
            return model(torch.cat([x, x]), torch.cat([timestep, timestep]), both, both_mask, **given(frame_mask))

    def guided(x: Tensor, timestep: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        cond, null = both_halves(x, timestep, frame_mask).chunk(2)  # each [B, C_out, T, H, W]
        mixed = null + guidance * (cond - null)
        return mixed if num_guided is None else torch.cat([mixed[:, :num_guided], cond[:, num_guided:]], dim=1)

    return guided


def guided_within(
    interval: tuple[float, float], levels: Iterable[float], guided: ModelFn, conditional: ModelFn
) -> ModelFn:
    """`guided` in calls whose noise level, of `levels` in turn, lies in the interval, else `conditional`."""
    (low, high), coming = interval, iter(levels)

    def model_fn(*inputs: Tensor) -> Tensor:
        return guided(*inputs) if low <= next(coming) <= high else conditional(*inputs)

    return model_fn


def euler_sample(
    model_fn: ModelFn, x: Tensor, times: Tensor, progress: Progress | None = None, watch: Watch | None = None
) -> Tensor:
    """Follow the velocity from times[0] = 1 (noise) to times[-1] = 0 (data) by Euler steps; x is [B, C, T, H, W]."""
    grid, num_channels = times.tolist(), x.shape[1]
    for i, (now, after) in enumerate(pairwise(grid)):
        timestep = torch.full((len(x),), NUM_TIMESTEPS * now, device=x.device)
        velocity = model_fn(x, timestep)[:, :num_channels]
        if watch is not None:
            watch(i + 1, x - now * velocity)
        x = x + (after - now) * velocity
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


def ab2_sample(
    model_fn: ModelFn, x: Tensor, times: Tensor, progress: Progress | None = None, watch: Watch | None = None
) -> Tensor:
    """As `euler_sample`, but to second order: each velocity is carried on as it changed since the one before.

    Adams and Bashforth's two-step method for steps of any sizes; a step calls the model once, as one of Euler's does.
    """
    grid, num_channels = times.tolist(), x.shape[1]
    before, step_before = torch.zeros_like(x), math.inf  # the first step is Euler's
    for i, (now, after) in enumerate(pairwise(grid)):
        timestep = torch.full((len(x),), NUM_TIMESTEPS * now, device=x.device)
        velocity, step = model_fn(x, timestep)[:, :num_channels], after - now
        if watch is not None:
            watch(i + 1, x - now * velocity)
        x = x + step * (velocity + step / (2 * step_before) * (velocity - before))
        before, step_before = velocity, step
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


def heun_sample(
    model_fn: ModelFn, x: Tensor, times: Tensor, progress: Progress | None = None, watch: Watch | None = None
) -> Tensor:
    """As `euler_sample`, but to second order: along the mean of the velocities at both ends of each step.

    Heun's method as Karras et al. have it (2022, arXiv:2206.00364): the last step is Euler's, all others call the model
    twice.
    """
    grid, num_channels = times.tolist(), x.shape[1]

    def velocity_at(x: Tensor, time: float) -> Tensor:
        return model_fn(x, torch.full((len(x),), NUM_TIMESTEPS * time, device=x.device))[:, :num_channels]

    for i, (now, after) in enumerate(pairwise(grid)):
        velocity = velocity_at(x, now)
        if watch is not None:
            watch(i + 1, x - now * velocity)
        if after > 0:
            velocity = (velocity + velocity_at(x + (after - now) * velocity, after)) / 2
        x = x + (after - now) * velocity
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


FOLLOW = {"euler": euler_sample, "ab2": ab2_sample, "heun": heun_sample}


def masked_flow_sample(
    model_fn: ModelFn,
    x: Tensor,
    times: Tensor,
    given: GivenFrames,
    next_noise: NextNoise,
    *,
    name: str = "euler",
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """As `euler_sample` (`name`: "ab2" as `ab2_sample`, "heun" as `heun_sample`) where frames are given.

    A frame of edit ratio w below 1 stays as it is while t > w; then it is noised to t, and moves from there on.
    x and every `next_noise()`, one a step, are [B, C, T, H, W].
    """
    grid, num_channels = times.tolist(), x.shape[1]
    x, moving = given.into(x), given.moving(1.0, x.device)  # [B, T]
    before, step_before = torch.zeros_like(x), math.inf
    for i, (now, after) in enumerate(pairwise(grid)):
        frame_mask, noise = given.moving(now, x.device), next_noise()
        joining, moving = per_frame(frame_mask & ~moving), frame_mask
        x = torch.where(joining, (1 - now) * x + now * noise, x)
        timestep = torch.full((len(x),), NUM_TIMESTEPS * now, device=x.device)
        velocity, step = model_fn(x, timestep, frame_mask)[:, :num_channels], after - now
        if watch is not None:
            watch(i + 1, torch.where(per_frame(frame_mask), x - now * velocity, x))
        change = velocity
        if name == "ab2" and math.isfinite(step_before):  # a frame's first step is Euler's
            change = velocity + step / (2 * step_before) * torch.where(joining, 0.0, velocity - before)
        elif name == "heun" and after > 0:
            predicted = torch.where(per_frame(frame_mask), x + step * velocity, x)
            timestep = torch.full((len(x),), NUM_TIMESTEPS * after, device=x.device)
            change = (velocity + model_fn(predicted, timestep, frame_mask)[:, :num_channels]) / 2
        x = torch.where(per_frame(frame_mask), x + step * change, x)
        before, step_before = velocity, step
        if progress is not None:
            progress(i + 1, len(grid) - 1)
    return x


def iddpm_sample(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Tensor,
    next_noise: NextNoise,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Ancestral sampling over all steps of `diffusion`; x and every `next_noise()` are [B, C, T, H, W]."""
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        x, x_0 = diffusion.p_sample(model_fn, x, t, next_noise())
        if watch is not None:
            watch(diffusion.num_steps - i, x_0)
        if progress is not None:
            progress(diffusion.num_steps - i, diffusion.num_steps)
    return x


def ddim_sample(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Tensor,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Deterministic DDIM sampling (eta 0) over all steps of `diffusion`; x is [B, C, T, H, W]."""
    for i in reversed(range(diffusion.num_steps)):
        x, x_0 = diffusion.ddim_sample(model_fn, x, torch.full((len(x),), i, device=x.device))
        if watch is not None:
            watch(diffusion.num_steps - i, x_0)
        if progress is not None:
            progress(diffusion.num_steps - i, diffusion.num_steps)
    return x


def masked_iddpm_sample(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Tensor,
    given: GivenFrames,
    next_noise: NextNoise,
    *,
    deterministic: bool = False,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """As `iddpm_sample` (`deterministic`: `ddim_sample`) where frames are given.

    A frame of edit ratio w stays as it is until the step int(w * steps), counted down; there it is noised to that step,
    and moves from there on. Frames whose ratio comes to step 0 are kept: the model sees them noised in the last step,
    as in training. Draws two noises a step, for the frames that join and for the step, or with DDIM one.
    """
    joins = (given.ratios.to(x.device) * diffusion.num_steps).int()  # [B, T]
    x = given.into(x)
    for i in reversed(range(diffusion.num_steps)):
        t = torch.full((len(x),), i, device=x.device)
        seen = torch.where(per_frame(joins == i), diffusion.q_sample(x, t, next_noise()), x)
        if deterministic:
            moved, x_0 = diffusion.ddim_sample(model_fn, seen, t, joins > i)
        else:
            moved, x_0 = diffusion.p_sample(model_fn, seen, t, next_noise(), joins > i)
        if watch is not None:
            watch(diffusion.num_steps - i, torch.where(per_frame(joins >= max(i, 1)), x_0, x))
        x = torch.where(per_frame(joins >= max(i, 1)), moved, x)
        if progress is not None:
            progress(diffusion.num_steps - i, diffusion.num_steps)
    return x


def inpainting(model_fn: ModelFn, given: GivenFrames, noise: Tensor, *, flow: bool) -> ModelFn:
    """`model_fn` that sees what lies outside of `given.region` as it is, at the noise level of each step.

    As RePaint has it (arXiv:2201.09865), without its steps back. What the sampler makes there is nobody's.
    """
    assert given.region is not None
    region, latents = given.region.to(noise.device), given.latents.to(noise)
    log_alphas = torch.from_numpy(0.5 * np.cumsum(np.log(1 - linear_betas()))).float().to(noise.device)

    def signal_and_spread(timestep: Tensor) -> tuple[Tensor, Tensor]:
        if flow:
            return 1 - timestep / NUM_TIMESTEPS, timestep / NUM_TIMESTEPS
        low = timestep.floor().long().clamp(0, len(log_alphas) - 1)
        high = (low + 1).clamp(max=len(log_alphas) - 1)
        log_alpha = torch.lerp(log_alphas[low], log_alphas[high], (timestep - low).to(log_alphas))
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def seen(x: Tensor, timestep: Tensor, *masks: Tensor) -> Tensor:
        signal, spread = (rearrange(value, "b -> b 1 1 1 1") for value in signal_and_spread(timestep))
        outside = ~region & per_frame(masks[0]) if masks else ~region  # kept frames are kept clean
        return model_fn(torch.where(outside, signal * latents + spread * noise, x), timestep, *masks)

    return seen


@dataclass(frozen=True)
class LatentSampler:
    """From noise to latents of a trained model.

    Guidance acts at noise levels, 0 to 1, within `guidance_interval` (Kynkaanniemi et al. 2024, arXiv:2404.07724); at
    others the conditional half alone is computed. An IDDPM timestep's level is its thousandth.
    `name` chooses among IDDPM's samplers or the flow's, where names of neither are Euler's. Latents of patches of
    `patch_size` are tokens, whose number sets the flow's shift. `prepare_text` is the model's own, see `guided_model`;
    without it the model is called as in training, whatever stands between. The guided model is called within its
    `call_context`, which ends with the sampling, alike at every step. `null_mask` [L]: where the null condition is a
    negative prompt, see `guided_model`. `watch` is called in every step, once the model was, with the clean latents as
    they are foreseen then; whatever it or `progress` raises ends the sampling.
    """

    objective: DiffusionConfig
    name: str
    steps: int
    guidance: float
    guidance_interval: tuple[float, float] = EVERYWHERE
    patch_size: Sequence[int] = (1, 2, 2)
    prepare_text: PrepareText | None = None
    call_context: CallContext = nullcontext
    progress: Progress | None = None
    null_mask: Tensor | None = None
    watch: Watch | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampling needs at least one step, got {self.steps}")
        if self.objective.objective != "flow" and self.name not in IDDPM_SAMPLERS:
            expected = ", ".join(IDDPM_SAMPLERS)
            raise ValueError(f"sampler {self.name!r} does not fit an IDDPM model; choose from {expected}")

    def levels(self, tokens: int, frames: int, *, size: Size | None) -> list[float]:
        """The noise level, 0 to 1, of each call of the model in turn."""
        if self.objective.objective == "flow":
            times = build_flow(self.objective).sampling_times(self.steps, tokens, frames, size=size).tolist()[:-1]
            return [times[0], *(t for t in times[1:] for _ in range(2))] if self.name == "heun" else times
        if self.name == "dpm":
            schedule = ContinuousSchedule(linear_betas())
            return [schedule.model_timestep(t) / NUM_TIMESTEPS for t in schedule.sampling_times(self.steps)[:-1]]
        return [t / NUM_TIMESTEPS for t in reversed(GaussianDiffusion.spaced(self.steps).timestep_map)]

    def __call__(
        self,
        model: Callable[..., Tensor],
        condition: Tensor,
        mask: Tensor | None,
        null_condition: Tensor,
        *,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        size: Size | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        given: GivenFrames | None = None,
    ) -> Tensor:
        """Return float32 latents [B, *shape] on the condition's device; `shape` is (C, T, H, W) of one sample.

        `condition` is text [B, L, Ct] with its `mask` [B, L], or labels [B]; `null_condition` is a single sample's.
        Sample i draws from `generators[i]` alone. `size`: frames, height and width in pixels, which the flow of
        Open-Sora 1.2 needs. `conditions`: what else the model is told of each sample, [B] each. `given`: frames to
        start from.
        """

        def outside_as_given(x: Tensor) -> Tensor:
            if given is None or given.region is None:
                return x
            return torch.where(given.region.to(x.device), x, given.latents.to(x))

        watch = self.watch
        found = self._sample(
            model, condition, mask, null_condition, shape=shape, generators=generators, size=size,
            conditions=conditions, given=given,
            watch=None if watch is None else lambda done, x_0: watch(done, outside_as_given(x_0)),
        )  # fmt: skip
        return outside_as_given(found)

    def _sample(
        self,
        model: Callable[..., Tensor],
        condition: Tensor,
        mask: Tensor | None,
        null_condition: Tensor,
        *,
        shape: Sequence[int],
        generators: Sequence[torch.Generator],
        size: Size | None,
        conditions: Mapping[str, Tensor] | None,
        given: GivenFrames | None,
        watch: Watch | None,
    ) -> Tensor:
        def next_noise() -> Tensor:
            return draw_noise(shape, generators, condition.device)

        flow = self.objective.objective == "flow"
        tokens, frames = count_tokens(shape, self.patch_size), count_frames(shape, self.patch_size)

        def guided(guidance: float) -> ModelFn:
            return guided_model(
                model,
                condition,
                mask,
                null_condition,
                guidance=guidance,
                num_guided=NUM_GUIDED_CHANNELS if not flow and self.name in ("iddpm", "ddim") else None,
                prepare_text=self.prepare_text,
                conditions=conditions,
                null_mask=self.null_mask,
            )

        # What stands between may keep tensors that training goes on with, which inference mode would spoil.
        with torch.inference_mode() if self.prepare_text is not None else torch.no_grad(), ExitStack() as stack:
            model_fn = stack.enter_context(self.call_context(guided(self.guidance)))
            if self.guidance != 1 and self.guidance_interval != EVERYWHERE:
                conditional = stack.enter_context(self.call_context(guided(1.0)))
                levels = self.levels(tokens, frames, size=size)
                model_fn = guided_within(self.guidance_interval, levels, model_fn, conditional)
            noise = next_noise()
            if given is not None and given.region is not None:
                model_fn = inpainting(model_fn, given, noise, flow=flow)
            if not flow:
                return self._denoise(model_fn, noise, next_noise, given, watch)
            path = build_flow(self.objective)
            times = path.sampling_times(self.steps, tokens, frames, size=size)
            return self._follow(path, times, model_fn, noise, next_noise, given, watch)

    def _follow(
        self, path: RectifiedFlow, times: Tensor, model_fn: ModelFn, noise: Tensor, next_noise: NextNoise,
        given: GivenFrames | None, watch: Watch | None,
    ) -> Tensor:  # fmt: skip
        """The flow from noise to data."""

        def velocity_fn(x: Tensor, timestep: Tensor, *masks: Tensor) -> Tensor:
            return path.velocity(model_fn(x, timestep, *masks), noise.shape[1])

        if given is not None:
            return masked_flow_sample(
                velocity_fn, noise, times, given, next_noise, name=self.name, progress=self.progress, watch=watch
            )
        follow = FOLLOW.get(self.name, euler_sample)
        return follow(velocity_fn, noise, times, self.progress, watch)

    def _denoise(
        self, model_fn: ModelFn, noise: Tensor, next_noise: NextNoise, given: GivenFrames | None, watch: Watch | None
    ) -> Tensor:
        """By the samplers of IDDPM's schedule."""
        if self.name == "dpm":
            schedule = ContinuousSchedule(linear_betas())
            return dpm_solver_sample(
                model_fn, noise, schedule, self.steps,
                given=given, next_noise=next_noise, progress=self.progress, watch=watch,
            )  # fmt: skip
        diffusion = GaussianDiffusion.spaced(self.steps)
        if given is not None:
            return masked_iddpm_sample(
                diffusion, model_fn, noise, given, next_noise,
                deterministic=self.name == "ddim", progress=self.progress, watch=watch,
            )  # fmt: skip
        if self.name == "ddim":
            return ddim_sample(diffusion, model_fn, noise, progress=self.progress, watch=watch)
        return iddpm_sample(diffusion, model_fn, noise, next_noise, progress=self.progress, watch=watch)
