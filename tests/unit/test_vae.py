"""The frozen autoencoder: frames on their own, posterior sample or mode, scale, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.config import Config, DataConfig, VaeConfig
from opensora_repro.frozen.autoencoder import SD_LATENT_SCALE, FrameVAE
from opensora_repro.frozen.pretrained import ModelNotFound, find_folder
from opensora_repro.frozen.vae import open_vae
from opensora_repro.planning.encoders import frozen_sizes
from tests.live_bytes import LiveBytes
from tests.tiny_models import TINY_LATENT_CHANNELS, TINY_STRIDE, make_tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vae(tmp_path_factory.mktemp("vae"))


def load(folder: Path, micro_batch_size: int = 4, dtype: torch.dtype = torch.float32) -> FrameVAE:
    return open_vae(VaeConfig(str(folder), micro_batch_size), "cpu", dtype)


@pytest.fixture(scope="module")
def vae(folder: Path) -> FrameVAE:
    return load(folder)


def make_video(frames: int = 7, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encoding_is_frame_by_frame_bit_for_bit(folder: Path, vae: FrameVAE) -> None:
    video = make_video()
    moments = vae.encode_moments(video)
    assert moments.shape == (2 * TINY_LATENT_CHANNELS, 7, 32 // TINY_STRIDE, 48 // TINY_STRIDE)
    assert moments.dtype == torch.float32 and not moments.requires_grad and not moments.is_inference()
    for micro_batch_size in (1, 2, 3, 16):
        assert torch.equal(load(folder, micro_batch_size).encode_moments(video), moments), micro_batch_size
    for frame in range(7):
        assert torch.equal(vae.encode_moments(video[:, frame : frame + 1])[:, 0], moments[:, frame])
    changed = video.clone()
    changed[:, 3] = -changed[:, 3]
    difference = (vae.encode_moments(changed) != moments).flatten(2).any(dim=2).any(dim=0)
    assert difference.tolist() == [False, False, False, True, False, False, False]


def test_decoding_is_frame_by_frame_bit_for_bit(folder: Path) -> None:
    latents = torch.randn(2, TINY_LATENT_CHANNELS, 5, 4, 6, generator=torch.Generator().manual_seed(2))
    pixels = load(folder).decode(latents)
    for micro_batch_size in (1, 2, 3, 16):
        assert torch.equal(load(folder, micro_batch_size).decode(latents), pixels), micro_batch_size


@pytest.mark.parametrize("way", ["encoding", "decoding"])
def test_a_few_frames_at_a_time_take_less_memory(way: str, tmp_path: Path) -> None:
    """As much as the planner says, for an autoencoder of the published proportions."""
    from diffusers import AutoencoderKL

    widths, norms = (16, 32, 64, 64), 4
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, norm_num_groups=norms, **kinds)
    vae.save_pretrained(tmp_path)
    side, frames = 64, 8
    video, latents = torch.zeros(3, frames, side, side), torch.zeros(1, 4, frames, side // 8, side // 8)
    for at_once in (2, 4, 8):
        loaded = load(tmp_path, at_once)
        given = [*loaded.vae.state_dict().values(), video, latents]
        with LiveBytes(ignored=given) as live:
            loaded.encode_moments(video) if way == "encoding" else loaded.decode(latents)
        cfg = Config(data=DataConfig(num_frames=frames, height=side, width=side), vae=VaeConfig(str(tmp_path), at_once))
        planned = frozen_sizes(cfg)
        values = planned.encoding_values if way == "encoding" else planned.decoding_values
        results = 4 * (8 * frames * (side // 8) ** 2 if way == "encoding" else 3 * frames * side**2)
        assert live.peak == pytest.approx(4 * values + results, rel=0.1)


def test_moments_are_the_librarys(vae: FrameVAE) -> None:
    video = make_video()
    with torch.no_grad():
        expected = vae.vae.encode(rearrange(video, "c t h w -> t c h w")).latent_dist
    mean, logvar = rearrange(vae.encode_moments(video), "(two c) t h w -> two t c h w", two=2)
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(logvar, expected.logvar)


def test_sample_and_mode(vae: FrameVAE) -> None:
    moments = vae.encode_moments(make_video(32))
    mean, logvar = moments.chunk(2)
    assert vae.scale == SD_LATENT_SCALE
    mode = vae.sample_latents(moments, None)
    torch.testing.assert_close(mode, mean * SD_LATENT_SCALE)

    draws = [vae.sample_latents(moments, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    standard = (draws[0] - mode) / (SD_LATENT_SCALE * (0.5 * logvar).exp())
    assert standard.mean().abs().item() < 0.05 and standard.std().item() == pytest.approx(1, abs=0.05)


def test_scale_comes_from_the_models_config(folder: Path, tmp_path: Path) -> None:
    make_tiny_vae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"scaling_factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    moments = load(folder).encode_moments(make_video())
    ours, half = (load(path).sample_latents(moments, None) for path in (folder, tmp_path))
    torch.testing.assert_close(half / 0.5, ours / SD_LATENT_SCALE)


def test_decode(vae: FrameVAE) -> None:
    assert (vae.spatial_stride, vae.latent_channels) == (TINY_STRIDE, TINY_LATENT_CHANNELS)
    latents = torch.randn(2, 4, 5, 4, 6)
    video = vae.decode(latents)
    assert video.shape == (2, 3, 5, 32, 48) and video.dtype == torch.float32
    assert video.abs().max().item() <= 1
    # neither its neighbours in the batch nor the frames around it change a picture
    assert torch.equal(vae.decode(latents[1:]), video[1:])
    torch.testing.assert_close(vae.decode(latents[:, :, 2:3]), video[:, :, 2:3])
    with torch.no_grad():
        frame = vae.vae.decode(latents[:1, :, 0] / vae.scale).sample
    torch.testing.assert_close(video[:1, :, 0], frame.clamp(-1, 1))


def test_autocast_and_gradients_do_not_reach_the_frozen_model(vae: FrameVAE) -> None:
    video = make_video(2).requires_grad_()
    expected = vae.encode_moments(video)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode_moments(video), expected)
    assert not any(parameter.requires_grad for parameter in vae.vae.parameters())


def test_sizes_off_the_stride_give_whole_latents(vae: FrameVAE) -> None:
    """As published buckets have them: 426 pixels, 53 latents."""
    assert vae.encode_moments(make_video(1, 36, 47)).shape[-2:] == (4, 5)


def test_fingerprint_follows_weights_and_dtype(folder: Path, tmp_path: Path) -> None:
    assert load(folder).fingerprint() == load(folder, micro_batch_size=1).fingerprint()
    assert load(folder, dtype=torch.bfloat16).fingerprint() != load(folder).fingerprint()
    other = load(folder).vae
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint() != load(folder).fingerprint()


def test_half_precision_on_disk(folder: Path, tmp_path: Path) -> None:
    load(folder).vae.half().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.vae.dtype == torch.float32
    torch.testing.assert_close(
        loaded.encode_moments(make_video()), load(folder).encode_moments(make_video()), atol=0.02, rtol=0.02
    )


def test_wrong_folders_end_in_one_line(folder: Path, tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path, "no config.json in this folder"),
        (Path(__file__), "no such folder"),
    ):
        check_error(path, reason)

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    check_error(tmp_path, "cannot be loaded as a diffusers AutoencoderKL")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not safetensors")
    check_error(tmp_path, "cannot be loaded as a diffusers AutoencoderKL")


def test_the_folder_above_an_autoencoder_names_it(folder: Path, tmp_path: Path) -> None:
    """A run of stage 0, or a published pipeline."""
    for name in ("text", "transformer", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    check_error(tmp_path, rf"no config.json in this folder, .*; did you mean {tmp_path}/vae\?")
    with pytest.raises(ModelNotFound, match=rf"; did you mean {tmp_path}/text\?"):
        find_folder(str(tmp_path), key="text.path", kind="T5 encoder")


def check_error(path: Path, reason: str) -> None:
    with pytest.raises(ModelNotFound, match=reason) as error:
        load(path).frozen.load()
    message = str(error.value)
    assert message.startswith(f"vae.path={path}: ") and "\n" not in message and len(message) < 500


def test_weights_of_another_size_are_an_error(folder: Path, tmp_path: Path) -> None:
    """The library alone would draw what does not fit at random."""
    make_tiny_vae(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"block_out_channels": [8, 8, 16, 32]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_error(tmp_path, "cannot be loaded as a diffusers AutoencoderKL")
