"""Rectified flow against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.config import DiffusionConfig
from opensora_repro.diffusion.flow import (
    MAX_SHIFT,
    REFERENCE_TOKENS,
    RectifiedFlow,
    resolution_shift,
    shift_time,
)
from opensora_repro.diffusion.gaussian import GaussianDiffusion, build_objective
from opensora_repro.diffusion.samplers import ab2_sample, euler_sample, heun_sample
from opensora_repro.models.layers import count_tokens


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_paths_are_straight_lines_from_data_to_noise() -> None:
    latents, noise = torch.randn(5, 4, 2, 3, 3), torch.randn(5, 4, 2, 3, 3)
    timesteps = torch.tensor([0.0, 250.0, 500.0, 900.0, 1000.0])
    seen = {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen["x"], seen["t"] = x, t
        return torch.zeros_like(x)

    losses = RectifiedFlow().losses(model, latents, noise, timesteps)
    assert torch.equal(seen["x"][0], latents[0])
    assert torch.equal(seen["x"][4], noise[4])
    torch.testing.assert_close(seen["x"][1], 0.75 * latents[1] + 0.25 * noise[1])
    assert torch.equal(seen["t"], timesteps)  # float32 and unrounded
    torch.testing.assert_close(losses, (noise - latents).square().flatten(1).mean(1))


def test_the_true_velocity_has_no_loss_and_the_variance_is_ignored() -> None:
    latents, noise = torch.randn(3, 4, 2, 3, 3), torch.randn(3, 4, 2, 3, 3)
    flow, timesteps = RectifiedFlow(), torch.tensor([10.0, 400.0, 990.0])
    losses = flow.losses(lambda x, t: torch.cat([noise - latents, x], 1), latents, noise, timesteps)
    assert losses.shape == (3,)
    assert losses.max() == 0
    doubled = flow.losses(lambda x, t: noise - latents + 2, latents, noise, timesteps)
    torch.testing.assert_close(doubled, torch.full((3,), 4.0))


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.5, 0.8, 3.0), (-0.4, 1.3, 0.5)])
def test_timesteps_are_logit_normal_then_shifted(mean: float, std: float, shift: float) -> None:
    flow = RectifiedFlow(logit_mean=mean, logit_std=std, shift=shift)
    draws = flow.draw_timesteps(generators(20_000), num_tokens=1).sort().values.double() / 1000
    assert draws.dtype == torch.float64 and draws.min() > 0 and draws.max() < 1
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        # In logit space the shift is an added log(shift), so a quantile has a closed form.
        logit = mean + std * NormalDist().inv_cdf(share) + math.log(shift)
        expected = NormalDist().cdf((logit - mean - math.log(shift)) / std)
        below = (draws < 1 / (1 + math.exp(-logit))).double().mean().item()
        assert below == pytest.approx(expected, abs=0.015), share


def test_shift_formula() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.3, 1.0, 3.0, 12.0):
        shifted = shift_time(t, shift)
        assert shifted[0] == 0 and shifted[-1] == 1
        assert (shifted.diff() > 0).all()
        torch.testing.assert_close(
            shifted[1:-1].logit(), t[1:-1].logit() + math.log(shift)
        )  # signal-to-noise / shift^2
        torch.testing.assert_close(shift_time(shifted, 1 / shift), t)
    assert torch.equal(shift_time(t, 1.0), t)
    assert (shift_time(t, 3.0)[1:-1] > t[1:-1]).all()


def test_shift_follows_the_number_of_tokens_unless_fixed() -> None:
    assert resolution_shift(REFERENCE_TOKENS) == 1
    assert resolution_shift(16 * REFERENCE_TOKENS) == 4
    assert RectifiedFlow().shift_for(4 * REFERENCE_TOKENS) == 2
    assert RectifiedFlow(shift=3.0).shift_for(4 * REFERENCE_TOKENS) == 3
    few, many = (RectifiedFlow().draw_timesteps(generators(200), n).mean() for n in (64, 4096))
    assert many > few + 100


def test_frames_count_less_than_pixels_and_the_shift_has_an_end() -> None:
    flow = RectifiedFlow()
    assert flow.shift_for(16 * 256, 16) == 2  # 16 frames of 256 pixels as one of 512
    assert flow.shift_for(64 * 1024, 64) == pytest.approx(2 * 64**0.25)
    assert flow.shift_for(360 * 1024, 360) == flow.shift_for(10**6) == MAX_SHIFT
    assert RectifiedFlow(shift=16.0).shift_for(64 * 1024, 64) == 16  # a wish is kept
    shifts = [flow.shift_for(frames * 256, frames) for frames in range(1, 200)]
    assert shifts == sorted(shifts)
    draws = flow.draw_timesteps(generators(5000), 64 * 1024, 64)
    assert (draws < 500).double().mean() > 0.03  # also what is nearly clean is trained
    ends = flow.sampling_times(50, 360 * 1024, 360)
    assert (ends < 0.5).sum() >= 7


def test_tokens_are_counted_with_padding() -> None:
    assert count_tokens((4, 16, 32, 32), (1, 2, 2)) == 4096
    assert count_tokens((4, 1, 9, 7), (1, 2, 2)) == 20
    assert count_tokens((4, 5, 8, 8), (2, 2, 2)) == 48


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_a_draw_belongs_to_its_sample(objective: str) -> None:
    chosen = build_objective(DiffusionConfig(objective=objective))
    together = chosen.draw_timesteps(generators(6), 100)
    alone = torch.cat([chosen.draw_timesteps(generators(1, i), 100) for i in reversed(range(6))]).flip(0)
    assert together.dtype == torch.float32
    assert torch.equal(together, alone)
    assert len(together.unique()) == 6
    assert together.min() >= 0 and together.max() <= 1000


def test_iddpm_draws_every_step_alike() -> None:
    draws = GaussianDiffusion().draw_timesteps(generators(20_000), 100)
    assert torch.equal(draws, draws.round())
    assert draws.min() == 0 and draws.max() == 999
    counts = torch.histc(draws, bins=10, min=0, max=999)
    assert (counts / 2000 - 1).abs().max() < 0.08


def test_fixed_timesteps() -> None:
    assert build_objective(DiffusionConfig(objective="flow")).fixed_timesteps([0, 0.1, 1]) == [0, 100, 1000]
    assert build_objective(DiffusionConfig(objective="iddpm")).fixed_timesteps([0, 0.1, 1]) == [0, 100, 999]


def test_unknown_objective_is_named() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.objective='ddpm' is unknown"):
        build_objective(DiffusionConfig(objective="ddpm"))


@pytest.mark.parametrize("follow", [euler_sample, ab2_sample, heun_sample])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_point_target_is_reached_in_any_number_of_steps(steps: int, follow: Callable[..., Tensor]) -> None:
    """With one data point every path is straight, so steps of any size are exact."""
    target, noise = torch.randn(4, 2, 3, 3), torch.randn(2, 4, 2, 3, 3)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - target) / rearrange(t / 1000, "b -> b 1 1 1 1")

    times = RectifiedFlow(shift=3.0).sampling_times(steps, 1)
    assert times.shape == (steps + 1,) and times[0] == 1 and times[-1] == 0
    torch.testing.assert_close(follow(velocity, noise, times), target.expand_as(noise), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("follow", "left"), [(euler_sample, 0.6), (ab2_sample, 0.3), (heun_sample, 0.3)])
def test_a_gaussian_target_is_reached_to_the_order(follow: Callable[..., Tensor], left: float) -> None:
    """Data N(m, s^2): the exact flow maps noise n to m + s n; half the step leaves half the error, or a quarter."""
    m, s = 0.7, 0.3
    noise = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = rearrange(t.double() / 1000, "b -> b 1 1 1 1")
        spread = (1 - t) ** 2 * s**2 + t**2  # variance of x_t
        return -m + (x - (1 - t) * m) * (t - (1 - t) * s**2) / spread

    errors = [
        (follow(velocity, noise, RectifiedFlow(shift=1.0).sampling_times(n, 1)) - (m + s * noise)).abs().max()
        for n in (20, 40, 80, 160)
    ]
    assert errors[0] < 0.3
    for coarse, fine in pairwise(errors):
        assert fine < left * coarse
