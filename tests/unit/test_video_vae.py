"""Autoencoders of videos behind the one interface: frames, strides, statistics, chunks, tiles, and what is refused."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora_repro.config import ConfigError, VaeConfig
from opensora_repro.demo.shapes import motions, render
from opensora_repro.frozen.autoencoder import Autoencoder, FrameVAE
from opensora_repro.frozen.pretrained import ModelNotFound
from opensora_repro.frozen.tiles import in_tiles, starts
from opensora_repro.frozen.vae import open_vae
from opensora_repro.frozen.video_vae import OpenSoraVAE, VideoVAE
from tests.golden import rms_error
from tests.tiny_models import TINY_VIDEO_VAES, make_tiny_vae, make_tiny_video_vae

OPEN_SORA = "VideoAutoencoderPipeline"
COG, WAN, HUNYUAN, LTX, MOCHI = TINY_VIDEO_VAES
KINDS = [*TINY_VIDEO_VAES, OPEN_SORA]
LATENTS = {  # of 1, 16, 17 and 49 frames, or the closest numbers that are named where they are refused
    COG: (1, 4, 5, 13),
    WAN: (1, "13 or 17", 5, 13),
    HUNYUAN: (1, "13 or 17", 5, 13),
    LTX: (1, "9 or 17", 3, 7),
    MOCHI: (1, "13 or 19", "13 or 19", 9),
    OPEN_SORA: (1, 4, 5, 14),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vaes")
    return {kind: make_tiny_video_vae(root / kind, kind) for kind in KINDS}


def load(folder: Path, dtype: torch.dtype = torch.float32, **settings: int) -> Autoencoder:
    return open_vae(VaeConfig(path=str(folder), **settings), "cpu", dtype)


def make_video(frames: int, height: int = 32, width: int = 32) -> Tensor:
    """Smooth, in space and in time."""
    generator = torch.Generator().manual_seed(frames)
    coarse = torch.randn(1, 3, 1 + frames // 8, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")[0].clamp(-1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_there_and_back(folders: dict[str, Path], kind: str) -> None:
    vae = load(folders[kind])
    assert isinstance(vae, OpenSoraVAE if kind == OPEN_SORA else VideoVAE) and not vae.frozen.loaded
    for frames, expected in zip((1, 16, 17, 49), LATENTS[kind], strict=True):
        if isinstance(expected, str):
            with pytest.raises(ConfigError, match=rf"^num_frames: an {kind} takes .*, not {frames}: set {expected}$"):
                vae.check_frames(frames, "num_frames")
            continue
        vae.check_frames(frames, "num_frames")
        assert vae.latent_frames(frames) == expected
        moments = vae.encode_moments(make_video(frames))
        assert moments.dtype == torch.float32 and not moments.requires_grad and not moments.is_inference()
        channels, *sizes = vae.latent_shape(frames, 32, 32)
        assert (channels, sizes) == (4, [expected, *[32 // vae.spatial_stride] * 2])
        assert list(moments.shape) == [2 * channels, *sizes]
        latents = vae.sample_latents(moments, torch.Generator().manual_seed(0))
        assert list(latents.shape) == [channels, *sizes] and latents.dtype == torch.float32
        video = vae.decode(latents[None], num_frames=frames)
        assert video.shape == (1, 3, frames, 32, 32) and video.dtype == torch.float32
        assert video.isfinite().all() and video.abs().max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_exact_number_is_one(folders: dict[str, Path], kind: str) -> None:
    """The network itself gives back as many frames as the rule says, and for no other number."""
    vae = load(folders[kind])
    for frames in range(1, 20):
        if kind == OPEN_SORA:
            latents, back = vae.latent_frames(frames), frames
        else:
            with torch.no_grad():
                z = vae.vae.encode(torch.zeros(1, 3, frames, 16, 16)).latent_dist.mean
                latents, back = z.shape[2], vae.vae.decode(z).sample.shape[2]
        assert vae.geometry.is_exact(frames) == (back == frames), frames
        if back == frames:
            assert vae.latent_frames(frames) == latents


def test_latents_of_published_lengths(folders: dict[str, Path]) -> None:
    vae = load(folders[OPEN_SORA])
    assert [vae.latent_frames(n) for n in (20, 51, 102, 204, 408)] == [6, 15, 30, 60, 120]


def published_latents(kind: str, network: Any, z: Tensor) -> Tensor:
    """As each class's pipeline of diffusers brings the encoder's latents to unit variance."""
    config = network.config
    if kind in (COG, HUNYUAN):
        return z * config.scaling_factor
    if kind == LTX:
        from diffusers import LTXPipeline

        return LTXPipeline._normalize_latents(z, network.latents_mean, network.latents_std, config.scaling_factor)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (z - mean) / std * (config.scaling_factor if kind == MOCHI else 1.0)


@pytest.mark.parametrize("kind", TINY_VIDEO_VAES)
def test_latents_are_the_librarys(folders: dict[str, Path], kind: str) -> None:
    vae, frames = load(folders[kind]), 1 if kind == MOCHI else 17
    video = make_video(frames)
    moments = vae.encode_moments(video)
    mode = vae.sample_latents(moments, None)
    with torch.no_grad():
        posterior = vae.vae.encode(video[None]).latent_dist
        expected = vae.vae.decode(posterior.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(moments, posterior.parameters[0])
    torch.testing.assert_close(mode[None], published_latents(kind, vae.vae, posterior.mode()))
    torch.testing.assert_close(vae.decode(mode[None], num_frames=frames), expected, atol=1e-4, rtol=1e-4)


def test_the_librarys_own_pipeline_decodes_alike(folders: dict[str, Path]) -> None:
    from types import SimpleNamespace

    from diffusers import CogVideoXPipeline

    vae, latents = load(folders[COG]), torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline = SimpleNamespace(vae=vae.vae, vae_scaling_factor_image=vae.vae.config.scaling_factor)
    with torch.no_grad():  # it has latents as [B, T', C, h, w]
        expected = CogVideoXPipeline.decode_latents(pipeline, latents.transpose(1, 2))
    torch.testing.assert_close(vae.decode(latents, num_frames=9), expected.clamp(-1, 1))


def test_latents_of_open_sora(folders: dict[str, Path]) -> None:
    """Shift and scale are the file's; the network decodes what it encoded with them."""
    vae, video = load(folders[OPEN_SORA]), make_video(20)
    mode = vae.sample_latents(vae.encode_moments(video), None)
    with torch.no_grad():
        expected = vae.vae.encode(video[None])
        pixels = vae.vae.decode(expected, num_frames=20)
    torch.testing.assert_close(mode[None], expected)
    torch.testing.assert_close(vae.decode(expected, num_frames=20), pixels.clamp(-1, 1))
    draws = torch.stack(
        [vae.sample_latents(torch.zeros(8, 1, 1, 1), torch.Generator().manual_seed(n)) for n in range(400)]
    )
    std = torch.tensor([3.85, 2.32, 2.33, 3.06])
    torch.testing.assert_close(draws.std(0).flatten() * std, torch.ones(4), atol=0.1, rtol=0)


