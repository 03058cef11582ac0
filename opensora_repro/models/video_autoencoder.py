"""Open-Sora 1.2's video autoencoder: an image autoencoder frame by frame, and a temporal one over its latents.

The temporal one is MAGVIT-v2's tokenizer without its codebook (arXiv:2310.05737): convolutions are causal in time, and
an image is a clip of one frame. Its normalisation averages over a chunk's frames, so that causality ends at a chunk's:
the code of an image is not the first code of a clip that begins with it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from opensora_repro.models.autoencoder_config import TemporalVAEConfig, VideoAutoencoderConfig

Draw = Callable[[torch.Size], Tensor]  # standard normal noise of a shape
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class CausalConv3d(nn.Module):
    """[B, C, T, H, W]: frame t is made of frames up to t alone; zeros stand before the first one and around each."""

    def __init__(self, before: int, after: int, kernel_size: int, *, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel_size // 2
        self.padding = (side, side, side, side, kernel_size - time_stride, 0)
        self.conv = nn.Conv3d(before, after, kernel_size, stride=(time_stride, 1, 1), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


class ResBlock(nn.Module):
    def __init__(self, before: int, after: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, before)
        self.conv1 = CausalConv3d(before, after, 3, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, after)
        self.conv2 = CausalConv3d(after, after, 3, bias=False)
        if before != after:
            self.conv3 = CausalConv3d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv3(x) if hasattr(self, "conv3") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return residual + self.conv2(F.silu(self.norm2(x)))


def res_blocks(before: int, after: int, cfg: TemporalVAEConfig) -> nn.Sequential:
    widths = [before] + [after] * cfg.num_res_blocks
    return nn.Sequential(*(ResBlock(*pair, cfg.num_groups) for pair in pairwise(widths)))


class Encoder(nn.Module):
    """[B, C, T, H, W] -> [B, 2 * latent_embed_dim, T / stride, H, W]; T is a multiple of the stride."""

    def __init__(self, cfg: TemporalVAEConfig) -> None:
        super().__init__()
        widths = cfg.widths
        self.conv_in = CausalConv3d(cfg.in_out_channels, cfg.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(res_blocks(*pair, cfg) for pair in pairwise((cfg.filters, *widths)))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if halves else nn.Identity()
            for width, halves in zip(widths, cfg.temporal_downsample, strict=False)
        )
        self.res_blocks = res_blocks(widths[-1], widths[-1], cfg)
        self.norm1 = nn.GroupNorm(cfg.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * cfg.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = blocks(x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = self.res_blocks(x)
        return self.conv2(F.silu(self.norm1(x)))


class Decoder(nn.Module):
    """[B, latent_embed_dim, T, H, W] -> [B, C, T * stride, H, W]. Levels are numbered as the encoder's, used backwards.

    Time is doubled as space is by a pixel shuffle: of twice the channels, two neighbours are one channel at two times.
    """

    def __init__(self, cfg: TemporalVAEConfig) -> None:
        super().__init__()
        widths = cfg.widths
        self.conv1 = CausalConv3d(cfg.latent_embed_dim, widths[-1], 3)
        self.res_blocks = res_blocks(widths[-1], widths[-1], cfg)
        self.block_res_blocks = nn.ModuleList(
            res_blocks(above, width, cfg) for width, above in pairwise((*widths, widths[-1]))
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(above, 2 * above, 3) if doubles else nn.Identity()
            for above, doubles in zip(widths[1:], cfg.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(cfg.num_groups, cfg.widths[0])
        self.conv_out = CausalConv3d(cfg.widths[0], cfg.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = self.block_res_blocks[level](x)
            if level and isinstance(self.conv_blocks[level - 1], CausalConv3d):
                x = rearrange(self.conv_blocks[level - 1](x), "b (c s) t h w -> b c (t s) h w", s=2)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Latents of the frames of one chunk to the moments of its codes, and codes to latents of frames."""

    def __init__(self, cfg: TemporalVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.quant_conv = CausalConv3d(2 * cfg.latent_embed_dim, 2 * cfg.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(cfg.embed_dim, cfg.latent_embed_dim, 1)
        self.decoder = Decoder(cfg)

    def encode(self, x: Tensor) -> Tensor:
        """[B, C, T, h, w] -> moments [B, 2 * embed_dim, T', h, w]: mean and log-variance, not clamped.

        Zeros go before the first frame until the stride divides T.
        """
        return self.quant_conv(self.encoder(F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.cfg.stride, 0))))

    def decode(self, z: Tensor, *, num_frames: int) -> Tensor:
        """[B, embed_dim, T', h, w] -> [B, C, num_frames, h, w], without the frames that `encode` put before them."""
        return self.decoder(self.post_quant_conv(z))[:, :, -num_frames % self.cfg.stride :]


