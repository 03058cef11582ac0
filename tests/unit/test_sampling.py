"""Guidance and samplers with networks whose right answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.config import DiffusionConfig
from opensora_repro.diffusion.dpm_solver import ContinuousSchedule, dpm_solver_sample
from opensora_repro.diffusion.flow import ModelFn
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.diffusion.gaussian import GaussianDiffusion, linear_betas
from opensora_repro.diffusion.samplers import (
    LatentSampler,
    Watch,
    ddim_sample,
    draw_noise,
    guided_model,
    iddpm_sample,
)
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT

SHAPE = (4, 2, 4, 4)
ALPHAS_CUMPROD = torch.from_numpy(GaussianDiffusion().tables["alphas_cumprod"])


def generators(indices: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in indices]


class PointModel:
    """The perfect network for one data point a caption: `text[:, 0]` holds the point's value in every place."""

    def __init__(self, objective: str) -> None:
        self.objective = objective
        self.batches: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        self.batches.append(len(x))
        point = rearrange(text[:, 0, 0], "b -> b 1 1 1 1").expand_as(x)
        if self.objective == "flow":
            return (x - point) / rearrange(t / 1000, "b -> b 1 1 1 1")
        signal = rearrange(ALPHAS_CUMPROD[t.round().long()].float(), "b -> b 1 1 1 1")
        noise = (x - signal.sqrt() * point) / (1 - signal).sqrt()
        return torch.cat([noise, -torch.ones_like(x)], dim=1)


def sample(
    model: Callable[..., Tensor],
    indices: list[int],
    *,
    objective: str,
    sampler: str,
    guidance: float = 1.0,
    steps: int = 20,
    **more: Any,
) -> Tensor:
    text = rearrange(torch.tensor([0.1 * (i + 1) for i in indices]), "b -> b 1 1").repeat(1, 5, 3)
    return LatentSampler(DiffusionConfig(objective=objective), sampler, steps=steps, guidance=guidance, **more)(
        model,
        text,
        torch.ones(len(indices), 5, dtype=torch.bool),
        torch.zeros(5, 3),
        shape=SHAPE,
        generators=generators(indices),
    )


ALL = [("flow", "euler"), ("flow", "ab2"), ("flow", "heun"), ("iddpm", "iddpm"), ("iddpm", "ddim"), ("iddpm", "dpm")]


@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_every_sampler_finds_the_captions_point(objective: str, sampler: str) -> None:
    latents = sample(PointModel(objective), [0, 4, 8], objective=objective, sampler=sampler, steps=25)
    expected = torch.tensor([0.1, 0.5, 0.9])
    assert latents.shape == (3, *SHAPE)
    assert latents.dtype == torch.float32
    # The last discrete step leaves a little noise; DPM-Solver++ stops at t = 1/1000.
    torch.testing.assert_close(latents.mean((1, 2, 3, 4)), expected, rtol=0, atol=5e-3)
    assert latents.std((1, 2, 3, 4)).max() < 0.03


class WavyModel(PointModel):
    """A network with no closed answer, so that every sample's own noise shows."""

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        self.batches.append(len(x))
        t = rearrange(t, "b -> b 1 1 1 1")
        y = rearrange(text.mean((1, 2)), "b -> b 1 1 1 1")
        out = 0.7 * x + 0.1 * torch.sin(3 * x) + 0.05 * torch.cos(0.01 * t) + y
        return torch.cat([out, 0.5 * torch.tanh(x)], dim=1)


@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_batch_composition_does_not_matter(objective: str, sampler: str) -> None:
    args = {"objective": objective, "sampler": sampler, "guidance": 4.0}
    together = sample(WavyModel(objective), [0, 1, 2, 3], **args)
    apart = torch.cat([sample(WavyModel(objective), part, **args) for part in ([3], [0, 2], [1])])
    torch.testing.assert_close(together[[3, 0, 2, 1]], apart, rtol=1e-6, atol=1e-6)
    again = sample(WavyModel(objective), [0, 1, 2, 3], **args)
    assert torch.equal(together, again)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_guidance_of_one_is_the_conditional_model_at_half_the_work(objective: str, sampler: str) -> None:
    plain, doubled = WavyModel(objective), WavyModel(objective)
    expected = sample(plain, [0, 1], objective=objective, sampler=sampler, guidance=1.0)
    almost = sample(doubled, [0, 1], objective=objective, sampler=sampler, guidance=1.0 + 1e-6)
    torch.testing.assert_close(expected, almost, rtol=1e-3, atol=1e-3)
    assert set(plain.batches) == {2}
    assert set(doubled.batches) == {4}


