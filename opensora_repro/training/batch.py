"""From encoded samples to one micro-batch: every random number comes from the sample's own keyed generators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_repro.data.keyed import keyed_generator
from opensora_repro.diffusion.flow import count_frames, count_tokens
from opensora_repro.diffusion.objective import Objective
from opensora_repro.frozen.encoder import Encoded
from opensora_repro.frozen.vae import FrameVAE
from opensora_repro.kernels.transfer import to_device


@dataclass(frozen=True)
class Batch:
    """What the model and the loss take."""

    ids: list[str]
    latents: Tensor  # [B, C, T, h, w]
    noise: Tensor  # [B, C, T, h, w]
    timesteps: Tensor  # [B] float32
    text: Tensor  # [B, L, Ct]
    mask: Tensor  # [B, L] bool, in host memory, from where the captions' lengths are read without a wait
    drop_text: Tensor  # [B] bool
    weight: float  # 1, or 0 for the stand-in of a micro-batch without a readable sample
    num_tokens: int  # of all samples together

    def tensors(self) -> tuple[Tensor, ...]:
        return self.latents, self.noise, self.timesteps, self.text, self.mask, self.drop_text


class BatchBuilder:
    """Draws posterior sample, noise, timestep and text dropout, keyed by (seed, epoch, sample id)."""

    def __init__(
        self,
        vae: FrameVAE,
        objective: Objective,
        *,
        seed: int,
        batch_size: int,
        patch_size: Sequence[int],
        drop_probability: float,
        latent_shape: Sequence[int],
        text_shape: Sequence[int],
        device: torch.device,
    ) -> None:
        """`latent_shape` is [C, T, h, w], `text_shape` [L, Ct] of one sample."""
        self.vae, self.objective, self.seed, self.batch_size = vae, objective, seed, batch_size
        self.patch_size, self.drop_probability, self.device = patch_size, drop_probability, device
        self.latent_shape, self.text_shape = latent_shape, text_shape

    def build(self, samples: Sequence[tuple[int, Encoded]]) -> Batch:
        """A micro-batch of (epoch, sample) pairs; at least one."""

        def generators(stream: str) -> list[torch.Generator]:
            return [keyed_generator(self.seed, epoch, sample.id, stream) for epoch, sample in samples]

        latents = torch.stack(
            [
                self.vae.sample_latents(sample.moments, generator)
                for (_, sample), generator in zip(samples, generators("posterior"), strict=True)
            ]
        )
        num_tokens = count_tokens(latents.shape[1:], self.patch_size)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators("noise")])
        frames = count_frames(latents.shape[1:], self.patch_size)
        timesteps = self.objective.draw_timesteps(generators("timestep"), num_tokens, frames)
        chances = torch.cat([torch.rand(1, generator=g) for g in generators("text dropout")])
        return Batch(
            ids=[sample.id for _, sample in samples],
            latents=self._to_device(latents),
            noise=self._to_device(noise),
            timesteps=self._to_device(timesteps),
            text=self._to_device(torch.stack([sample.text for _, sample in samples])).float(),
            mask=torch.stack([sample.mask for _, sample in samples]),
            drop_text=self._to_device(chances < self.drop_probability),
            weight=1.0,
            num_tokens=num_tokens * len(samples),
        )

    def stand_in(self) -> Batch:
        """Zeros with weight 0: a rank without a readable sample still joins the others' exchange.

        As many samples as a batch has, for which memory is there and compiled blocks exist.
        """
        size, device = self.batch_size, self.device
        zeros = torch.zeros(size, *self.latent_shape, device=device)
        return Batch(
            ids=[],
            latents=zeros,
            noise=zeros,
            timesteps=torch.zeros(size, device=device),
            text=torch.zeros(size, *self.text_shape, device=device),
            mask=torch.ones(size, self.text_shape[0], dtype=torch.bool),
            drop_text=torch.zeros(size, dtype=torch.bool, device=device),
            weight=0.0,
            num_tokens=0,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device)