def kl_divergence(moments: Tensor) -> Tensor:
    """Of codes with these moments [B, 2 * C, ...] from a standard normal: [B], summed over all but the batch."""
    mean, logvar = moments.float().chunk(2, dim=1)
    logvar = logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


def sample_posterior(moments: Tensor, draw: Draw | None) -> Tensor:
    """[B, 2 * C, ...] -> [B, C, ...]: mean + standard deviation * noise; without `draw` the mean."""
    mean, logvar = moments.chunk(2, dim=1)
    if draw is None:
        return mean
    return mean + (0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)).exp() * draw(mean.shape).to(mean)


class SpatialVAE(nn.Module):
    """A diffusers AutoencoderKL over the frames of clips, so many at a time: whatever the number, frames are alone."""

    module: Any

    def __init__(self, vae: nn.Module, micro_batch_size: int | None) -> None:
        super().__init__()
        self.module, self.micro_batch_size = vae, micro_batch_size

    def encode(self, video: Tensor, draw: Draw | None) -> Tensor:
        """[B, 3, T, H, W] -> latents [B, C, T, h, w], samples where there is `draw`, else means; not scaled."""
        return self._in_micro_batches(
            lambda frames: sample_posterior(self.module.encode(frames).latent_dist.parameters, draw), video
        )

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, T, h, w] -> [B, 3, T, H, W]."""
        return self._in_micro_batches(lambda frames: self.module.decode(frames).sample, latents)

    def _in_micro_batches(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        parts = [function(part) for part in frames.split(self.micro_batch_size or len(frames))]
        return rearrange(torch.cat(parts), "(b t) c h w -> b c t h w", b=len(x))


class VideoAutoencoder(nn.Module):
    """The whole, under the published names `spatial_vae.module.*`, `temporal_vae.*`, `scale`, `shift`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, cfg: VideoAutoencoderConfig, image_vae: nn.Module, *, micro_batch_size: int | None = 4) -> None:
        """`image_vae`: a diffusers AutoencoderKL, which takes `micro_batch_size` frames at a time; None: all."""
        super().__init__()
        self.cfg = cfg
        self.spatial_vae = SpatialVAE(image_vae, micro_batch_size)
        self.temporal_vae = TemporalVAE(cfg.temporal)
        for name, values in (("scale", cfg.scale), ("shift", cfg.shift)):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None, None])

    def encode_moments(self, video: Tensor, draw: Draw | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> moments [B, 2 * Cz, T', h, w] of codes before shift and scale.

        The published pipeline samples the frames' latents as well: with `draw`; else their means are taken.
        """
        latents = self.spatial_vae.encode(video, draw) * self.cfg.latent_scale
        chunks = latents.split(self.cfg.chunks(latents.shape[2]), dim=2)
        return torch.cat([self.temporal_vae.encode(chunk) for chunk in chunks], dim=2)

    def encode(self, video: Tensor, draw: Draw | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> codes [B, Cz, T', h, w] of about unit variance.

        `draw` is called for the frames' latents, a micro-batch after the other, then for each chunk.
        """
        moments = self.encode_moments(video, draw)
        frames = [-(-size // self.cfg.temporal.stride) for size in self.cfg.chunks(video.shape[2])]
        chunks = [sample_posterior(chunk, draw) for chunk in moments.split(frames, dim=2)]
        return (torch.cat(chunks, dim=2) - self.shift) / self.scale

    def decode(self, z: Tensor, *, num_frames: int) -> Tensor:
        """Codes [B, Cz, T', h, w] of a clip of `num_frames` -> [B, 3, num_frames, H, W]."""
        return self.decode_codes(z * self.scale + self.shift, num_frames=num_frames)

    def decode_codes(self, z: Tensor, *, num_frames: int) -> Tensor:
        """As `decode`, of codes before shift and scale, as `encode_moments` tells them."""
        latents = self.decode_codes_to_latents(z, num_frames=num_frames)
        return self.spatial_vae.decode(latents / self.cfg.latent_scale)

    def decode_codes_to_latents(self, z: Tensor, *, num_frames: int) -> Tensor:
        """As `decode_codes`, to the frames' latents [B, C, num_frames, h, w], scaled."""
        sizes = self.cfg.chunks(num_frames)
        chunks = z.split([-(-size // self.cfg.temporal.stride) for size in sizes], dim=2)
        return torch.cat(
            [self.temporal_vae.decode(chunk, num_frames=n) for chunk, n in zip(chunks, sizes, strict=True)], dim=2
        )
