"""Frozen autoencoders: the one interface that everybody else knows, and those of images (arXiv:2112.10752).

An image's latents are a sample of the posterior times a constant, frame by frame. Those of videos are in video_vae.py.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.files import sha256_of
from opensora_repro.frozen.geometry import IMAGE_KIND, Geometry, geometry_of
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, check_complete
from opensora_repro.frozen.tiles import in_tiles
from opensora_repro.kernels.ops import to_device

if TYPE_CHECKING:
    pass

SD_LATENT_SCALE = 0.18215  # brings Stable Diffusion's latents to about unit variance
KIND = "diffusers AutoencoderKL"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # as diffusers looks for them


class Autoencoder(ABC):
    """What takes clips to latents and back. Sizes and `sample_latents` need no weights; they are read when first used.

    An image is a clip of one frame. Moments are those of one clip, latents of one size come in batches.
    """

    def __init__(self, frozen: FrozenModel[Any], kind: str, dtype: torch.dtype, tile_size: int) -> None:
        """`tile_size`: in pixels, as `vae.tile_size`. Raises ModelNotFound for a model of another kind."""
        self.frozen, self.dtype, self.pixel_dtype = frozen, dtype, dtype
        self.geometry: Geometry = frozen.read(lambda config: geometry_of(config, kind))
        self.latent_channels, self.spatial_stride = self.geometry.latent_channels, self.geometry.spatial_stride
        self.temporal_stride = self.geometry.temporal_stride
        self.tile = self.geometry.tile(tile_size)  # in latents

    @property
    def vae(self) -> Any:
        """The network itself. Raises ModelNotFound."""
        return self.frozen.model

    def latent_frames(self, num_frames: int) -> int:
        """Latents of a clip of so many frames."""
        return self.geometry.latent_frames(num_frames)

    def check_frames(self, num_frames: int, where: str) -> None:
        """Raise ConfigError where decoding would give another number of frames than were encoded."""
        self.geometry.check_frames(num_frames, where)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[Cz, T', h, w] of a clip; pixels beyond whole latents have none."""
        stride = self.spatial_stride
        return self.latent_channels, self.latent_frames(num_frames), height // stride, width // stride

    def fingerprint(self, hash_file: HashFile = sha256_of) -> str:
        """Hash of what decides the moments: architecture and weights, as the files have them, dtype and tiles."""
        return self.frozen.fingerprint(hash_file, self.dtype, *([f"tile {self.tile}"] if self.tile else []))

    @abstractmethod
    def encode_moments(self, video: Tensor) -> Tensor:
        """Encode frames [C, T, H, W] in [-1, 1]; return float32 [2 * Cz, T', h, w], the mean and the log-variance.

        h and w are H and W divided by the stride.
        """

    @torch.no_grad()
    def encode_clips(self, videos: Sequence[Tensor]) -> Sequence[Tensor]:
        """The moments of several clips of one height and width."""
        return [self.encode_moments(video) for video in videos]

    def sample_latents(self, moments: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw scaled latents [Cz, T', h, w] from moments [2 * Cz, T', h, w]; without a generator, take the mode."""
        mean, logvar = rearrange(moments.float(), "(two c) t h w -> two c t h w", two=2).unbind(0)
        if generator is not None:
            noise = to_device(torch.randn(mean.shape, generator=generator, device=generator.device), mean.device)
            mean = mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise
        return self.normalise(mean)

    @abstractmethod
    def normalise(self, z: Tensor) -> Tensor:
        """The encoder's latents [..., Cz, T', h, w], brought to about unit variance."""

    @abstractmethod
    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """Decode scaled latents [B, Cz, T', h, w]; return float32 [B, 3, num_frames, H, W] in [-1, 1]."""

    def _encoded(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
        """`function` over pixels [..., H, W], in tiles where they are larger than one."""
        if not self.tile:
            return function(pixels)
        stride = self.spatial_stride
        height, width = (size // stride * stride for size in pixels.shape[-2:])
        return in_tiles(function, pixels[..., :height, :width], self.tile * stride, stride)

    def _decoded(self, function: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        return in_tiles(function, latents, self.tile) if self.tile else function(latents)


def load_from_diffusers(
    kind: str, path: str, device: torch.device | str, dtype: torch.dtype, options: dict[str, Any]
) -> Any:
    """The model of the class `kind` of diffusers; whole, or an error."""
    # diffusers imports bitsandbytes where it is installed, which then warns of a kernel that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import diffusers

    model = getattr(diffusers, kind)
    vae, info = model.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **options)
    check_complete(info)
    return vae.to(device).eval().requires_grad_(False)


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
        joined = videos[0][None] if len(videos) == 1 else torch.stack(videos)  # one is not copied
        return rearrange(joined, "b t c h w -> b c t h w").clamp_(-1.0, 1.0)

    def _moments(self, frames: Tensor) -> Tensor:
        return self._encoded(lambda pixels: self.vae.encode(pixels).latent_dist.parameters, frames)

    def _pixels(self, latents: Tensor) -> Tensor:
        return self._decoded(lambda z: self.vae.decode(z).sample, latents)

    def _in_micro_batches(self, function: Any, frames: Tensor) -> Tensor:
        """Apply `function` to frames [T, C, H, W] a few at a time; return float32."""
        joined = None
        with torch.autocast(self.vae.device.type, enabled=False):  # the weights' dtype decides, not the caller's
            for first in range(0, len(frames), self.micro_batch_size):
                batch = frames[first : first + self.micro_batch_size]
                there = batch.to(self.vae.device, self.vae.dtype)
                if len(there) == 1 and there.device.type == "cpu":
                    # Kernels chosen for a batch of one round differently there: let a lone frame run twice.
                    there = there.expand(2, -1, -1, -1)
                output = function(there.contiguous())[: len(batch)].float()
                if joined is None:  # as large as all of them: no copy of all is made at the end
                    joined = output.new_empty(len(frames), *output.shape[1:])
                joined[first : first + len(batch)] = output
        assert joined is not None
        return joined
