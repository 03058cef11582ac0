"""Gaussian diffusion with a learned variance (IDDPM: Nichol & Dhariwal 2021, arXiv:2102.09672).

The published models (DiT, PixArt, Open-Sora 1.0) train over all 1000 steps of a linear schedule, predict the noise and
an interpolation of the log variance, and minimise MSE plus the variational bound in bits. Sampling keeps a spaced
subset of the steps; the network always sees the original step number. Frames that are given as a condition are noised
to step 0, as Open-Sora 1.1 does, and not counted in the loss.

Index t below is an int64 tensor [B] into the (possibly respaced) steps. Tables are float64, rounded once, to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from opensora_repro.diffusion.flow import ModelFn, RectifiedFlow, Size, build_flow
from opensora_repro.diffusion.frame_masks import mean_over, per_frame

if TYPE_CHECKING:
    from opensora_repro.config import DiffusionConfig

NUM_TRAIN_STEPS = 1000
_DATA_BIN = 1 / 255  # half the width of an 8-bit level when data span [-1, 1]
_TINY = 1e-12  # smallest probability whose logarithm is taken


class Prediction(NamedTuple):
    """One denoising step: moments of x_{t-1} given x_t, and the denoised x_0; each [B, C, T, H, W]."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


def linear_betas() -> np.ndarray:
    """1e-4 to 0.02 over the training's steps (Ho et al. 2020), float64."""
    return np.linspace(1e-4, 0.02, NUM_TRAIN_STEPS, dtype=np.float64)


def space_timesteps(num_steps: int, count: int) -> list[int]:
    """`count` evenly spaced steps of [0, num_steps), ends included. Raises ValueError."""
    if not 1 <= count <= num_steps:
        raise ValueError(f"cannot keep {count} of {num_steps} diffusion steps; choose between 1 and {num_steps}")
    stride = (num_steps - 1) / (count - 1) if count > 1 else 1.0
    kept, position = set(), 0.0  # a running sum and Python's rounding, so that ties fall as in the published code
    for _ in range(count):
        kept.add(round(position))
        position += stride
    return sorted(kept)


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL divergence in nats between diagonal Gaussians, elementwise."""
    shift = (mean1 - mean2).square() * torch.exp(-log_var2)
    # Near-equal Gaussians leave only rounding: this order of terms keeps to the published values there.
    return 0.5 * (-1.0 + log_var2 - log_var1 + torch.exp(log_var1 - log_var2) + shift)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation that the published losses use (off by at most 2e-4)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability in nats of 8-bit data in [-1, 1] under a Gaussian; the outermost bins are open-ended."""
    centred, inverse_std = x - mean, torch.exp(-log_std)
    below_upper = _normal_cdf(inverse_std * (centred + _DATA_BIN))
    below_lower = _normal_cdf(inverse_std * (centred - _DATA_BIN))
    inside = torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    return torch.where(x < -0.999, below_upper, inside).clamp(min=_TINY).log()


def _mean(values: Tensor, frame_mask: Tensor | None) -> Tensor:
    return reduce(values, "b c t h w -> b", "mean") if frame_mask is None else mean_over(values, frame_mask)


def _mean_bits(nats: Tensor, frame_mask: Tensor | None = None) -> Tensor:
    """[B, C, T, H, W] nats -> [B] bits a dimension."""
    return _mean(nats, frame_mask) / math.log(2.0)


def respaced(alphas_cumprod: np.ndarray, kept: Sequence[int]) -> np.ndarray:
    """The betas with which a process over some of the steps has the same signal at them."""
    signal = alphas_cumprod[list(kept)]
    betas: np.ndarray = 1 - signal / np.append(1.0, signal[:-1])
    return betas


def schedule_tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Every per-step coefficient of the forward process and its posterior, float64 [num_steps] each."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The posterior of step 0 has no spread: its logarithm borrows step 1's (or, with one step alone, beta).
    clipped = np.append(posterior_variance[1:2] if len(betas) > 1 else betas[:1], posterior_variance[1:])
    return {
        "betas": betas,
        "log_betas": np.log(betas),
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(clipped),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    }


SPEED_MIRROR = 700  # step around which "speed" sampling mirrors its draws


def speed_probabilities() -> np.ndarray:
    """How likely "speed" sampling draws each step before it mirrors one half, float64 [1000].

    SpeeD (arXiv:2405.17403) as Open-Sora 1.1 has it: steps past about 640, where the noise hardly grows any more, are
    drawn a fifth as often as others.
    """
    growth = np.gradient(np.sqrt(1 - np.cumprod(1 - linear_betas())))
    weights = np.tanh(1e6 * (growth - 1e-4)) + 1.5
    found: np.ndarray = weights / weights.sum()
    return found


