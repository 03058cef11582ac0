"""The memory-bound operations between a block's matrix products: each its eager twin, or one fused kernel.

Which one is a setting of the process, `train.kernels`. Triton is imported where it is first needed and compiles a
kernel where it is first run; without it everything here works in eager mode. On a CPU the norm has a third way, for
many tokens: what torch does in fewer passes over them than the twin takes.

What the arguments mean stands at the twins in eager.py. Under autocast a fused `norm_modulate` gives the autocast dtype
at once, to which the linear layer that reads it would round its input; the eager one leaves that to the layer.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_repro.errors import UserError
from opensora_repro.kernels import eager

CHOICES = ("auto", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYER_NORM_EPS = 1e-6  # of all published models
MAX_CHANNELS = 8192  # a row of tokens is held at once
SHORT_FRAMES = 64  # a program of attention over time has all frames of a place
LARGE = 2**17  # numbers a sample; fewer stay in a CPU's caches, and then a call a sample takes longer than the passes

_chosen = "auto"
_found: dict[str, bool] = {}  # device type -> whether `choose` found that fused kernels run there


class KernelsError(UserError):
    """Kernels that cannot run here; one line meant for the user."""


def choose(kernels: str, device_type: str) -> str:
    """Set what this process computes with and return what that is on the device, "eager" or "triton".

    "auto" is triton on CUDA devices where it imports, else eager. Triton's interpreter (TRITON_INTERPRET=1) runs the
    fused kernels on a CPU, slowly, and only where "triton" asks for them. Raises KernelsError.
    """
    global _chosen
    assert kernels in CHOICES, kernels
    found = "triton" if _runs_on(device_type, kernels) else "eager"
    if kernels == "triton" and found != "triton":
        reason = missing_triton() or f"Triton needs a CUDA device, this run computes on {device_type}"
        raise KernelsError(f'train.kernels = "triton" cannot run here: {reason}; set train.kernels=auto or eager')
    _chosen = kernels
    _found.clear()
    _found[device_type] = found == "triton"
    return found


def chosen() -> str:
    """What `choose` was last given; "auto" before."""
    return _chosen


def fused(x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel: not in what torch.compile is given, which fuses itself."""
    return not torch.compiler.is_compiling() and runs(x)


def runs(x: Tensor) -> bool:
    """As `fused`, for kernels that torch.compile takes as they are, since it could not make such ones itself."""
    if x.device.type not in _found:
        if torch.compiler.is_compiling():  # it would compile the search, too
            return False
        _found[x.device.type] = _runs_on(x.device.type, _chosen)
    return x.dtype in DTYPES and _found[x.device.type]


def _runs_on(device_type: str, kernels: str) -> bool:
    if kernels == "eager" or missing_triton():
        return False
    return device_type == "cuda" or (kernels == "triton" and interpreted())


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def missing_triton() -> str:
    """Why Triton cannot be imported; empty where it can."""
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken installation raises whatever it likes
        return f"the package triton cannot be imported ({' '.join(str(error).split())[:160]})"
    return ""


# The operations


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of `F.linear`; the product is a library's in any case."""
    return bias_gelu(F.linear(x, weight), bias) if fused(x) else bias_gelu(F.linear(x, weight, bias), None)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    shift, scale = _of_each(x, shift), _of_each(x, scale)
    if not _fused_rows(x):
        norm = norm_by_sample if pays(x, shift, scale) else eager.norm_modulate
        return norm(x, shift, scale, eps)
    from opensora_repro.kernels.fused.norm import norm_modulate as kernel

    dtype = _normed_dtype(x, shift, scale)
    tokens, shift, scale = _as_samples(x, shift, scale, like=shift)
    return _as_frames(kernel(tokens, shift, scale, eps, dtype), x)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    if not _fused_rows(x):
        return eager.gate_residual(x, gate, y)
    from opensora_repro.kernels.fused.gate import gate_residual as kernel

    return _as_frames(kernel(*_as_samples(x, _of_each(x, gate), y, like=gate)), x)