@pytest.mark.parametrize(("kind", "parts"), [(COG, (9, 8, 8)), (WAN, (1, 4)), (LTX, (1, 8)), (MOCHI, (1, 12))])
def test_a_clip_begins_as_its_first_part_alone(folders: dict[str, Path], kind: str, parts: tuple[int, ...]) -> None:
    """Causal in time: what comes later changes nothing. CogVideoX averages over the frames that it takes at once."""
    vae, video = load(folders[kind]), make_video(sum(parts))
    whole, frames = vae.encode_moments(video), 0
    for part in parts:
        frames += part
        found = vae.encode_moments(video[:, :frames])
        torch.testing.assert_close(found, whole[:, : vae.latent_frames(frames)], atol=1e-4, rtol=1e-4)
    if kind in (COG, WAN):
        latents = vae.sample_latents(whole, None)[None]
        first = vae.decode(latents[:, :, : vae.latent_frames(parts[0])], num_frames=parts[0])
        torch.testing.assert_close(first, vae.decode(latents, num_frames=frames)[:, :, : parts[0]])


def test_open_soras_chunks_are_alone(folders: dict[str, Path]) -> None:
    vae, video = load(folders[OPEN_SORA]), make_video(37)
    moments = [vae.encode_moments(part) for part in video.split(17, dim=1)]
    torch.testing.assert_close(vae.encode_moments(video), torch.cat(moments, dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_batches_change_nothing(folders: dict[str, Path], kind: str) -> None:
    vae, frames = load(folders[kind]), 7 if kind == MOCHI else 9
    videos = [make_video(frames), -make_video(frames), make_video(1)]
    for video, moments in zip(videos, vae.encode_clips(videos), strict=True):
        assert torch.equal(vae.encode_moments(video), moments)
    latents = torch.randn(2, *vae.latent_shape(frames, 32, 32), generator=torch.Generator().manual_seed(0))
    both = vae.decode(latents, num_frames=frames)
    assert torch.equal(vae.decode(latents[1:], num_frames=frames), both[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(folders: dict[str, Path], kind: str) -> None:
    plain, half = load(folders[kind]), load(folders[kind], torch.bfloat16)
    frames = 7 if kind == MOCHI else 9
    video = torch.randn(3, frames, 32, 32, generator=torch.Generator().manual_seed(0))
    moments, rounded = plain.encode_moments(video), half.encode_moments(video)
    assert half.sample_latents(moments, None).equal(plain.sample_latents(moments, None))  # statistics are not rounded
    means, rounded_means = moments.chunk(2)[0], rounded.chunk(2)[0]
    assert 0 < rms_error(rounded_means, means) < 0.1
    latents = plain.sample_latents(moments, None)[None]
    assert 0 < rms_error(half.decode(latents, num_frames=frames), plain.decode(latents, num_frames=frames)) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_off_the_stride_give_whole_latents(folders: dict[str, Path], kind: str) -> None:
    vae = load(folders[kind])
    for tile in (0, 32):
        moments = load(folders[kind], tile_size=tile).encode_moments(make_video(1, 41, 55))
        assert moments.shape[-2:] == (41 // vae.spatial_stride, 55 // vae.spatial_stride)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles


def test_tiles_cover_and_share() -> None:
    for length in range(1, 60):
        for tile in range(2, 20):
            found = list(starts(length, tile))
            assert found[0] == 0 and found[-1] + tile >= length and (len(found) == 1 or found[-1] + tile == length)
            assert all(0 < right - left <= tile - tile // 4 for left, right in pairwise(found))


def test_tiles_of_a_local_function_are_the_whole() -> None:
    def halved(x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, 2)

    def doubled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    x = torch.randn(2, 3, 36, 50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(in_tiles(halved, x, 16, 2), halved(x))
    torch.testing.assert_close(in_tiles(doubled, x, 12), doubled(x))
    seen: list[tuple[int, ...]] = []
    in_tiles(lambda part: seen.append(tuple(part.shape[-2:])) or part, x, 12)
    assert len(seen) > 4 and set(seen) == {(12, 12)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_within_a_tile_is_whole(folders: dict[str, Path], kind: str) -> None:
    plain, tiled = load(folders[kind]), load(folders[kind], tile_size=32)
    moments = plain.encode_moments(make_video(1))
    assert torch.equal(tiled.encode_moments(make_video(1)), moments)
    latents = plain.sample_latents(moments, None)[None]
    assert torch.equal(tiled.decode(latents, num_frames=1), plain.decode(latents, num_frames=1))
    assert plain.fingerprint() != tiled.fingerprint()


@pytest.mark.parametrize("kind", [COG, WAN, HUNYUAN])
def test_tiles_come_as_close_as_the_librarys(folders: dict[str, Path], kind: str) -> None:
    """Random weights make the most of what a tile does not see; the library's tiles of that size are the measure."""
    vae, tiled = load(folders[kind]), load(folders[kind], tile_size=64)
    latents = vae.sample_latents(vae.encode_moments(make_video(9, 96, 96)), None)[None]
    whole = vae.decode(latents, num_frames=9)
    ours = rms_error(tiled.decode(latents, num_frames=9), whole)
    if kind == COG:
        vae.vae.enable_tiling(64, 64, 0.25, 0.25)
    else:
        sizes = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
        vae.vae.enable_tiling(**sizes, tile_sample_stride_height=48, tile_sample_stride_width=48)
    theirs = rms_error(vae.decode(latents, num_frames=9), whole)
    assert 0 < ours < 1.1 * theirs


def test_tiles_of_a_trained_autoencoder_are_close(repo_dir: Path) -> None:
    whole, tiled = (load(repo_dir / "checkpoints/demo/vae", tile_size=size) for size in (0, 64))
    drawn = [render(motion, (0.4, 0.6), 0.2, (20, 22, 24), width=96, height=96) for motion in motions()[::9]]
    video = torch.from_numpy(np.stack(drawn)).permute(3, 0, 1, 2) / 127.5 - 1
    latents = [vae.sample_latents(vae.encode_moments(video), None) for vae in (whole, tiled)]
    assert 0 < rms_error(latents[1], latents[0]) < 0.25
    pixels = [vae.decode(latents[0][None], num_frames=len(drawn))[0] for vae in (whole, tiled)]
    assert psnr(pixels[1], pixels[0]) > 35 and psnr(pixels[1], video) > psnr(pixels[0], video) - 2


def psnr(got: Tensor, expected: Tensor) -> float:
    """In dB, of values in [-1, 1]."""
    return -10 * ((got - expected).square().mean() / 4).log10().item()


# ---------------------------------------------------------------------------------------------------------------------
# What is recognised, what is refused


def test_a_config_without_a_class_is_told_by_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[OPEN_SORA], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = load(folders[OPEN_SORA]).encode_moments(make_video(3))
    for changed in (
        {key: value for key, value in config.items() if key != "_class_name"},
        {**config, "_class_name": None, "model_type": OPEN_SORA},
        {**config, "_class_name": None, "architectures": [OPEN_SORA]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert torch.equal(load(tmp_path).encode_moments(make_video(3)), expected)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "something"}))
    assert load(tmp_path).geometry == load(folders[OPEN_SORA]).geometry  # the published sizes
    with pytest.raises(ModelNotFound, match=r"missing, left over or misshapen, first spatial_vae\.module"):
        load(tmp_path).frozen.load()


def test_what_is_no_autoencoder_ends_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    def refused(kind: str, match: str, **changes: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folders[kind], folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelNotFound, match=match) as error:
            load(folder)  # none of its weights are needed to see it
        assert "\n" not in str(error.value) and str(error.value).startswith(f"vae.path={folder}: ")

    refused(COG, "AutoencoderKLAllegro is not known; known are AutoencoderKL,", _class_name="AutoencoderKLAllegro")
    refused(COG, "temporal_compression_ratio 8 is not known", temporal_compression_ratio=8)
    refused(COG, "no number scaling_factor", scaling_factor=None)
    refused(WAN, "no numbers latents_std", latents_std=None)
    refused(WAN, "standard deviation", latents_std=[1.0, 0.0, 1.0, 1.0])
    refused(MOCHI, "3 means of latents for 4 channels", latents_mean=[0.0, 0.0, 0.0])
    refused(OPEN_SORA, "temporal_downsample has 2 entries", vae_temporal={"temporal_downsample": [True, True]})


def test_weights_of_open_sora_are_read_strictly(folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(folders[OPEN_SORA] / "model.safetensors")
    name = "temporal_vae.encoder.conv_in.conv.weight"
    (tmp_path / "config.json").write_bytes((folders[OPEN_SORA] / "config.json").read_bytes())
    for changed, reason in (
        ({key: value for key, value in state.items() if key != name}, f"first {name}"),
        ({**state, "temporal_vae.more": torch.zeros(1)}, "first temporal_vae.more"),
        ({**state, name: state[name][:2].clone()}, f"first {name}"),
        ({**state, name: state[name] * torch.inf}, f"{name} is not finite"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ModelNotFound, match=reason):
            load(tmp_path).frozen.load()


def test_an_image_autoencoder_with_a_shift(tmp_path: Path) -> None:
    """As Stable Diffusion 3's and FLUX's."""
    vae = load(make_tiny_vae(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text()) | {"shift_factor": 0.25, "scaling_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shifted, moments = load(tmp_path), vae.encode_moments(make_video(2))
    assert isinstance(shifted, FrameVAE)
    mode = shifted.sample_latents(moments, None)
    torch.testing.assert_close(mode, (moments.chunk(2)[0] - 0.25) * 0.5)
    plain = vae.decode(vae.sample_latents(moments, None)[None], num_frames=2)
    torch.testing.assert_close(shifted.decode(mode[None], num_frames=2), plain)