class GaussianDiffusion:
    """The process over a subset of the 1000 steps; all of them (the default) for training.

    The model tells the noise and where the log variance lies between its bounds. `timestep_sampling`: how training
    draws its steps, "uniform", or "speed" (see `speed_probabilities`), which weighs the MSE by 1 - alphas_cumprod.
    """

    def __init__(self, kept_steps: Sequence[int] | None = None, *, timestep_sampling: str = "uniform") -> None:
        signal = np.cumprod(1 - linear_betas())
        self.timestep_map = list(range(len(signal)) if kept_steps is None else kept_steps)
        self.tables = schedule_tables(respaced(signal, self.timestep_map))
        self.tables["timestep_map"] = np.array(self.timestep_map, dtype=np.float64)
        self.num_steps = len(self.timestep_map)
        self.timestep_sampling = timestep_sampling
        self._speed = torch.from_numpy(speed_probabilities()) if timestep_sampling == "speed" else None
        self.tables["speed_weights"] = 1 - self.tables["alphas_cumprod"]
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def spaced(cls, steps: int) -> GaussianDiffusion:
        """The sampling process of `steps` evenly spaced steps."""
        return cls(space_timesteps(NUM_TRAIN_STEPS, steps))

    def _lookup(self, name: str, t: Tensor) -> Tensor:
        """A table's values at t, float32 [B]; the table stays on the device, so that a step never waits for a copy."""
        key = (name, t.device)
        if key not in self._on_device:
            self._on_device[key] = torch.from_numpy(self.tables[name]).float().to(t.device)
        return self._on_device[key][t]

    def _at(self, name: str, t: Tensor) -> Tensor:
        return rearrange(self._lookup(name, t), "b -> b 1 1 1 1")

    def _seen_by_model(self, t: Tensor) -> Tensor:
        """Steps of this process -> the original step numbers, float32 [B]."""
        return self._lookup("timestep_map", t)

    # The forward process

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_t given x_0."""
        return self._at("sqrt_alphas_cumprod", t) * x_0 + self._at("sqrt_one_minus_alphas_cumprod", t) * noise

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, C, T, H, W], variance and clipped log variance [B, 1, 1, 1, 1] of x_{t-1} given x_t and x_0."""
        mean = self._at("posterior_mean_coef1", t) * x_0 + self._at("posterior_mean_coef2", t) * x_t
        return mean, self._at("posterior_variance", t), self._at("posterior_log_variance_clipped", t)

    # The reverse process

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read a model's output [B, 2C, T, H, W] at x_t as the distribution of x_{t-1}."""
        num_channels = x_t.shape[1]
        if output.shape[1] != 2 * num_channels:
            raise ValueError("diffusion.objective = iddpm needs model.pred_sigma = true: a variance for every channel")
        scaled_noise = self._at("sqrt_recipm1_alphas_cumprod", t) * output[:, :num_channels]
        x_0 = self._at("sqrt_recip_alphas_cumprod", t) * x_t - scaled_noise
        mean, _, smallest = self.q_posterior(x_0, x_t, t)
        share = (output[:, num_channels:] + 1) / 2  # -1: the posterior's variance, 1: beta
        return Prediction(mean, share * self._at("log_betas", t) + (1 - share) * smallest, x_0)

    def p_sample(
        self, model_fn: ModelFn, x_t: Tensor, t: Tensor, noise: Tensor, *masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One ancestral step: x_{t-1} and the denoised x_0. Nothing is added at step 0.

        `masks`: the frame mask, where there is one, for the model.
        """
        p = self.predict(model_fn(x_t, self._seen_by_model(t), *masks), x_t, t)
        noisy = rearrange(t > 0, "b -> b 1 1 1 1")
        return torch.where(noisy, p.mean + torch.exp(0.5 * p.log_variance) * noise, p.mean), p.x_0

    def ddim_sample(self, model_fn: ModelFn, x_t: Tensor, t: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        """One deterministic DDIM step (Song et al. 2021, arXiv:2010.02502, eq. 12 without noise): x_{t-1} and x_0."""
        x_0 = self.predict(model_fn(x_t, self._seen_by_model(t), *masks), x_t, t).x_0
        eps = (self._at("sqrt_recip_alphas_cumprod", t) * x_t - x_0) / self._at("sqrt_recipm1_alphas_cumprod", t)
        cleaner = self._at("alphas_cumprod_prev", t)
        return torch.sqrt(cleaner) * x_0 + torch.sqrt(1 - cleaner) * eps, x_0

    # Training

    def draw_timesteps(
        self, generators: Sequence[torch.Generator], num_tokens: int, frames: int = 1, *, size: Size | None = None
    ) -> Tensor:
        """Return float32 [B] step numbers on the CPU, one from each sample's generator, whatever the size."""
        return self._seen_by_model(torch.cat([self._draw(generator).cpu() for generator in generators]))

    def _draw(self, generator: torch.Generator) -> Tensor:
        if self._speed is None:
            return torch.randint(self.num_steps, (1,), generator=generator, device=generator.device)
        step = torch.multinomial(self._speed, 1, generator=generator)
        mirrored = torch.where(step < SPEED_MIRROR, SPEED_MIRROR - step, step - SPEED_MIRROR)
        return torch.where(torch.rand(1, generator=generator) < 0.5, step, mirrored)

    def fixed_timesteps(self, shares: Sequence[float]) -> list[float]:
        """Step numbers at fixed shares of the noise range."""
        return [float(self.timestep_map[round(share * (self.num_steps - 1))]) for share in shares]

    def bound_bits(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, *, frame_mask: Tensor | None = None
    ) -> Tensor:
        """The variational bound's term of step t: float32 [B] bits a dimension (at step 0 the decoder's likelihood)."""
        true_mean, _, true_log_variance = self.q_posterior(x_0, x_t, t)
        p = self.predict(output, x_t, t)
        kl = _mean_bits(normal_kl(true_mean, true_log_variance, p.mean, p.log_variance), frame_mask)
        decoder = -_mean_bits(discretized_log_likelihood(x_0, p.mean, 0.5 * p.log_variance), frame_mask)
        return torch.where(t == 0, decoder, kl)

    def loss_terms(
        self,
        output: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        *,
        frame_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms whose sum is the loss, float32 [B] each, for a model's output at x_t."""
        output = output.float()
        mean_part, variance_part = output.chunk(2, dim=1)
        # The bound trains the variance alone; MSE looks after the mean.
        both = torch.cat([mean_part.detach(), variance_part], dim=1)
        mse = _mean((noise - mean_part).square(), frame_mask)
        if self.timestep_sampling == "speed":
            mse = mse * self._lookup("speed_weights", t)
        return {"mse": mse, "vb": self.bound_bits(both, x_0, x_t, t, frame_mask=frame_mask)}

    def losses(
        self,
        model_fn: ModelFn,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        frame_mask: Tensor | None = None,
    ) -> Tensor:
        """The training loss of each sample: [B, C, T, H, W] twice and step numbers [B] -> float32 [B].

        Frames that `frame_mask` [B, T] gives (False) are noised to step 0 and not counted. `model_fn` knows of them.
        """
        x_t = self.noised(latents, noise, timesteps, frame_mask=frame_mask)
        output = model_fn(x_t, timesteps)
        return self.losses_of(output, x_t, latents, noise, timesteps, frame_mask=frame_mask)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor, *, frame_mask: Tensor | None = None) -> Tensor:
        """x_t, what the model sees."""
        assert self.num_steps == NUM_TRAIN_STEPS, "training is never respaced"
        t = timesteps.round().long()
        x_t = self.q_sample(latents, t, noise)
        if frame_mask is None:
            return x_t
        return torch.where(per_frame(frame_mask), x_t, self.q_sample(latents, torch.zeros_like(t), noise))

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
        terms = self.loss_terms(output, latents, x_t, timesteps.round().long(), noise, frame_mask=frame_mask)
        return torch.stack(list(terms.values())).sum(0)


# Both draw, and name, timesteps as the network sees them: float32 in [0, 1000].
Objective: TypeAlias = RectifiedFlow | GaussianDiffusion


def build_objective(cfg: DiffusionConfig) -> Objective:
    """The training objective of `diffusion.objective`. Raises ValueError for one that does not exist."""
    if cfg.objective == "flow":
        return build_flow(cfg)
    if cfg.objective == "iddpm":
        return GaussianDiffusion(timestep_sampling=cfg.timestep_sampling or "uniform")
    raise ValueError(f"diffusion.objective={cfg.objective!r} is unknown; expected 'iddpm' or 'flow'")
