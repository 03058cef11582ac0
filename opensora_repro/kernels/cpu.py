"""For many tokens on a CPU: what torch does in fewer passes over them than the twins in eager.py take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_repro.kernels import eager
from opensora_repro.kernels.choice import chosen

LARGE = 2**17  # numbers a sample; fewer stay in the caches, and then a call a sample takes longer than the passes


def pays(x: Tensor, *vectors: Tensor) -> bool:
    """Whether to compute here; `train.kernels = "eager"` asks for the twins, and torch.compile fuses by itself."""
    large = x.device.type == "cpu" and x.ndim == 4 and x[0].numel() >= LARGE
    one_type = all(vector.dtype == x.dtype for vector in vectors)
    return large and one_type and chosen() != "eager" and not torch.compiler.is_compiling()


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The modulation as LayerNorm's own weight and bias, which are one sample's."""
    if len(x) > 1:
        samples = zip(x.split(1), shift.split(1), scale.split(1), strict=True)
        return torch.cat([norm_modulate(*sample, eps) for sample in samples])
    return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), eps)


def residual_norm_modulate(
    x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x = eager.residual(x, gate, y)
    return x, norm_modulate(x, shift, scale, eps)
