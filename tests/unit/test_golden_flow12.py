"""Rectified flow as Open-Sora 1.2 has it, against vectors of the published code: losses, times, sampling loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora_repro.config import ConfigError, DiffusionConfig, FrameMasksConfig, parse_config
from opensora_repro.diffusion.flow import OPEN_SORA_1_2, OpenSoraFlow, RectifiedFlow, build_flow, shift_time
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.diffusion.samplers import LatentSampler, masked_flow_sample
from tests.golden import load_case, relative_error

PUBLISHED = DiffusionConfig(objective="flow", schedule=OPEN_SORA_1_2)


@pytest.fixture(scope="module")
def times(golden_1_2_dir: Path) -> Any:
    return json.loads((golden_1_2_dir / "rflow_timesteps.json").read_text())


@pytest.mark.parametrize("name", ["plain", "masked", "image", "weighted"])
def test_losses(golden_1_2_dir: Path, name: str) -> None:
    case = load_case(golden_1_2_dir, "rflow_losses")
    x_0, noise, output, t = (case[f"in.{key}.{name}"] for key in ("x0", "noise", "model_out", "t"))
    frame_mask, seen = case.tensors.get(f"in.mask.{name}"), []

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(x)
        return output

    losses = build_objective(PUBLISHED).losses(model, x_0, noise, t.float(), frame_mask=frame_mask)
    if name == "weighted":  # which no published config is
        losses = losses * torch.linspace(0.5, 1.5, 1000)[t]
    tolerance = case.info["tolerances"]["out_rel"]
    assert relative_error(seen[0], case[f"out.x_t.{name}"]) < tolerance
    assert relative_error(losses, case[f"out.loss.{name}"]) < tolerance


def test_times_are_shifted_by_size(times: Any) -> None:
    for case in times["transform"]:
        flow = build_flow(DiffusionConfig(objective="flow", schedule=OPEN_SORA_1_2, transform_scale=case["scale"]))
        shift = flow.shift_for(1, 1, (case["num_frames"], case["height"], case["width"]))
        found = 1000 * shift_time(torch.tensor(case["t"]) / 1000, shift)
        assert relative_error(found, torch.tensor(case["out"])) < times["tolerances"]["out_rel"]


def test_sampling_times(times: Any) -> None:
    for case in times["sampling_schedules"]:
        size = (case["num_frames"], case["height"], case["width"])
        found = build_flow(PUBLISHED).sampling_times(case["steps"], 1, size=size)
        assert found[-1] == 0
        assert relative_error(1000 * found[:-1], torch.tensor(case["timesteps"])) < times["tolerances"]["out_rel"]


def test_drawn_times(times: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in times["logit_normal"]:
        normal = iter(case["normal"])
        flow = RectifiedFlow(logit_mean=case["loc"], logit_std=case["scale"], shift=1.0)
        monkeypatch.setattr(flow, "_draw", lambda _, normal=normal: torch.tensor([next(normal)]))
        found = flow.draw_timesteps([torch.Generator()] * len(case["normal"]), 1) / 1000
        assert relative_error(found, torch.tensor(case["t_over_T"])) < times["tolerances"]["out_rel"]


def test_short_clips_count_their_latents(times: Any) -> None:
    """Where the original counts none, and trains at t = 0 alone; a batch has one size, so no first row decides."""
    flow = OpenSoraFlow()

    def frames(count: int) -> float:
        return flow.shift_for(1, 1, (count, 512, 512)) ** 2

    assert times["mixed_batches"][2] == {"num_frames": [16.0, 16.0], "t": [500.0, 500.0], "out": [0.0, 0.0]}
    assert [frames(count) for count in (1, 2, 4, 5, 16)] == pytest.approx([1, 1, 1, 2, 4])
    assert [frames(17 * count) for count in (1, 3, 24)] == pytest.approx([5, 15, 120])
    assert frames(60) == pytest.approx(15)
    draws = build_flow(PUBLISHED).draw_timesteps([torch.Generator()] * 3, 1, size=(16, 240, 426))
    assert (draws > 0).all()


def test_a_fixed_shift_needs_no_size() -> None:
    flow = OpenSoraFlow(shift=1.0)
    assert torch.equal(flow.sampling_times(4, 1), torch.linspace(1, 0, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs the size in pixels"):
        OpenSoraFlow().sampling_times(4, 1)


@pytest.mark.parametrize("kind", ["uniform", "discrete"])
def test_other_draws(kind: str) -> None:
    flow = build_flow(DiffusionConfig(objective="flow", timestep_sampling=kind, shift=1.0))
    draws = flow.draw_timesteps([torch.Generator().manual_seed(number) for number in range(8000)], 1)
    shares = torch.histc(draws, bins=5, min=0, max=1000) / 8000
    assert shares.tolist() == pytest.approx([0.2] * 5, abs=0.02)
    whole = (draws - draws.round()).abs().max() < 1e-3
    assert whole == (kind == "discrete")


def test_all_given_is_no_loss() -> None:
    for flow in (RectifiedFlow(), OpenSoraFlow()):
        x_0, noise, output = torch.randn(3, 2, 4, 2, 2, 2)
        output.requires_grad_()
        mask = torch.tensor([[False, False], [False, True]])
        losses = flow.losses(lambda *_, out=output: out, x_0, noise, torch.tensor([500.0, 500.0]), frame_mask=mask)
        assert losses[0] == 0 and losses[1] > 0
        losses.sum().backward()
        assert output.grad is not None and output.grad.isfinite().all()
        assert output.grad[0].abs().sum() == output.grad[1, :, 0].abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, on networks whose samples are known


def straight(target: Tensor) -> Callable[..., Tensor]:
    """What moves from wherever it is straight to the target; where frames are given it does not matter."""

    def velocity(x: Tensor, timestep: Tensor, *masks: Tensor) -> Tensor:
        return 1000 * (x - target) / timestep.view(-1, 1, 1, 1, 1)

    return velocity


def noises(shape: tuple[int, ...], seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)


@pytest.mark.parametrize("name", ["euler", "ab2", "heun"])
def test_given_frames_are_kept_and_others_reach_their_target(name: str) -> None:
    shape = (2, 4, 3, 2, 2)
    drawn = noises(shape)
    target, latents, noise = next(drawn), next(drawn), next(drawn)
    ratios, grid = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.05]]), torch.linspace(1, 0, 11, dtype=torch.float64)
    found = masked_flow_sample(
        straight(target), noise, grid, GivenFrames(latents, ratios), lambda: next(drawn), name=name
    )
    assert torch.equal(found[0, :, 0], latents[0, :, 0]) and torch.equal(found[1, :, 1], latents[1, :, 1])
    assert torch.equal(found[1, :, 2], latents[1, :, 2])  # no step is left below its ratio
    for sample, frame in ((0, 1), (0, 2), (1, 0)):
        torch.testing.assert_close(found[sample, :, frame], target[sample, :, frame], atol=1e-4, rtol=1e-4)


def test_what_all_is_generated_is_as_without_given_frames() -> None:
    shape = (4, 3, 2, 2)
    target = torch.randn(1, *shape)

    def sampled(sampler: LatentSampler, given: GivenFrames | None) -> Tensor:
        def model(x: Tensor, timestep: Tensor, condition: Tensor, mask: None, frame_mask: Any = None) -> Tensor:
            assert frame_mask is None if given is None else frame_mask.all()
            out = -straight(target)(x, timestep + 1e-3)
            return torch.cat([out, out], 1) if sampler.objective.objective == "iddpm" else out

        return sampler(
            model, torch.zeros(1), None, torch.zeros(()), shape=shape, size=(9, 64, 64), given=given,
            generators=[torch.Generator().manual_seed(1)],
        )  # fmt: skip

    everything = GivenFrames(torch.randn(1, *shape), torch.ones(1, 3))
    for objective, name in (
        (PUBLISHED, "euler"),
        (PUBLISHED, "ab2"),
        (PUBLISHED, "heun"),
        (DiffusionConfig(), "ddim"),
        (DiffusionConfig(), "dpm"),
    ):
        sampler = LatentSampler(objective, name, steps=5, guidance=1.0)
        assert torch.equal(sampled(sampler, everything), sampled(sampler, None)), name


def test_a_sample_with_given_frames_does_not_depend_on_its_neighbours() -> None:
    shape, latents = (4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    ratios = torch.tensor([[0.0, 0.7, 1.0], [1.0, 1.0, 0.3]])

    def model(x: Tensor, timestep: Tensor, condition: Tensor, mask: None, *, frame_mask: Tensor) -> Tensor:
        return torch.cat([torch.tanh(x), 0.1 * x], 1) * (1 + frame_mask[:, None, :, None, None])

    def sampled(objective: DiffusionConfig, name: str, rows: list[int]) -> Tensor:
        return LatentSampler(objective, name, steps=6, guidance=2.0)(
            model, torch.zeros(len(rows)), None, torch.zeros(()), shape=shape, size=(9, 64, 64),
            given=GivenFrames(latents[rows], ratios[rows]),
            generators=[torch.Generator().manual_seed(row) for row in rows],
        )  # fmt: skip

    iddpm = ((DiffusionConfig(), name) for name in ("iddpm", "ddim", "dpm"))
    for objective, name in ((PUBLISHED, "euler"), (PUBLISHED, "ab2"), *iddpm):
        together, alone = sampled(objective, name, [0, 1]), sampled(objective, name, [1])
        torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=1e-6)
        assert torch.equal(together[0, :, 0], latents[0, :, 0])
        assert not torch.isclose(together[0, :, 1], latents[0, :, 1]).any()


# ---------------------------------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diffusion.schedule=open_sora_1_2", 'diffusion.schedule = "open_sora_1_2": expected "" with diffusion.obje'),
        ("diffusion.schedule=sora", 'diffusion.schedule = "sora": expected one of "", open_sora_1_2'),
        ("diffusion.timestep_sampling=discrete", "expected uniform or speed with diffusion.objective = iddpm"),
        ("diffusion.transform_scale=0", "diffusion.transform_scale = 0.0: expected more than 0"),
        ("frame_masks.random=1.5", "frame_masks.random = 1.5: expected a share from 0 to 1"),
        ("frame_masks.noise=1", "frame_masks.noise = 1.0: expected a level from 0 (none) to below 1"),
        ("frame_masks.intepolate=0.1", "unknown key frame_masks.intepolate; did you mean frame_masks.interpolate?"),
    ],
)
def test_values_that_cannot_work(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({}, [override])
    assert message in str(caught.value)


def test_shares_of_frame_masks() -> None:
    assert sum(FrameMasksConfig().shares().values()) == 0
    tenths = [f"frame_masks.{mode}=0.1" for mode in FrameMasksConfig().shares()]
    assert math.isclose(sum(parse_config({}, tenths).frame_masks.shares().values()), 1)
    with pytest.raises(ConfigError, match=r"^frame_masks: the shares add up to 1.4: expected at most 1, the rest is"):
        parse_config({}, [*tenths, "frame_masks.random=0.5"])
