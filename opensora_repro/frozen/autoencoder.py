"""The one interface of frozen autoencoders, of images and of videos: what everybody else knows of them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.files import sha256_of
from opensora_repro.frozen.geometry import Geometry, geometry_of
from opensora_repro.frozen.pretrained import FrozenModel, HashFile, check_complete
from opensora_repro.frozen.tiles import in_tiles
from opensora_repro.kernels.ops import to_device


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
        return self.frozen.get()

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
