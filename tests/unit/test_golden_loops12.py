"""Whole sampling loops of Open-Sora 1.1 and 1.2, with and without given frames, beside the published code's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_repro.config import DiffusionConfig
from opensora_repro.diffusion import samplers
from opensora_repro.diffusion.flow import OPEN_SORA_1_2
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.diffusion.samplers import LatentSampler
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.layers import FinalLayer
from tests.golden import Case, build_video_model, load_case, relative_error

PREPARED = pytest.mark.parametrize("prepared", [True, False])


class Slipped(nn.Module):
    """The final layer as published: given frames are modulated as generated ones, then normed and modulated again."""

    def __init__(self, layer: FinalLayer) -> None:
        super().__init__()
        self.layer = layer
        self.generated = torch.empty(0)  # bool [B, T] of the call

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Tokens [B, T, S, D] and the vectors of their frames [B, T, D], of which each sample has a generated one."""
        generated = self.generated.repeat(len(x) // len(self.generated), 1)
        now = t[torch.arange(len(t)), generated.int().argmax(1)]  # [B, D]
        table = self.layer.scale_shift_table[:, None, None, None]
        shift, scale = table + now[:, None, None]  # [B, 1, 1, D]
        shift_given, scale_given = table + t[:, :, None]  # [B, T, 1, D]
        once = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        twice = F.layer_norm(once, x.shape[-1:], eps=1e-6) * (1 + scale_given) + shift_given
        out: Tensor = self.layer.linear(torch.where(generated[:, :, None, None], once, twice))
        return out


class Spy:
    """A model that remembers what it was shown, by its conditional half."""

    def __init__(self, model: Any, samples: int) -> None:
        self.model, self.samples = model, samples
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, x: Tensor, timestep: Tensor, *rest: Any, **told: Any) -> Tensor:
        if isinstance(self.model.final_layer, Slipped):
            self.model.final_layer.generated = told["frame_mask"]
        shown = {"z": x, "t": timestep, "x_mask": told.get("frame_mask")}
        self.seen.append({name: value[: self.samples] for name, value in shown.items() if value is not None})
        return self.model(x, timestep, *rest, **told)


def sampled(
    case: Case, model: Any, objective: DiffusionConfig, name: str, *, prepared: bool, monkeypatch: Any
) -> tuple[Tensor, Spy]:
    """The case's latents, and what the model was shown. Its z holds the noise and, where frames are given, these."""
    info, z = case.info, case["in.z"]
    noises = iter([z, *(case[f"in.noise.{number}"] for number in range(len(case.group("in.noise"))))])
    monkeypatch.setattr(samplers, "draw_noise", lambda *_: next(noises))
    spy, size = Spy(model, len(z)), (info["num_frames"], info["height"], info["width"])
    told = conditions_of(model.cfg, size, torch.full((len(z),), float(info["fps"])), frame_interval=1)
    if "ar" in told:
        told["ar"] = 1 / told["ar"]  # as the published sampling has it, not its training
    ratios = case.tensors.get("in.frame_mask")
    sampler = LatentSampler(
        objective, name, steps=info["steps"], guidance=info["cfg_scale"],
        prepare_text=model.prepare_text if prepared else None,
    )  # fmt: skip
    found = sampler(
        spy, case["in.y"][:, 0], case["in.mask"].bool(), model.null_condition(),
        shape=z.shape[1:], generators=[], size=size, conditions=told,
        given=None if ratios is None else GivenFrames(z, ratios),
    )  # fmt: skip
    assert next(noises, None) is None
    return found, spy


@PREPARED
@pytest.mark.parametrize("name", ["rflow_sample", "rflow_sample_mask", "rflow_sample_discrete"])
def test_flow(golden_1_2_dir: Path, name: str, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case(golden_1_2_dir, name)
    info, tolerance = case.info, case.info["tolerances"]["out_rel"]
    objective = DiffusionConfig(
        objective="flow",
        schedule=OPEN_SORA_1_2,
        shift=0.0 if info["use_timestep_transform"] else 1.0,
        timestep_sampling="discrete" if info["use_discrete_timesteps"] else "",
    )
    model = build_video_model(load_case(golden_1_2_dir, info["model"].split()[0])).eval()
    found, spy = sampled(case, model, objective, "euler", prepared=prepared, monkeypatch=monkeypatch)
    assert relative_error(found, case["out"]) < tolerance
    assert len(spy.seen) == info["steps"]
    for number, seen in enumerate(spy.seen):
        for key, expected in case.group(f"act.{number}").items():
            if key == "x_mask":
                assert torch.equal(seen[key], expected), number
            else:
                assert relative_error(seen[key], expected) < tolerance, (number, key)
    if "in.frame_mask" in case.tensors:
        kept = (case["in.frame_mask"] == 0)[:, None, :, None, None].expand_as(found)
        assert torch.equal(found[kept], case["in.z"][kept]) and kept.any()


@PREPARED
def test_iddpm(golden_1_2_dir: Path, prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But that frames of ratio 0 are kept, where the original's last step alters them.

    Frames that join are given in the step in which they do, and the original takes what its final layer makes of them.
    """
    case = load_case(golden_1_2_dir, "iddpm_mask_sample")
    info, tolerance = case.info, case.info["tolerances"]["out_rel"]
    assert info["cfg_channel"] == samplers.NUM_GUIDED_CHANNELS
    model = build_video_model(load_case(golden_1_2_dir, info["model"].split()[0])).eval()
    model.final_layer = Slipped(model.final_layer)  # type: ignore[assignment]
    found, spy = sampled(case, model, DiffusionConfig(), "iddpm", prepared=prepared, monkeypatch=monkeypatch)
    ratios = case["in.frame_mask"]
    generated = (ratios > 0)[:, None, :, None, None].expand_as(found)
    assert relative_error(found[generated], case["out"][generated]) < tolerance
    assert torch.equal(found[~generated], case["in.z"][~generated]) and not generated.all()
    for number, seen in enumerate(spy.seen):
        expected = case.group(f"act.{number}")
        assert torch.equal(seen["t"], expected["t"]) and torch.equal(seen["x_mask"], expected["x_mask"])
        assert relative_error(seen["z"], expected["z"]) < tolerance, number
