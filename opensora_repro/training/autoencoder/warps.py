"""Equivariance: what is done to the latents must have been done to the picture that they are decoded to.

EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509) shrinks, turns and mirrors; latents that bear it are smoother, and a
diffusion model learns them in fewer steps. Shifting by less than the stride is ours: latents halfway between those of
two places then show the place between, so that a diffusion model's small error is a small error of place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

MIN_SIZE = 0.5  # of the sides after shrinking; the paper's 0.25 leaves too little of a small picture


@dataclass(frozen=True)
class Warp:
    """What is done to all samples of a micro-batch."""

    size: float = 1.0  # share of the sides that is left
    rotations: int = 0  # quarters, against the clock
    flip: bool = False  # left and right
    shift: tuple[float, float] = (0.0, 0.0)  # right and down, in latents' places

    def __call__(self, latents: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, Cz, T', h, w] and the videos [B, 3, T, H, W] that they are to give, both changed alike."""
        stride, sides = (
            video.shape[-1] // latents.shape[-1],
            [math.ceil(self.size * side) for side in latents.shape[-2:]],
        )
        return self._of(latents, sides, 1), self._of(video, [side * stride for side in sides], stride)

    def _of(self, x: Tensor, sides: Sequence[int], stride: int) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        if any(self.shift):
            frames = shifted(frames, *(places * stride for places in self.shift))
        if self.size < 1:
            frames = F.interpolate(frames, size=tuple(sides), mode="bilinear", antialias=True)
        frames = frames.flip(-1) if self.flip else frames
        return rearrange(frames.rot90(self.rotations, (-2, -1)), "(b t) c h w -> b c t h w", b=len(x))


def draw_warp(kinds: Sequence[str], stride: int, generator: torch.Generator) -> Warp:
    """One of `kinds` as loss.warps has them; shifts are whole pixels, up to half the stride."""
    which, first, second = torch.rand(3, generator=generator).tolist()
    kind = kinds[int(which * len(kinds))]
    if kind == "shrink":
        return Warp(size=MIN_SIZE + (1 - MIN_SIZE) * first)
    if kind == "turn":
        return Warp(rotations=1 + int(3 * first))
    if kind == "flip":
        return Warp(flip=True)
    right, down = (round((share - 0.5) * stride) / stride for share in (first, second))
    return Warp(shift=(right, down))


def shifted(frames: Tensor, right: float, down: float) -> Tensor:
    """[N, C, H, W] moved by so many places, linear between them, edges repeated."""
    height, width = frames.shape[-2:]
    moved = frames.new_tensor([[1.0, 0.0, -2 * right / width], [0.0, 1.0, -2 * down / height]])
    grid = F.affine_grid(moved.expand(len(frames), 2, 3), list(frames.shape), align_corners=False)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
