"""The planner's figures of video autoencoders, against counts of the networks themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora_repro.config import Config, ConfigError, DataConfig, VaeConfig
from opensora_repro.frozen.geometry import OPEN_SORA_VAE
from opensora_repro.frozen.vae import open_vae
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.sizes import latent_shape
from opensora_repro.planning.video_encoders import COUNTED
from tests.live_bytes import LiveBytes
from tests.tiny_models import TINY_OPEN_SORA, TINY_VIDEO_VAES, make_tiny_video_vae

OPEN_SORA = "VideoAutoencoderPipeline"
# An eighth of the published widths (Mochi's norms need a fourth), and as many layers
EIGHTHS: dict[str, dict[str, Any]] = {
    "AutoencoderKLCogVideoX": {"block_out_channels": (16, 32, 32, 64), "norm_num_groups": 8, "latent_channels": 2},
    "AutoencoderKLWan": {"base_dim": 12},
    "AutoencoderKLHunyuanVideo": {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8, "latent_channels": 2},
    "AutoencoderKLLTXVideo": {
        "block_out_channels": (16, 32, 64, 64), "decoder_block_out_channels": (16, 32, 64, 64), "latent_channels": 4,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 64, 64, 96), "decoder_block_out_channels": (32, 64, 128, 192),
    },
    OPEN_SORA: {},
}  # fmt: skip


def config(path: Path | str, frames: int, height: int = 64, width: int = 64, **vae: int) -> Config:
    data = DataConfig(num_frames=frames, height=height, width=width)
    return Config(data=data, vae=VaeConfig(path=str(path), **vae))


def make_eighth(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    if kind == OPEN_SORA:
        wider = {**TINY_OPEN_SORA["vae_2d"], "block_out_channels": [16, 32, 64, 64], "layers_per_block": 2}
        monkeypatch.setitem(TINY_OPEN_SORA, "vae_2d", wider)
        temporal = {"filters": 16, "num_res_blocks": 4, "num_groups": 8}
        monkeypatch.setitem(TINY_OPEN_SORA, "vae_temporal", temporal)
    else:
        monkeypatch.setitem(TINY_VIDEO_VAES, kind, EIGHTHS[kind])
    return make_tiny_video_vae(folder, kind)


def frames_of(kind: str) -> int:
    return 19 if kind == "AutoencoderKLMochi" else 17


@pytest.mark.parametrize("tile", [0, pytest.param(32, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", EIGHTHS)
def test_memory(kind: str, tile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is alive at most is within the figure, which is at most 1.6 times as much."""
    vae = open_vae(VaeConfig(str(make_eighth(tmp_path, kind, monkeypatch)), 1, tile), "cpu", torch.float32)
    frames, side = frames_of(kind), 64
    video, latents = torch.zeros(3, frames, side, side), torch.zeros(1, *vae.latent_shape(frames, side, side))
    sizes = frozen_sizes(config(tmp_path, frames, side, side, micro_batch_size=1, tile_size=tile))
    mean, std = vae.statistics()  # type: ignore[attr-defined]
    given = [*vae.vae.state_dict().values(), video, latents, mean, std]
    pixels = 4 * 3 * frames * side**2
    with LiveBytes(given) as live:
        vae.encode_moments(video)
    assert live.peak <= 4 * sizes.encoding_values + pixels  # the pixels in the weights' dtype
    assert 4 * sizes.encoding_values <= 1.6 * live.peak
    with LiveBytes(given) as live:
        vae.decode(latents, num_frames=frames)
    assert live.peak <= 4 * sizes.decoding_values + 3 * pixels  # as sampling_memory counts them
    assert 4 * sizes.decoding_values <= 1.6 * live.peak


def test_flops_of_open_sora_are_exact(tmp_path: Path) -> None:
    vae = open_vae(VaeConfig(str(make_tiny_video_vae(tmp_path, OPEN_SORA))), "cpu", torch.float32)
    for frames in (1, 17, 20):
        sizes = frozen_sizes(config(tmp_path, frames, 32, 48))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as encoding, torch.no_grad():
            vae.vae.encode_moments(torch.zeros(1, 3, frames, 32, 48))
        assert sizes.encode_flops == encoding.get_total_flops()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding, torch.no_grad():
            vae.vae.decode(torch.zeros(1, 4, vae.latent_frames(frames), 4, 6), num_frames=frames)
        assert sizes.decode_flops == decoding.get_total_flops()
    assert sizes.vae_parameters == sum(parameter.numel() for parameter in vae.vae.parameters())


def test_the_published_open_sora_autoencoder_is_known_by_name() -> None:
    cfg = config(OPEN_SORA_VAE, 102, 240, 426)
    assert frozen_sizes(cfg).vae_parameters == 393_341_007
    assert latent_shape(replace(cfg, data=replace(cfg.data, width=424))) == (4, 30, 30, 53)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", COUNTED)
def test_counts_of_published_sizes(kind: str, tmp_path: Path) -> None:
    """FLOPs and parameters of the classes at their defaults, which are the published sizes."""
    import diffusers

    frames = frames_of(kind)
    with torch.device("meta"):
        vae = getattr(diffusers, kind)().eval()
        with torch.no_grad():
            with FlopCounterMode(display=False) as encoding:
                z = vae.encode(torch.zeros(1, 3, frames, 64, 64)).latent_dist.mean
            with FlopCounterMode(display=False) as decoding:
                vae.decode(z)
    (tmp_path / "config.json").write_text(json.dumps({**vae.config, "_class_name": kind}))
    sizes = frozen_sizes(config(tmp_path, frames))
    assert sizes.vae_parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert sizes.encode_flops == pytest.approx(encoding.get_total_flops(), rel=0.03)
    assert sizes.decode_flops == pytest.approx(decoding.get_total_flops(), rel=0.03)


def test_frames_that_do_not_come_back(tmp_path: Path) -> None:
    make_tiny_video_vae(tmp_path, "AutoencoderKLHunyuanVideo")
    assert latent_shape(config(tmp_path, 17))[1] == 5
    with pytest.raises(ConfigError, match=r"^data\.num_frames: an AutoencoderKLHunyuanVideo takes 4k \+ 1 frames"):
        latent_shape(config(tmp_path, 16))
