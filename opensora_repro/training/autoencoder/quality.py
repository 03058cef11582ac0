"""How near reconstructed frames are to their source: PSNR in decibels, SSIM from -1 to 1."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5  # pixels: of SSIM's Gaussian window (Wang et al. 2004)
C1, C2 = 0.01**2, 0.03**2  # of SSIM, for values from 0 to 1
BEST_PSNR = 100.0  # decibels: of frames that are equal to the last bit


def psnr(found: Tensor, source: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame [N, C, H, W] in [-1, 1]; float32 [N]."""
    error = ((found - source) / 2).square().mean(dim=(1, 2, 3))
    return (-10 * error.log10()).clamp(max=BEST_PSNR)


def ssim(found: Tensor, source: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of frames [N, C, H, W] in [-1, 1]; float32 [N].

    The mean over channels and over the places where the whole 11 x 11 window lies inside, in the standard form with
    population covariances. Sides must be 11 pixels at least.
    """
    x, y = (found + 1) / 2, (source + 1) / 2
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (var_x + var_y + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _windowed(x: Tensor) -> Tensor:
    """Gaussian means of [N, C, H, W], rows first; no padding."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-0.5 * (places / SIGMA).square()).exp()
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(x, window, groups=x.shape[1])
    return F.conv2d(x, window.transpose(2, 3), groups=x.shape[1])
