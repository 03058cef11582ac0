"""Rectified flow: straight paths between data and noise (Liu et al. 2022, arXiv:2209.03003).

Time t runs from 0 (data) to 1 (noise): `x_t = (1 - t) x_0 + t noise`, and the network predicts the constant velocity
`noise - x_0`. It sees the timestep 1000 t, so that its embedding covers the same range as with IDDPM.
Training times follow Esser et al. 2024 (arXiv:2403.03206): logit-normal, then shifted towards noise for larger latents.
Their shift is for pictures, whose noise more pixels average away. Frames of a video repeat one another, so they count
less here, as their fourth root, and the shift has an end: else a long video would be trained near pure noise alone.

`OpenSoraFlow` is the same objective as Open-Sora 1.2 has it, whose published weights need it: the velocity points to
the data, and the shift is by pixels and the square root of the frames, without an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, reduce
from torch import Tensor

from opensora_repro.diffusion.frame_masks import mean_over, per_frame

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig

NUM_TIMESTEPS = 1000.0  # the network's timestep at t = 1
REFERENCE_TOKENS = 256  # tokens at which the schedule is unshifted: one 256 px image (8x autoencoder, 2x2 patches)
OPEN_SORA_1_2 = "open_sora_1_2"  # of diffusion.schedule
MAX_SHIFT = 6.0  # one draw in 27 is then below t = 0.5; a shift of 16 leaves one in 360

# (x_t [B, C, T, H, W], timestep [B]) -> [B, C_out, T, H, W]; where frames are given also their mask, bool [B, T]
ModelFn = Callable[..., Tensor]
Size = tuple[int, int, int]  # of a sample in pixels: frames, height, width


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
    the model's output beyond the latent's own (a predicted variance) are ignored. `timestep_sampling`: how times are
    drawn before the shift, "logit-normal", "uniform", or "discrete", whole timesteps (to which sampling rounds too).
    """

    def __init__(
        self,
        *,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        shift: float = 0.0,
        timestep_sampling: str = "logit-normal",
    ) -> None:
        if shift < 0:
            raise ValueError(f"diffusion.shift={shift} must not be negative (0 derives it from the number of tokens)")
        if logit_std <= 0:
            raise ValueError(f"diffusion.logit_std={logit_std} must be positive")
        self.logit_mean, self.logit_std, self.shift = logit_mean, logit_std, shift
        self.timestep_sampling = timestep_sampling

    def shift_for(self, num_tokens: int, frames: int = 1, size: Size | None = None) -> float:
        """`size` in pixels is not asked here."""
        return self.shift if self.shift > 0 else resolution_shift(num_tokens, frames)

    def velocity(self, output: Tensor, num_channels: int) -> Tensor:
        """What a model's output [B, C_out, T, H, W] says of noise - x_0, [B, C, T, H, W]."""
        return output[:, :num_channels]

    def draw_timesteps(
        self, generators: Sequence[torch.Generator], num_tokens: int, frames: int = 1, *, size: Size | None = None
    ) -> Tensor:
        """Return float32 [B] in [0, 1000] on the CPU, one draw from each sample's own generator."""
        t = torch.cat([self._draw(generator).cpu() for generator in generators])
        if self.timestep_sampling == "logit-normal":
            t = torch.sigmoid(self.logit_mean + self.logit_std * t)
        return NUM_TIMESTEPS * shift_time(t, self.shift_for(num_tokens, frames, size))

    def _draw(self, generator: torch.Generator) -> Tensor:
        if self.timestep_sampling == "discrete":
            return torch.randint(int(NUM_TIMESTEPS), (1,), generator=generator, device=generator.device) / NUM_TIMESTEPS
        draw = torch.rand if self.timestep_sampling == "uniform" else torch.randn
        return draw(1, generator=generator, device=generator.device)

    def fixed_timesteps(self, shares: Sequence[float]) -> list[float]:
        """Timesteps at fixed shares of the noise range, unshifted, so that validation compares across sizes."""
        return [NUM_TIMESTEPS * share for share in shares]

    def sampling_times(self, steps: int, num_tokens: int, frames: int = 1, *, size: Size | None = None) -> Tensor:
        """The sampler's grid: float64 [steps + 1] from 1 down to 0, denser near noise where the shift exceeds 1."""
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if self.timestep_sampling == "discrete":
            times = (NUM_TIMESTEPS * times).round() / NUM_TIMESTEPS
        return shift_time(times, self.shift_for(num_tokens, frames, size))

    def losses(
        self,
        model_fn: ModelFn,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity for each sample: [B, C, T, H, W] twice and [B] -> float32 [B].

        Frames that `frame_mask` [B, T] gives (False) enter as they are, and are not counted. `model_fn` knows of them.
        """
        x_t = self.noised(latents, noise, timesteps, frame_mask=frame_mask)
        output = model_fn(x_t, timesteps)
        return self.losses_of(output, x_t, latents, noise, timesteps, frame_mask=frame_mask)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor, *, frame_mask: Tensor | None = None) -> Tensor:
        """x_t, what the model sees."""
        t = rearrange(timesteps.to(latents) / NUM_TIMESTEPS, "b -> b 1 1 1 1")
        x_t = (1 - t) * latents + t * noise
        return x_t if frame_mask is None else torch.where(per_frame(frame_mask), x_t, latents)

    def losses_of(
        self,
        output: Tensor,
        x_t: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """`losses` of a model's output at x_t."""
        velocity = self.velocity(output, latents.shape[1])
        errors = (velocity.float() - (noise - latents).float()).square()
        return reduce(errors, "b c t h w -> b", "mean") if frame_mask is None else mean_over(errors, frame_mask)


REFERENCE_AREA = 512 * 512  # pixels of the picture that Open-Sora 1.2 leaves unshifted
CHUNK, CHUNK_LATENTS = 17, 5  # frames that its autoencoder encodes at once, and what it makes of them


class OpenSoraFlow(RectifiedFlow):
    """Rectified flow as Open-Sora 1.2 was trained (schedule "open_sora_1_2").

    Its network predicts x_0 - noise. Without a fixed `shift` it is sqrt(pixels / 512^2 * F) * `transform_scale`, with F
    the latent frames of the clip's whole chunks of 17 frames. Of clips shorter than a chunk the original counts none,
    and trains them on nothing; here their latents count.
    """

    def __init__(self, *, transform_scale: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.transform_scale = transform_scale

    def shift_for(self, num_tokens: int, frames: int = 1, size: Size | None = None) -> float:
        """By `size`, which is needed unless the shift is fixed."""
        if self.shift > 0:
            return self.shift
        if size is None:
            raise ValueError('diffusion.schedule = "open_sora_1_2" needs the size in pixels')
        num_frames, height, width = size
        latent_frames = num_frames // CHUNK * CHUNK_LATENTS if num_frames >= CHUNK else math.ceil(num_frames / 4)
        return math.sqrt(height * width / REFERENCE_AREA * latent_frames) * self.transform_scale

    def velocity(self, output: Tensor, num_channels: int) -> Tensor:
        return -output[:, :num_channels]


def build_flow(cfg: DiffusionConfig) -> RectifiedFlow:
    settings: dict[str, Any] = {"logit_mean": cfg.logit_mean, "logit_std": cfg.logit_std, "shift": cfg.shift}
    settings["timestep_sampling"] = cfg.timestep_sampling or "logit-normal"
    if cfg.schedule == OPEN_SORA_1_2:
        return OpenSoraFlow(transform_scale=cfg.transform_scale, **settings)
    return RectifiedFlow(**settings)
