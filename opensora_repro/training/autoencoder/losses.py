"""What stage 0 trains, as one module that returns losses: the autoencoder and, if there is one, the discriminator.

Weights are those of Open-Sora 1.2: L1 and LPIPS count a pixel's mean, and the KL divergence of a frame is its sum over
the latents, divided by the frame's number of values, so that published weights of sums over a frame stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.config import ReconstructionConfig
from opensora_repro.frozen.perceptual import Lpips
from opensora_repro.models.video_autoencoder import kl_divergence, sample_posterior
from opensora_repro.training.autoencoder.discriminator import PatchDiscriminator, adaptive_weight
from opensora_repro.training.autoencoder.model import TemporalAutoencoder, Trained

# Of the loss, as they are logged, before their weights
PARTS = ("l1", "kl", "lpips", "image_latents", "adversarial", "discriminator")


@dataclass(frozen=True)
class Drawn:
    """Random numbers of a batch's samples: for the posterior, and for the noise that the decoder is shown."""

    posterior: Tensor  # [B, Cz, T', h, w]
    extra: Tensor  # [B, Cz, T', h, w]
    level: Tensor  # [B], from 0 to 1


class AutoencoderLosses(nn.Module):
    """Forward gives the loss of each sample, and its parts for people."""

    def __init__(self, autoencoder: Trained, cfg: ReconstructionConfig, lpips: Lpips | None = None) -> None:
        super().__init__()
        self.autoencoder, self.cfg = autoencoder, cfg
        self.vae = autoencoder.module
        self.discriminator: PatchDiscriminator | None = None
        if cfg.discriminator:
            self.discriminator = PatchDiscriminator(cfg.discriminator_channels, cfg.discriminator_layers)
        self._frozen = (lpips,)  # in a tuple, it is no part of the checkpoint

    def forward(self, video: Tensor, drawn: Drawn, step: int) -> tuple[Tensor, Tensor]:
        """Clips [B, 3, T, H, W] in [-1, 1] at a step counted from 0; losses float32 [B] and their parts [PARTS]."""
        batch, frames = len(video), video.shape[2]
        moments = self.autoencoder.moments(video)
        sampled = sample_posterior(moments, lambda shape: drawn.posterior)
        parts = {"kl": kl_divergence(moments) / video[0].numel()}
        if self.cfg.target == "latents":
            losses = self._of_latents(video, sampled, parts)
            return losses, self._told(losses, parts)
        found = self.autoencoder.decode(self._noised(sampled, drawn), num_frames=frames).float()
        parts["l1"] = (found - video).abs().mean(dim=(1, 2, 3, 4))  # [B]
        if self.cfg.image_latents and frames == 1:
            parts["image_latents"] = self._image_latents(video, sampled)
        flat_found, flat_source = (rearrange(x, "b c t h w -> (b t) c h w") for x in (found, video))
        (lpips,) = self._frozen
        if lpips is not None:
            parts["lpips"] = lpips(flat_found, flat_source).unflatten(0, (batch, frames)).mean(dim=1)
        losses = self._weighted(parts)
        if self.discriminator is not None:
            losses = self._against(self.discriminator, losses, parts, flat_found, flat_source, step)
        return losses, self._told(losses, parts)

    def _weighted(self, parts: dict[str, Tensor]) -> Tensor:
        cfg = self.cfg
        weights = {"l1": 1.0, "kl": cfg.kl, "lpips": cfg.lpips, "image_latents": cfg.image_latents}
        return sum((weights[name] * part for name, part in parts.items()), torch.zeros_like(parts["kl"]))

    def _told(self, losses: Tensor, parts: dict[str, Tensor]) -> Tensor:
        zero = losses.detach().new_zeros(())
        return torch.stack([parts[name].detach().float().mean() if name in parts else zero for name in PARTS])

    def _of_latents(self, video: Tensor, sampled: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """1.2's first stages: the frozen image autoencoder's latents are what is to come back."""
        assert isinstance(self.autoencoder, TemporalAutoencoder)
        source = self.autoencoder.frame_latents(video).float()  # [B, C, T, h, w]
        found = self.autoencoder.decode_frames(sampled, num_frames=video.shape[2]).float()
        parts["l1"] = (found - source).abs().mean(dim=(1, 2, 3, 4))
        if self.cfg.image_latents and video.shape[2] == 1:
            parts["image_latents"] = (sampled.float() - source).abs().mean(dim=(1, 2, 3, 4))
        return self._weighted(parts)

    def _image_latents(self, video: Tensor, sampled: Tensor) -> Tensor:
        assert isinstance(self.autoencoder, TemporalAutoencoder)
        return (sampled.float() - self.autoencoder.frame_latents(video).float()).abs().mean(dim=(1, 2, 3, 4))

    def _noised(self, latents: Tensor, drawn: Drawn) -> Tensor:
        """Latents as a diffusion model may leave them: nearly right. A decoder that has seen such mends them."""
        if not self.cfg.latent_noise:
            return latents
        level = drawn.level.reshape(-1, 1, 1, 1, 1) * self.cfg.latent_noise * latents.detach().std()
        return latents + level * drawn.extra

    def _against(
        self,
        judge: PatchDiscriminator,
        losses: Tensor,
        parts: dict[str, Tensor],
        found: Tensor,
        source: Tensor,
        step: int,
    ) -> Tensor:
        """The losses with the judge's and the judged's parts from the step on where they count."""
        if step < self.cfg.discriminator_start:
            return losses + 0 * sum(parameter.sum() for parameter in judge.parameters())  # DDP wants a gradient of all
        batch, frames = len(losses), len(found) // len(losses)
        adversarial = -judge.judged(found).unflatten(0, (batch, frames)).mean(dim=1)  # [B]
        weight: float | Tensor = self.cfg.discriminator
        if self.cfg.discriminator_adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(losses.mean(), adversarial.mean(), self.autoencoder.last_layer)
        own = judge.loss(found, source).unflatten(0, (batch, frames)).mean(dim=1)
        parts |= {"adversarial": adversarial, "discriminator": own}
        return losses + weight * adversarial + own
