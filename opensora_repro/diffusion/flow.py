"""Rectified flow: straight paths between data and noise (Liu et al. 2022, arXiv:2209.03003).

Time t runs from 0 (data) to 1 (noise): `x_t = (1 - t) x_0 + t noise`, and the network predicts the constant velocity
`noise - x_0`. It sees the timestep 1000 t, so that its embedding covers the same range as with IDDPM.
Training times follow Esser et al. 2024 (arXiv:2403.03206): logit-normal, then shifted towards noise for larger latents.
Their shift is for pictures, whose noise more pixels average away. Frames of a video repeat one another, so they count
less here, as their fourth root, and the shift has an end: else a long video would be trained near pure noise alone.
(Open-Sora 1.2 takes the square root of the frames, but of an autoencoder that makes 5 out of 17, and no end.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce
from torch import Tensor

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig

NUM_TIMESTEPS = 1000.0  # the network's timestep at t = 1
REFERENCE_TOKENS = 256  # tokens at which the schedule is unshifted: one 256 px image (8x autoencoder, 2x2 patches)
MAX_SHIFT = 6.0  # one draw in 27 is then below t = 0.5; a shift of 16 leaves one in 360

ModelFn = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, C, T, H, W], timestep [B]) -> [B, C_out, T, H, W]


def resolution_shift(num_tokens: int, frames: int = 1) -> float:
    """sqrt(m / n) of Esser et al. (section 5.3.2): more tokens need more noise to hide the same picture.

    m are a frame's tokens; times the fourth root of the frames, and `MAX_SHIFT` at most.
    """
    return min(math.sqrt(num_tokens / frames / REFERENCE_TOKENS) * frames**0.25, MAX_SHIFT)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times in [0, 1] towards noise (shift > 1) or data (shift < 1); 0 and 1 stay."""
    return shift * t / (1 - t + shift * t)  # Esser et al.'s s t / (1 + (s - 1) t), exact at both ends


class RectifiedFlow:
    """The training objective and the time grid that its sampler walks.

    `shift > 0` fixes the shift; 0 takes it from the numbers of tokens and frames, see `resolution_shift`. Channels of
    the model's output beyond the latent's own (a predicted variance) are ignored.
    """

    def __init__(self, *, logit_mean: float = 0.0, logit_std: float = 1.0, shift: float = 0.0) -> None:
        if shift < 0:
            raise ValueError(f"diffusion.shift={shift} must not be negative (0 derives it from the number of tokens)")
        if logit_std <= 0:
            raise ValueError(f"diffusion.logit_std={logit_std} must be positive")
        self.logit_mean, self.logit_std, self.shift = logit_mean, logit_std, shift

    def shift_for(self, num_tokens: int, frames: int = 1) -> float:
        return self.shift if self.shift > 0 else resolution_shift(num_tokens, frames)

    def draw_timesteps(self, generators: Sequence[torch.Generator], num_tokens: int, frames: int = 1) -> Tensor:
        """Return float32 [B] in [0, 1000] on the CPU, one draw from each sample's own generator."""
        normal = torch.cat([torch.randn(1, generator=g, device=g.device).cpu() for g in generators])
        t = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return NUM_TIMESTEPS * shift_time(t, self.shift_for(num_tokens, frames))

    def fixed_timesteps(self, shares: Sequence[float]) -> list[float]:
        """Timesteps at fixed shares of the noise range, unshifted, so that validation compares across sizes."""
        return [NUM_TIMESTEPS * share for share in shares]

    def sampling_times(self, steps: int, num_tokens: int, frames: int = 1) -> Tensor:
        """The sampler's grid: float64 [steps + 1] from 1 down to 0, denser near noise where the shift exceeds 1."""
        return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.shift_for(num_tokens, frames))

    def losses(self, model_fn: ModelFn, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of the velocity for each sample: [B, C, T, H, W] twice and [B] -> float32 [B]."""
        x_t = self.noised(latents, noise, timesteps)
        return self.losses_of(model_fn(x_t, timesteps), x_t, latents, noise, timesteps)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, what the model sees."""
        t = rearrange(timesteps.to(latents) / NUM_TIMESTEPS, "b -> b 1 1 1 1")
        return (1 - t) * latents + t * noise

    def losses_of(self, output: Tensor, x_t: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`losses` of a model's output at x_t."""
        velocity = output[:, : latents.shape[1]]
        return reduce((velocity.float() - (noise - latents).float()).square(), "b c t h w -> b", "mean")


def build_flow(cfg: DiffusionConfig) -> RectifiedFlow:
    return RectifiedFlow(logit_mean=cfg.logit_mean, logit_std=cfg.logit_std, shift=cfg.shift)
