"""The frozen autoencoder that a config names, and the one of images: Stable Diffusion's (arXiv:2112.10752).

Its latents are a sample of the posterior times a constant, frame by frame. Those of videos are in video_vae.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.frozen.autoencoder import Autoencoder, load_from_diffusers
from opensora_repro.frozen.geometry import IMAGE_KIND, kind_in
from opensora_repro.frozen.pretrained import FrozenModel, find_folder

if TYPE_CHECKING:
    from opensora_repro.config import VaeConfig

SD_LATENT_SCALE = 0.18215  # brings Stable Diffusion's latents to about unit variance
KIND = "diffusers AutoencoderKL"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # as diffusers looks for them


class FrameVAE(Autoencoder):
    """An AutoencoderKL applied to single frames, in micro-batches that never mix samples."""

    def __init__(self, frozen: FrozenModel[Any], micro_batch_size: int, dtype: torch.dtype, tile_size: int = 0) -> None:
        """Raises ModelNotFound for a model of another kind."""
        if micro_batch_size < 1:
            raise ValueError(f"vae.micro_batch_size={micro_batch_size} must be at least 1")
        super().__init__(frozen, IMAGE_KIND, dtype, tile_size)
        self.micro_batch_size = micro_batch_size
        self.scale = float(frozen.config.get("scaling_factor") or SD_LATENT_SCALE)
        self.shift = float(frozen.config.get("shift_factor") or 0.0)  # of Stable Diffusion 3's and FLUX's

    @torch.no_grad()  # not inference mode: latents and text may be saved for a backward pass
    def encode_moments(self, video: Tensor) -> Tensor:
        """Encode frames [C, T, H, W] in [-1, 1]; return float32 [2 * Cz, T, h, w], the mean and the log-variance.

        h and w are H and W divided by the stride; of pixels beyond a whole latent, the convolutions see some.

        A frame's moments depend on that frame alone: whatever the micro-batch, bit for bit on a CPU, to rounding on a
        GPU.
        """
        frames = rearrange(video, "c t h w -> t c h w")
        return rearrange(self._in_micro_batches(self._moments, frames), "t c h w -> c t h w")

    def encode_clips(self, videos: Sequence[Tensor]) -> Sequence[Tensor]:
        """All frames together: a micro-batch may hold several clips'."""
        return self.encode_moments(torch.cat(list(videos), dim=1)).split([v.shape[1] for v in videos], dim=1)

    def normalise(self, z: Tensor) -> Tensor:
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Decode scaled latents [B, Cz, T, h, w]; return float32 [B, 3, T, H, W] in [-1, 1]."""
        assert num_frames in (None, latents.shape[2])
        frames = rearrange(latents / self.scale + self.shift, "b c t h w -> b t c h w")
        videos = [self._in_micro_batches(self._pixels, sample) for sample in frames]
        return rearrange(videos, "b t c h w -> b c t h w").clamp(-1.0, 1.0)

    def _moments(self, frames: Tensor) -> Tensor:
        return self._encoded(lambda pixels: self.vae.encode(pixels).latent_dist.parameters, frames)

    def _pixels(self, latents: Tensor) -> Tensor:
        return self._decoded(lambda z: self.vae.decode(z).sample, latents)

    def _in_micro_batches(self, function: Any, frames: Tensor) -> Tensor:
        """Apply `function` to frames [T, C, H, W] a few at a time; return float32."""
        outputs = []
        with torch.autocast(self.vae.device.type, enabled=False):  # the weights' dtype decides, not the caller's
            for batch in frames.split(self.micro_batch_size):
                there = batch.to(self.vae.device, self.vae.dtype)
                if len(there) == 1 and there.device.type == "cpu":
                    # Kernels chosen for a batch of one round differently there: let a lone frame run twice.
                    there = there.expand(2, -1, -1, -1)
                outputs.append(function(there.contiguous())[: len(batch)].float())
        return torch.cat(outputs)


def open_vae(cfg: VaeConfig, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
    """The autoencoder `cfg.path`, a local folder or a hub name; its weights are read when first needed.

    Its config.json says which it is. Raises ModelNotFound for what can be seen without them.
    """
    kind = _kind_in(find_folder(cfg.path, key="vae.path", kind=KIND))
    if kind != IMAGE_KIND:
        from opensora_repro.frozen.video_vae import open_video_vae

        return open_video_vae(kind, cfg, device, dtype)

    def load(path: str, **options: Any) -> Any:
        return load_from_diffusers(IMAGE_KIND, path, device, dtype, options)

    frozen = FrozenModel(load, cfg.path, key="vae.path", kind=KIND, weights=WEIGHTS)
    return FrameVAE(frozen, cfg.micro_batch_size, dtype, cfg.tile_size)


def _kind_in(folder: Path) -> str:
    """As kind_in; for a config.json that cannot be read an AutoencoderKL's, whose opening says what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return IMAGE_KIND
    return kind_in(folder, config) if isinstance(config, dict) else IMAGE_KIND
