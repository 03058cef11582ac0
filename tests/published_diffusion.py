"""What the published diffusion code can besides the recipe's: the reference outputs are of all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from opensora_repro.diffusion.flow import ModelFn
from opensora_repro.diffusion.gaussian import (
    GaussianDiffusion,
    Prediction,
    _mean_bits,
    normal_kl,
    respaced,
    schedule_tables,
    space_timesteps,
)


def cosine_betas(num_steps: int = 1000) -> np.ndarray:
    """The squared-cosine schedule of Nichol & Dhariwal, betas capped at 0.999; float64 [num_steps]."""
    signal = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
    return np.array([min(1 - after / now, 0.999) for now, after in pairwise(signal)])


def section_timesteps(num_steps: int, sections: Sequence[int]) -> list[int]:
    """Divide [0, num_steps) into equal sections and keep sections[i] evenly spaced steps of the i-th."""
    base, extra = divmod(num_steps, len(sections))
    sizes = [base + (i < extra) for i in range(len(sections))]
    starts = [sum(sizes[:i]) for i in range(len(sections))]
    parts = zip(starts, sizes, sections, strict=True)
    return [start + step for start, size, count in parts for step in space_timesteps(size, count)]


def stride_timesteps(num_steps: int, count: int) -> list[int]:
    """Exactly `count` steps at an integer stride from 0 (DDIM's choice, Song et al. 2021)."""
    return next(
        list(range(0, num_steps, stride)) for stride in range(1, num_steps) if len(range(0, num_steps, stride)) == count
    )


class Float32Diffusion(GaussianDiffusion):
    """The process as Open-Sora 1.1 computes it: respaced betas are rounded to float32, and so is all that follows."""

    def __init__(self, kept_steps: Sequence[int] | None = None) -> None:
        super().__init__(kept_steps)
        tables = schedule_tables(self.tables["betas"].astype(np.float32))
        self.tables |= {name: table.astype(np.float32) for name, table in tables.items()}


class PublishedDiffusion(GaussianDiffusion):
    """`loss`: "mse" (the recipe's: MSE + bound, unscaled), "rescaled_mse" (bound times steps / 1000) or "kl" (bound
    times steps alone). `variance`: "learned_range", "fixed_large" or "fixed_small"; fixed ones train on MSE alone.
    `predicts`: "noise" or "x_0". `clip`: x_0 to [-1, 1].
    """

    def __init__(
        self,
        kept_steps: Sequence[int] | None = None,
        betas: np.ndarray | None = None,
        *,
        loss: str = "mse",
        variance: str = "learned_range",
        predicts: str = "noise",
        clip: bool = False,
    ) -> None:
        super().__init__(kept_steps)
        if betas is not None:
            self.tables |= schedule_tables(respaced(np.cumprod(1 - betas), self.timestep_map))
        self.loss, self.variance, self.predicts, self.clip = loss, variance, predicts, clip
        signal, clipped = self.tables["alphas_cumprod"], self.tables["posterior_log_variance_clipped"]
        self.tables["log_variance_fixed_large"] = np.append(clipped[0], np.log(self.tables["betas"][1:]))
        self.tables["alphas_cumprod_next"] = np.append(signal[1:], 0.0)
        self.tables["log_one_minus_alphas_cumprod"] = np.log(1 - signal)

    def q_mean_variance(self, x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [B, C, T, H, W], variance and log variance [B, 1, 1, 1, 1] of x_t given x_0."""
        mean = self._at("sqrt_alphas_cumprod", t) * x_0
        variance = self._at("sqrt_one_minus_alphas_cumprod", t) ** 2
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t)

    def prior_bits(self, x_0: Tensor) -> Tensor:
        """The bound's constant term, KL of the last x_t from a standard normal: float32 [B] bits a dimension."""
        mean, _, log_variance = self.q_mean_variance(x_0, torch.full((len(x_0),), self.num_steps - 1))
        zero = torch.zeros_like(x_0)
        return _mean_bits(normal_kl(mean, log_variance, zero, zero))

    def predict(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """Read a model's output [B, C or 2C, T, H, W] at x_t as the distribution of x_{t-1}."""
        told, rest = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        noise_share = self._at("sqrt_recipm1_alphas_cumprod", t)
        x_0 = told if self.predicts == "x_0" else self._at("sqrt_recip_alphas_cumprod", t) * x_t - noise_share * told
        x_0 = x_0.clamp(-1, 1) if self.clip else x_0
        mean, _, smallest = self.q_posterior(x_0, x_t, t)
        if self.variance == "learned_range":
            noise = (self._at("sqrt_recip_alphas_cumprod", t) * x_t - x_0) / noise_share
            return Prediction(mean, super().predict(torch.cat([noise, rest], dim=1), x_t, t).log_variance, x_0)
        large = self._at("log_variance_fixed_large", t)
        return Prediction(mean, (large if self.variance == "fixed_large" else smallest).expand_as(x_t), x_0)

    def ddim_noisy(self, model_fn: ModelFn, x_t: Tensor, t: Tensor, noise: Tensor, *, eta: float) -> Tensor:
        """One DDIM step with noise (Song et al. 2021, arXiv:2010.02502, eq. 12): x_{t-1}."""
        x_0 = self.predict(model_fn(x_t, self._seen_by_model(t)), x_t, t).x_0
        eps = (self._at("sqrt_recip_alphas_cumprod", t) * x_t - x_0) / self._at("sqrt_recipm1_alphas_cumprod", t)
        signal, cleaner = self._at("alphas_cumprod", t), self._at("alphas_cumprod_prev", t)
        sigma = eta * torch.sqrt((1 - cleaner) / (1 - signal)) * torch.sqrt(1 - signal / cleaner)
        return torch.sqrt(cleaner) * x_0 + torch.sqrt(1 - cleaner - sigma**2) * eps + sigma * noise  # none at step 0

    def loss_terms(
        self, output: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, *, frame_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert frame_mask is None
        if self.loss == "kl":
            return {"vb": self.bound_bits(output, x_0, x_t, t) * self.num_steps}
        if self.variance == "learned_range":
            terms = super().loss_terms(output, x_0, x_t, t, noise)
            return terms | {"vb": terms["vb"] * (self.num_steps / 1000 if self.loss == "rescaled_mse" else 1)}
        target = x_0 if self.predicts == "x_0" else noise
        return {"mse": reduce((target - output).square(), "b c t h w -> b", "mean")}
