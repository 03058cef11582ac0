"""Frozen image autoencoders behind encode and decode on videos.

The latents are Stable Diffusion's (arXiv:2112.10752): a sample of the posterior times a constant, frame by frame.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.files import sha256_of
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, check_complete
from opensora_repro.kernels.ops import to_device

if TYPE_CHECKING:
    from opensora_repro.config import VaeConfig

SD_LATENT_SCALE = 0.18215  # brings Stable Diffusion's latents to about unit variance
KIND = "diffusers AutoencoderKL"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # as diffusers looks for them


class FrameVAE:
    """An AutoencoderKL applied to single frames, in micro-batches that never mix samples.

    Its sizes and `sample_latents` need no weights; `vae` is loaded at the first encoding or decoding.
    """

    def __init__(self, frozen: FrozenModel[Any], micro_batch_size: int, dtype: torch.dtype) -> None:
        """Raises ModelNotFound for a model of another kind."""
        if micro_batch_size < 1:
            raise ValueError(f"vae.micro_batch_size={micro_batch_size} must be at least 1")
        self.frozen = frozen
        self.micro_batch_size = micro_batch_size
        self.dtype = dtype
        self.scale = float(frozen.config.get("scaling_factor") or SD_LATENT_SCALE)
        self.spatial_stride = 2 ** (len(frozen.sizes("block_out_channels")) - 1)
        self.latent_channels = frozen.size("latent_channels")

    @property
    def vae(self) -> Any:
        """The AutoencoderKL. Raises ModelNotFound."""
        return self.frozen.get()

    def fingerprint(self, hash_file: HashFile = sha256_of) -> str:
        """Hash of what decides the moments: architecture and weights, as the files have them, and the dtype."""
        return self.frozen.fingerprint(hash_file, self.dtype)

    @torch.no_grad()  # not inference mode: latents and text may be saved for a backward pass
    def encode_moments(self, video: Tensor) -> Tensor:
        """Encode frames [C, T, H, W] in [-1, 1]; return float32 [2 * Cz, T, h, w], the mean and the log-variance.

        h and w are H and W divided by the stride; of pixels beyond a whole latent, the convolutions see some.

        A frame's moments depend on that frame alone: whatever the micro-batch, bit for bit on a CPU, to rounding on a
        GPU.
        """
        frames = rearrange(video, "c t h w -> t c h w")
        return rearrange(self._in_micro_batches(self._moments, frames), "t c h w -> c t h w")

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw scaled latents [Cz, T, h, w] from moments [2 * Cz, T, h, w]; without a generator, take the mode."""
        mean, logvar = rearrange(moments.float(), "(two c) t h w -> two c t h w", two=2).unbind(0)
        if generator is not None:
            noise = to_device(torch.randn(mean.shape, generator=generator, device=generator.device), mean.device)
            mean = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise
        return mean * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents [B, Cz, T, h, w]; return float32 [B, 3, T, H, W] in [-1, 1]."""
        frames = rearrange(latents / self.scale, "b c t h w -> b t c h w")
        videos = [self._in_micro_batches(self._pixels, sample) for sample in frames]
        return rearrange(videos, "b t c h w -> b c t h w").clamp(-1.0, 1.0)

    def _moments(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames).latent_dist.parameters

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample

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


def open_vae(cfg: VaeConfig, device: torch.device | str, dtype: torch.dtype) -> FrameVAE:
    """The autoencoder `cfg.path`, a local folder or a hub name; its weights are read when first needed.

    Raises ModelNotFound for what can be seen without them.
    """

    def load(path: str, **options: Any) -> Any:
        # diffusers imports bitsandbytes where it is installed, which then warns of a kernel that nobody asked for
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from diffusers import AutoencoderKL

        vae, info = AutoencoderKL.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **options)
        check_complete(info)
        return vae.to(device).eval().requires_grad_(False)

    frozen = FrozenModel(load, cfg.path, key="vae.path", kind=KIND, weights=WEIGHTS)
    return FrameVAE(frozen, cfg.micro_batch_size, dtype)
