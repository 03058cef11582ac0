"""Open-Sora 1.2's video autoencoder against the published code: moments, pixels, activations, gradients, keys."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_repro.models.autoencoder_config import TemporalVAEConfig, VideoAutoencoderConfig
from opensora_repro.models.video_autoencoder import TemporalVAE, VideoAutoencoder, kl_divergence
from tests.golden import Case, load_case, module_outputs, relative_error

TEMPORAL_CASES = [
    "vae_temporal_tiny",
    "vae_temporal_res2",
    pytest.param("vae_temporal_full", marks=pytest.mark.exhaustive),  # 1.3 GB
]
NOT_DRAWN = ("scale", "shift")


def temporal_config(config: dict[str, Any]) -> TemporalVAEConfig:
    assert config.keys() == {field.name for field in fields(TemporalVAEConfig)}
    return TemporalVAEConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})


def fill_by_recipe(model: nn.Module, golden: Path, seed: int) -> None:
    recipe = runpy.run_path(str(golden / "recipe.py"))
    for key, value in model.state_dict().items():
        if key not in NOT_DRAWN:
            value.copy_(torch.from_numpy(recipe["weight"](seed, key, tuple(value.shape))))


def temporal_vae(golden: Path, case: Case) -> TemporalVAE:
    model = TemporalVAE(temporal_config(case.info["config"]))
    if case.group("param"):
        model.load_state_dict(case.group("param"))
    else:
        fill_by_recipe(model, golden, case.info["seed"])
    return model


def pipeline(golden: Path, case: Case) -> VideoAutoencoder:
    """Both cases' weights are stored with the tiny one."""
    from diffusers import AutoencoderKL

    config = case.info["config"]
    cfg = VideoAutoencoderConfig(
        temporal=temporal_config(config["vae_temporal"]),
        micro_frame_size=config["micro_frame_size"],
        shift=tuple(config["shift"]),
        scale=tuple(config["scale"]),
    )
    image_vae = AutoencoderKL(**config["vae_2d"])
    model = VideoAutoencoder(cfg, image_vae, micro_batch_size=config["vae_2d_micro_batch_size"])
    model.load_state_dict(load_case(golden, "vae_pipeline_tiny").group("param"))
    return model.eval()


@pytest.mark.parametrize("name", TEMPORAL_CASES)
@torch.no_grad()
def test_temporal_vae(golden_1_2_dir: Path, name: str) -> None:
    case = load_case(golden_1_2_dir, name)
    model, tolerance = temporal_vae(golden_1_2_dir, case), case.info["tolerances"]["out_rel"]
    tags = sorted(key.removeprefix("in.x.") for key in case.tensors if key.startswith("in.x."))
    assert tags
    for tag in tags:
        names = [key.removeprefix(f"act.{tag}.") for key in case.tensors if key.startswith(f"act.{tag}.")]
        seen = module_outputs(model, names)
        moments = model.encode(case[f"in.x.{tag}"])
        assert relative_error(moments, case[f"out.moments.{tag}"]) < tolerance, tag
        assert relative_error(kl_divergence(moments), case[f"out.kl.{tag}"]) < tolerance, tag
        for place in names:
            assert relative_error(seen[place], case[f"act.{tag}.{place}"]) < tolerance, (tag, place)
    for tag, frames in case.info["decode_num_frames"].items():
        names = [key.removeprefix(f"act.dec.{tag}.") for key in case.tensors if key.startswith(f"act.dec.{tag}.")]
        seen = module_outputs(model, names)
        pixels = model.decode(case[f"in.z.{tag}"], num_frames=frames)
        assert relative_error(pixels, case[f"out.dec.{tag}"]) < tolerance, tag
        for place in names:
            assert relative_error(seen[place], case[f"act.dec.{tag}.{place}"]) < tolerance, (tag, place)


