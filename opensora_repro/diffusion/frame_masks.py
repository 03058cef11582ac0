"""Frame masks: which latent frames of a sample are generated (True), and which are given as a condition (False).

The modes are those that Open-Sora 1.1 and 1.2 train with. Two faults are mended: clips of two or three latent frames
can be masked in every mode, and no mask gives all frames, for there would be nothing to learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

if TYPE_CHECKING:
    from opensora_repro.config import FrameMasksConfig

LEAST_RANDOM, MOST_RANDOM = 0.1, 0.9  # share of given frames in mode "random"
TIMESTEPS = 1000  # levels are compared as timesteps, so that rounding decides as in the published code


class FrameMasks:
    """Draws a sample's mask from the shares of `[frame_masks]`; what they leave of 1 gives no frame."""

    def __init__(self, cfg: FrameMasksConfig, patch_frames: int = 1) -> None:
        """`patch_frames`: latent frames that a token covers, patch_size[0]; they are given together."""
        self.shares = {mode: share for mode, share in cfg.shares().items() if share}
        self.patch_frames, self.noise = patch_frames, cfg.noise

    def __bool__(self) -> bool:
        """Whether any frame is ever given."""
        return bool(self.shares)

    def draw(self, num_frames: int, generators: Iterable[torch.Generator]) -> Tensor | None:
        """Masks of samples of so many latent frames, bool [B, T], one from each sample's own generator.

        None where no frame of them is given.
        """
        if num_frames == 1 or not self.shares:
            return None
        tokens = -(-num_frames // self.patch_frames)
        masks = torch.stack([draw_mask(self._mode(generator), tokens, generator) for generator in generators])
        if masks.all():
            return None
        return repeat(masks, "b t -> b (t p)", p=self.patch_frames)[:, :num_frames]

    def with_noise(self, latents: Tensor, frame_mask: Tensor, generators: Iterable[torch.Generator]) -> Tensor:
        """Latents [B, C, T, H, W] whose given frames are noised a little, each sample's to a level of its own.

        The level is uniform from 0 to `frame_masks.noise`, of the flow's path from data (0) to noise (1). The model is
        told level 0: it learns that given frames may be imperfect, as those are that it made itself.
        """
        noised = []
        for sample, generator in zip(latents, generators, strict=True):
            level = self.noise * torch.rand((), generator=generator).to(sample.device)
            noise = torch.randn(sample.shape, generator=generator).to(sample.device)
            noised.append((1 - level) * sample + level * noise)
        return torch.where(per_frame(frame_mask).to(latents.device), latents, torch.stack(noised))

    def _mode(self, generator: torch.Generator) -> str:
        left = torch.rand((), generator=generator, dtype=torch.float64).item()
        for mode, share in self.shares.items():
            left -= share
            if left < 0:
                return mode
        return "none"


def draw_mask(mode: str, num_frames: int, generator: torch.Generator) -> Tensor:
    """One mask of a mode, bool [T]. A single frame is never given, nor are all frames: then the last is generated.

    quarter_*: at most a quarter of the frames, at least one; image_*: one frame; head, tail, head_tail: at the start,
    the end, or as many at either; quarter_random, image_random: anywhere, together; random: each with a probability
    that is itself drawn; interpolate: every second one.
    """
    mask = torch.ones(num_frames, dtype=torch.bool)
    if num_frames == 1 or mode == "none":
        return mask

    def integer(low: int, high: int) -> int:
        """Uniform in low .. high."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    extent, _, where = mode.partition("_")
    if mode == "random":
        share = LEAST_RANDOM + (MOST_RANDOM - LEAST_RANDOM) * torch.rand((), generator=generator)
        mask = torch.rand(num_frames, generator=generator) > share
    elif mode == "interpolate":
        mask[integer(0, 1) :: 2] = False
    elif extent in ("quarter", "image"):
        length = integer(1, max(num_frames // 4, 1)) if extent == "quarter" else 1
        if where == "random":
            first = integer(0, num_frames - length)
            mask[first : first + length] = False
        if "head" in where:
            mask[:length] = False
        if "tail" in where:
            mask[-length:] = False
    else:
        raise ValueError(f"frame mask {mode!r} is unknown")
    if not mask.any():
        mask[-1] = True
    return mask


def per_frame(values: Tensor) -> Tensor:
    """[B, T] as it lies over latents, [B, 1, T, 1, 1]."""
    return rearrange(values, "b t -> b 1 t 1 1")


def mean_over(values: Tensor, frame_mask: Tensor) -> Tensor:
    """The mean of [B, C, T, H, W] over each sample's generated frames, [B]; 0 where every frame is given."""
    of_frames = reduce(values, "b c t h w -> b t", "mean")
    kept = torch.where(frame_mask, of_frames, torch.zeros_like(of_frames))
    return kept.sum(1) / frame_mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class GivenFrames:
    """Latents that a sampler starts from, and how far each of their frames may be changed.

    `latents` [B, C, T, H, W] matter where the edit ratio is below 1. `ratios` [B, T] from 0 (kept as it is) to 1
    (generated from noise); between, a frame waits for the noise level of its ratio, and is generated from there.
    `region` [B, 1, 1, H, W] bool: of generated frames, too, only these places are, the others are those of `latents`;
    None: everywhere.
    """

    latents: Tensor
    ratios: Tensor
    region: Tensor | None = None

    def of(self, num_samples: int) -> GivenFrames:
        """One sample's, given to so many alike."""
        region = None if self.region is None else self.region.expand(num_samples, -1, -1, -1, -1)
        return GivenFrames(
            self.latents.expand(num_samples, -1, -1, -1, -1), self.ratios.expand(num_samples, -1), region
        )

    def into(self, noise: Tensor) -> Tensor:
        """What a sampler starts with: [B, C, T, H, W], noise in the frames that are generated from it."""
        given = per_frame((self.ratios < 1).to(noise.device))
        return torch.where(given, self.latents.to(noise), noise)

    def moving(self, level: float, device: torch.device) -> Tensor:
        """Which frames are generated at a noise level from 1 (noise) to 0, bool [B, T]."""
        return TIMESTEPS * self.ratios.to(device) >= TIMESTEPS * level
