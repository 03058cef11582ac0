"""What the autoencoder alone loses of held-out clips: no sample of a model behind it can be better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from opensora_repro.data.dataset import Clip, to_tensor
from opensora_repro.evaluation.clips import Clips
from opensora_repro.evaluation.distances import frechet_distance, jackknife, mean_of
from opensora_repro.evaluation.features import as_set
from opensora_repro.evaluation.quality import Found
from opensora_repro.evaluation.share import shared
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.training.autoencoder.quality import WINDOW, psnr, ssim


class Measures(Protocol):
    engine: TorchEngine

    @property
    def lpips(self) -> Any: ...

    def features_of(self, videos: list[np.ndarray]) -> list[Tensor]: ...

    def of_clips(self, clips: Clips) -> tuple[list[int], Tensor]: ...


def reconstruction(vae: Autoencoder, clips: Clips, common: Measures) -> Found:
    """Means over frames, then clips, of PSNR, SSIM and LPIPS; Frechet distance of reconstructed to real clips."""

    def work(part: Sequence[int]) -> list[tuple[dict[str, float], Tensor]]:
        return [_of_clip(vae, to_tensor(clip.pixels), common) for clip in clips.good(part)]

    found = shared(common.engine, range(len(clips)), work)
    metrics: Found = {name: mean_of(torch.tensor([of[name] for of, _ in found])) for name in found[0][0]}
    _, real = common.of_clips(clips)
    again = torch.stack([features for _, features in found])
    metrics["reconstruction_frechet"] = jackknife(lambda a, b: frechet_distance(as_set(a), as_set(b)), again, real)
    return metrics


def _of_clip(vae: Autoencoder, video: Tensor, common: Measures) -> tuple[dict[str, float], Tensor]:
    """Numbers of one clip [3, T, H, W] in [-1, 1], and the features of its reconstruction."""
    found = _given_back(vae, video, common.engine.device)
    source = video.to(found.device)[:, :, : found.shape[2], : found.shape[3]].float()
    both = [rearrange(x, "c t h w -> t c h w") for x in (found, source)]
    numbers = {"psnr": float(psnr(*both).mean())}
    if min(both[0].shape[2:]) >= WINDOW:
        numbers["ssim"] = float(ssim(*both).mean())
    if common.lpips is not None:
        numbers["lpips"] = float(common.lpips(*both).mean())
    return numbers, common.features_of([_pixels(found)])[0]


def given_back(vae: Autoencoder, clip: Clip, device: torch.device) -> np.ndarray:
    """What the autoencoder makes of a clip, uint8 [T, H, W, 3]: as a sample that equals it would look."""
    return _pixels(_given_back(vae, to_tensor(clip.pixels), device))


@torch.no_grad()
def _given_back(vae: Autoencoder, video: Tensor, device: torch.device) -> Tensor:
    """A clip [3, T, H, W] in [-1, 1] there and back, float32 [3, T, h, w]."""
    latents = vae.sample_latents(vae.encode_moments(video.to(device, vae.pixel_dtype)), None)
    return vae.decode(latents[None], num_frames=video.shape[1])[0].float().clamp(-1, 1)


def _pixels(video: Tensor) -> np.ndarray:
    pixels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    found: np.ndarray = rearrange(pixels, "c t h w -> t h w c").cpu().numpy()
    return found