def test_temporal_gradients(golden_1_2_dir: Path) -> None:
    case = load_case(golden_1_2_dir, "vae_temporal_tiny")
    model, x = temporal_vae(golden_1_2_dir, case), case["in.x.f17"].requires_grad_()
    moments = model.encode(x)
    decoded = model.decode(moments.chunk(2, dim=1)[0], num_frames=17)
    ((decoded * case["gout"]).sum() + 0.01 * kl_divergence(moments).sum()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()} | {"input.x": x.grad}
    for name in case.info["grads"]:
        grad = found[name]
        assert grad is not None
        assert relative_error(grad, case[f"grad.{name}"]) < case.info["tolerances"]["grad_rel"], name


@pytest.mark.parametrize("name", ["vae_pipeline_tiny", "vae_pipeline_whole"])
@torch.no_grad()
def test_pipeline(golden_1_2_dir: Path, name: str) -> None:
    case = load_case(golden_1_2_dir, name)
    model, tolerance = pipeline(golden_1_2_dir, case), case.info["tolerances"]["out_rel"]
    for frames, sizes in case.info["latent_sizes"].items():
        noises = given(case, frames)
        z = model.encode(case[f"in.x.{frames}"], lambda shape, noises=noises: checked(next(noises), shape))
        assert next(noises, None) is None, "more noise than was asked for"
        assert list(z.shape) == sizes["z_shape"]
        assert model.cfg.latent_frames(int(frames)) == sizes["get_latent_size"][0]
        assert relative_error(z, case[f"out.z.{frames}"]) < tolerance, frames
        pixels = model.decode(case[f"out.z.{frames}"], num_frames=int(frames))
        assert relative_error(pixels, case[f"out.rec.{frames}"]) < tolerance, frames


def given(case: Case, frames: str) -> Iterator[Tensor]:
    noises = case.group(f"in.noise.{frames}")
    yield from (noises[str(number)] for number in range(len(noises)))


def checked(noise: Tensor, shape: torch.Size) -> Tensor:
    assert noise.shape == shape
    return noise


def test_published_keys(golden_1_2_dir: Path) -> None:
    from diffusers import AutoencoderKL

    published = json.loads((golden_1_2_dir / "keys_vae_pipeline_v12.json").read_text())
    temporal = json.loads((golden_1_2_dir / "keys_vae_temporal_sd.json").read_text())
    with torch.device("meta"):
        image_vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        model = VideoAutoencoder(VideoAutoencoderConfig(), image_vae)
    assert shapes(model) == published["shapes"]
    assert shapes(model.temporal_vae) == temporal["shapes"]
    assert sorted(name for name, _ in model.named_buffers()) == sorted(published["buffers"])
    assert sum(parameter.numel() for parameter in model.parameters()) == published["n_parameters"]
    assert sum(parameter.numel() for parameter in model.temporal_vae.parameters()) == temporal["n_parameters"]


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


@torch.no_grad()
def test_chunks_do_not_see_each_other_and_frames_not_what_follows(golden_1_2_dir: Path) -> None:
    """Two chunks at once are the two alone; within one, GroupNorm alone lets what follows be seen."""
    model = pipeline(golden_1_2_dir, load_case(golden_1_2_dir, "vae_pipeline_tiny"))
    video = torch.randn(1, 3, 34, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = model.encode_moments(video)
    parts = [model.encode_moments(part) for part in video.split(17, dim=2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=2))
    z = torch.randn(1, 4, 10, 2, 2, generator=torch.Generator().manual_seed(1))
    decoded = [model.decode(part, num_frames=17) for part in z.split(5, dim=2)]
    torch.testing.assert_close(model.decode(z, num_frames=34), torch.cat(decoded, dim=2))
    for norm in model.temporal_vae.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.forward = lambda x: x  # type: ignore[method-assign]
    chunk = torch.randn(1, 4, 17, 2, 2, generator=torch.Generator().manual_seed(2))
    later = chunk.clone()
    later[:, :, 9:] += 1
    changed = (model.temporal_vae.encode(chunk) - model.temporal_vae.encode(later)).abs().amax((0, 1, 3, 4)) > 0
    assert changed.tolist() == [False, False, False, True, True]  # 3 zeros, then frames 0; 1-4; 5-8; 9-12; 13-16