def residual_norm_modulate(
    x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor, eps: float = LAYER_NORM_EPS
) -> tuple[Tensor, Tensor]:
    shift, scale = _of_each(x, shift), _of_each(x, scale)
    if not _fused_rows(x):
        if not pays(x, shift, scale):
            return eager.residual_norm_modulate(x, gate, y, shift, scale, eps)
        x = eager.residual(x, gate, y)
        return x, norm_by_sample(x, shift, scale, eps)
    from opensora_repro.kernels.fused.norm import residual_norm_modulate as kernel

    given = None if gate is None else _of_each(x, gate)
    dtype = _normed_dtype(x, shift, scale)
    tokens, given, y, shift, scale = _as_samples(x, given, y, shift, scale, like=shift)
    total, normed = kernel(tokens, given, y, shift, scale, eps, dtype)
    return _as_frames(total, x), _as_frames(normed, x)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    if not fused(x):
        return eager.bias_gelu(x, bias)
    from opensora_repro.kernels.fused.gelu import bias_gelu as kernel

    return kernel(x, bias)


def attends_in_place(x: Tensor) -> bool:
    """Whether `time_attention` of tokens [B, T, S, ...] is one kernel, which reads and writes them where they are."""
    return runs(x) and x.shape[1] <= SHORT_FRAMES


def time_attention(qkv: Tensor, num_heads: int) -> Tensor:
    if not attends_in_place(qkv):
        return eager.time_attention(qkv, num_heads)
    from opensora_repro.kernels.fused.attention import short_attention

    return short_attention(qkv, num_heads)


def adamw(params: Sequence[Tensor], *tensors: Sequence[Any], **options: Any) -> None:
    """All tensors in one launch."""
    if not params or not all(fused(param) for param in params):
        eager.adamw(params, *tensors, **options)  # type: ignore[arg-type]
        return
    from opensora_repro.kernels.fused.adamw import adamw as kernel

    kernel(params, *tensors, **options)


def _fused_rows(x: Tensor) -> bool:
    return fused(x) and x.ndim == 4 and x.shape[-1] <= MAX_CHANNELS


def pays(x: Tensor, *vectors: Tensor) -> bool:
    """Whether to take `norm_by_sample`; "eager" kernels are the twins, and torch.compile fuses by itself."""
    large = x.device.type == "cpu" and x.ndim == 4 and x[0].numel() >= LARGE
    one_type = all(vector.dtype == x.dtype for vector in vectors)
    of_samples = all(vector.shape[1] == 1 for vector in vectors)
    return large and one_type and of_samples and chosen() != "eager" and not torch.compiler.is_compiling()


def norm_by_sample(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """The modulation as LayerNorm's own weight and bias, which are one sample's."""
    if len(x) > 1:
        samples = zip(x.split(1), shift.split(1), scale.split(1), strict=True)
        return torch.cat([norm_by_sample(*sample, eps) for sample in samples])
    return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), eps)


def _of_each(x: Tensor, vector: Tensor) -> Tensor:
    """One vector a sample, where there may be one for all."""
    return vector if len(vector) == len(x) else vector.expand(len(x), -1, -1, -1)


def _as_samples(*tensors: Tensor | None, like: Tensor) -> list[Any]:
    """Tokens and vectors as kernels take them: where vectors `like` these are of frames, frames become samples."""
    frames = like.shape[1]
    if frames == 1:
        return list(tensors)
    return [None if x is None else x.expand(-1, frames, -1, -1).flatten(0, 1)[:, None] for x in tensors]


def _as_frames(x: Tensor, tokens: Tensor) -> Tensor:
    return x if x.shape == tokens.shape else x.view(tokens.shape)


def _normed_dtype(x: Tensor, shift: Tensor, scale: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(torch.promote_types(x.dtype, shift.dtype), scale.dtype)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Nobody waits: a GPU fetches it from pinned memory when its stream comes to it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # memory that is pinned already is not copied again