@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_outside_of_its_interval_guidance_costs_nothing(objective: str, sampler: str) -> None:
    seen: list[tuple[float, int]] = []

    class Watched(WavyModel):
        def __call__(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
            seen.append((t[0].item() / 1000, len(x)))
            return super().__call__(x, t, text, mask)

    args: dict[str, Any] = {"objective": objective, "sampler": sampler, "guidance": 4.0, "steps": 10}
    limited = sample(Watched(objective), [0, 1], **args, guidance_interval=(0.2, 0.8))
    assert len(seen) == (19 if sampler == "heun" else 10)
    assert {rows for level, rows in seen if 0.2 <= level <= 0.8} == {4}
    assert {rows for level, rows in seen if not 0.2 <= level <= 0.8} == {2}
    everywhere = sample(WavyModel(objective), [0, 1], **args, guidance_interval=(0.0, 0.9999))
    if objective == "iddpm":
        assert torch.equal(everywhere, sample(WavyModel(objective), [0, 1], **args))
    nowhere = sample(WavyModel(objective), [0, 1], **args, guidance_interval=(0.0001, 0.0002))
    unguided = sample(WavyModel(objective), [0, 1], **args | {"guidance": 1.0})
    assert torch.equal(nowhere, unguided)
    assert not torch.allclose(limited, everywhere, atol=1e-3) and not torch.allclose(limited, unguided, atol=1e-3)


@pytest.mark.parametrize("num_guided", [None, 3])
def test_guidance_formula(num_guided: int | None) -> None:
    text, null = torch.randn(2, 5, 3), torch.randn(5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    seen = {}

    def model(x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        seen.update(x=x, t=t, text=text, mask=mask)
        y = rearrange((text * mask[..., None]).sum((1, 2)), "b -> b 1 1 1 1")
        return torch.cat([x + y, x - y], dim=1)

    x, t = torch.randn(2, *SHAPE), torch.tensor([30.0, 70.5])
    out = guided_model(model, text, mask, null, guidance=3.0, num_guided=num_guided)(x, t)
    cond = model(x, t, text, mask)
    uncond = model(x, t, torch.stack([null, null]), mask)  # the null caption under each prompt's own mask
    expected = uncond + 3 * (cond - uncond)
    if num_guided is not None:
        expected[:, num_guided:] = cond[:, num_guided:]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("shift", "size", "expected"), [(3.0, 8, 3.0), (0.0, 64, 2.0), (0.0, 16, 0.5)])
def test_the_flow_sampler_walks_the_shifted_times(shift: float, size: int, expected: float) -> None:
    seen: list[float] = []

    def model(x: Tensor, t: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        assert (t == t[0]).all()
        seen.append(t[0].item())
        return torch.zeros_like(x)

    LatentSampler(DiffusionConfig(objective="flow", shift=shift), "euler", steps=4, guidance=2.0)(
        model, torch.zeros(2, 5, 3), None, torch.zeros(5, 3), shape=(4, 1, size, size), generators=generators([0, 1])
    )
    assert seen == pytest.approx([1000 * expected * t / (1 + (expected - 1) * t) for t in (1, 0.75, 0.5, 0.25)])


@pytest.mark.parametrize("name", ["flow-euler", "flow-ab2", "flow-heun", "iddpm-iddpm", "iddpm-ddim", "iddpm-dpm"])
def test_outside_of_a_region_the_model_sees_what_is_given_at_each_noise_level(name: str) -> None:
    objective, sampler = name.split("-")
    region = torch.zeros(1, 1, 1, *SHAPE[2:], dtype=torch.bool)
    region[..., :2] = True
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    ratios = torch.ones(1, SHAPE[1])
    ratios[:, 0] = 0  # a kept frame, which enters as it is
    noises: list[Tensor] = []
    schedule, inner = ContinuousSchedule(linear_betas()), PointModel(objective)

    def model(x: Tensor, t: Tensor, text: Tensor, mask: Tensor, frame_mask: Tensor) -> Tensor:
        level = t[0].item() / 1000
        continuous = level + 1 / schedule.num_steps
        signal, spread = math.exp(schedule.log_alpha(continuous)), schedule.sigma(continuous)
        if objective == "flow":
            signal, spread = 1 - level, level
        outside = (~region).expand(1, SHAPE[0], 1, -1, -1)
        noises.append(((x[:1] - signal * latents) / spread)[:, :, 1:][outside])
        return inner(x, t, text, mask)

    found = LatentSampler(DiffusionConfig(objective=objective), sampler, steps=6, guidance=2.0)(
        model, torch.full((1, 5, 3), 0.5), torch.ones(1, 5, dtype=torch.bool), torch.zeros(5, 3),
        shape=SHAPE, generators=generators([0]), given=GivenFrames(latents, ratios, region),
    )  # fmt: skip
    assert len(noises) == (11 if sampler == "heun" else 6) and 0.6 < noises[0].std() < 1.4
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=2e-3)
    outside = (~region).expand_as(found)
    assert torch.equal(found[outside], latents[outside]) and torch.equal(found[:, :, 0], latents[:, :, 0])
    assert not torch.isclose(found, latents)[:, :, 1:][region.expand_as(found)[:, :, 1:]].any()


def test_progress_counts_every_step() -> None:
    for objective, sampler in ALL:
        calls: list[tuple[int, int]] = []
        sample(PointModel(objective), [0], objective=objective, sampler=sampler, steps=6,
               progress=lambda done, total, calls=calls: calls.append((done, total)))  # fmt: skip
        assert calls == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("frames_given", [False, True])
@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_each_step_shows_the_clean_latents_as_they_are_foreseen(
    objective: str, sampler: str, frames_given: bool
) -> None:
    inner = PointModel(objective)
    latents = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))
    ratios = torch.ones(1, SHAPE[1])
    ratios[:, 0] = 0
    region = torch.ones(1, 1, 1, *SHAPE[2:], dtype=torch.bool)
    region[..., :2] = False
    seen: list[tuple[int, Tensor]] = []

    def follow(watch: Watch | None) -> Tensor:
        return LatentSampler(
            DiffusionConfig(objective=objective), sampler, steps=5, guidance=2.0, watch=watch
        )(
            lambda x, t, text, mask, frame_mask=None: inner(x, t, text, mask),
            torch.full((2, 5, 3), 0.5), torch.ones(2, 5, dtype=torch.bool), torch.zeros(5, 3),
            shape=SHAPE, generators=generators([0, 1]),
            given=GivenFrames(latents, ratios, region).of(2) if frames_given else None,
        )  # fmt: skip

    watched = follow(lambda done, x_0: seen.append((done, x_0)))
    assert torch.equal(watched, follow(None))
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5]
    for _, x_0 in seen:
        expected = torch.ones(2, *SHAPE)  # guided: 0 + 2 * (.5 - 0)
        if sampler in ("iddpm", "ddim"):  # which guide three channels
            expected[:, 3:] = 0.5
        if frames_given:
            expected = torch.where(region & (ratios > 0)[:, None, :, None, None], expected, latents)
        torch.testing.assert_close(x_0, expected, rtol=0, atol=5e-3)

    def cancel(done: int, x_0: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(cancel)


def test_wrong_wishes_are_named() -> None:
    with pytest.raises(ValueError, match="'euler' does not fit an IDDPM model; choose from iddpm, ddim, dpm"):
        sample(PointModel("iddpm"), [0], objective="iddpm", sampler="euler")
    with pytest.raises(ValueError, match="at least one step"):
        sample(PointModel("flow"), [0], objective="flow", sampler="euler", steps=0)
    with pytest.raises(ValueError, match=r"model\.pred_sigma"):
        sample(lambda x, t, text, mask: x, [0], objective="iddpm", sampler="iddpm")


def test_noise_is_standard_normal() -> None:
    noise = draw_noise((4, 16, 32, 32), generators([0, 1]), torch.device("cpu"))
    assert noise.mean().abs() < 0.01
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def gaussian_model(mean: float, std: float) -> ModelFn:
    """The perfect noise prediction for data N(mean, std^2), with the true posterior variance at every step."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        step = t.double()
        low, high = step.floor().long(), step.ceil().long()
        signal = ALPHAS_CUMPROD[low].log().lerp(ALPHAS_CUMPROD[high].log(), step - low).exp()
        signal = rearrange(signal, "b -> b 1 1 1 1")
        noise = (1 - signal).sqrt() * (x.double() - signal.sqrt() * mean) / (signal * std**2 + 1 - signal)
        return torch.cat([noise, torch.zeros_like(noise)], dim=1).to(x)

    return model


def test_samplers_keep_a_gaussians_mean_and_spread() -> None:
    model, noise = gaussian_model(0.4, 0.25), torch.randn(4, 4, 4, 8, 8)
    results = {
        "iddpm": iddpm_sample(GaussianDiffusion.spaced(100), model, noise, lambda: torch.randn_like(noise)),
        "ddim": ddim_sample(GaussianDiffusion.spaced(100), model, noise),
        "dpm": dpm_solver_sample(model, noise, ContinuousSchedule(linear_betas()), 100),
    }
    for name, samples in results.items():
        assert samples.mean().item() == pytest.approx(0.4, abs=0.01), name
        assert samples.std().item() == pytest.approx(0.25, rel=0.08), name


def test_dpm_solver_is_of_second_order() -> None:
    """Against the exact flow of a Gaussian, halving the step cuts the error about fourfold."""
    model, noise = gaussian_model(0.4, 0.25), torch.randn(2, *SHAPE, dtype=torch.float64)
    schedule = ContinuousSchedule(linear_betas())

    def spread(t: float) -> float:
        return ((1 - schedule.sigma(t) ** 2) * 0.25**2 + schedule.sigma(t) ** 2) ** 0.5

    def centre(t: float) -> float:
        return 0.4 * (1 - schedule.sigma(t) ** 2) ** 0.5

    exact = centre(1e-3) + spread(1e-3) / spread(1.0) * (noise - centre(1.0))
    errors = [(dpm_solver_sample(model, noise, schedule, n) - exact).abs().max().item() for n in (100, 200, 400)]
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3, errors


def real_model(pred_sigma: bool) -> STDiT:
    torch.manual_seed(0)
    cfg = STDiTConfig(
        hidden_size=32, depth=2, num_heads=2, caption_channels=8, model_max_length=6, pred_sigma=pred_sigma
    )
    model = STDiT(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero would hide every mistake
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def sample_real(
    model: STDiT,
    rows: list[int],
    *,
    objective: str,
    sampler: str,
    prepared: bool,
    guidance: float = 4.0,
    negative: int | None = None,
) -> Tensor:
    text = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 4 + [0] * 2]).bool()
    null = model.null_condition() if negative is None else text[negative]
    return LatentSampler(
        DiffusionConfig(objective=objective),
        sampler,
        steps=5,
        guidance=guidance,
        prepare_text=model.prepare_text if prepared else None,
        null_mask=None if negative is None else mask[negative],
    )(model, text[rows], mask[rows], null, shape=SHAPE, generators=generators(rows))


def test_the_real_model_agrees_with_itself_across_batches() -> None:
    model = real_model(pred_sigma=False)
    kind = {"objective": "flow", "sampler": "euler", "prepared": True}
    together = sample_real(model, [0, 1, 2], **kind)
    apart = torch.cat([sample_real(model, [0], **kind), sample_real(model, [1, 2], **kind)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(("objective", "sampler"), ALL)
def test_text_prepared_once_gives_the_same_samples(objective: str, sampler: str, guidance: float) -> None:
    model = real_model(pred_sigma=objective == "iddpm")
    plain, prepared = (
        sample_real(model, [0, 1, 2], objective=objective, sampler=sampler, prepared=prepared, guidance=guidance)
        for prepared in (False, True)
    )
    torch.testing.assert_close(prepared, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("objective", "sampler"), [("flow", "euler"), ("iddpm", "ddim")])
def test_a_negative_prompt_is_read_under_its_own_mask(objective: str, sampler: str, prepared: bool) -> None:
    """A prompt that leads away from itself is the prompt without guidance; its neighbours are led away from it."""
    model = real_model(pred_sigma=objective == "iddpm")
    kind = {"objective": objective, "sampler": sampler, "prepared": prepared}
    found = sample_real(model, [0, 1, 2], negative=1, **kind)
    plain = sample_real(model, [0, 1, 2], guidance=1.0, **kind)
    torch.testing.assert_close(found[1], plain[1], rtol=1e-4, atol=1e-4)
    assert ((found - plain)[[0, 2]].abs().amax((1, 2, 3, 4)) > 1e-2).all()
    other = sample_real(model, [0, 1, 2], negative=1, **kind | {"prepared": not prepared})
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


def test_nothing_uses_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    for objective, sampler in ALL:
        sample(PointModel(objective), [0, 1], objective=objective, sampler=sampler, steps=3)
    assert torch.equal(state, torch.random.get_rng_state())
