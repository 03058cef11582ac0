"""For many tokens on a CPU: a linear layer by another library than torch multiplies with, where that one is faster.

torch multiplies matrices of float32 with MKL, but convolves with oneDNN, and a linear layer is a convolution of 1x1. On
AMD's processors with AVX-512 oneDNN is faster, by 3 to 12 % (`benchmarks.train_step` times both).
"""

from __future__ import annotations

import platform
import re
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_repro.kernels.choice import chosen

ROWS, CHANNELS = 1024, 128  # with fewer, the way into the other library takes what it saves
IMAGES = 16  # for fewer, torch asks oneDNN for a convolution only where it has several threads


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` here is faster than `F.linear`; `train.kernels = "eager"` asks for that one."""
    many = x.device.type == "cpu" and x.numel() >= ROWS * x.shape[-1] and min(weight.shape) >= CHANNELS
    if not many or chosen() == "eager" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    plain = type(weight) in (torch.nn.Parameter, Tensor)  # others gather their values in the call they are given to
    float32 = x.dtype == weight.dtype == torch.float32
    return plain and float32 and x.numel() // x.shape[-1] % IMAGES == 0 and onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as a convolution, forward and backward; for what `convolves`."""
    return _tokens(F.conv2d(_images(x), weight[:, :, None, None], bias), x)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same and tanh-approximated GELU, which oneDNN applies to each tile of the product; has no backward pass."""
    once, none = [1, 1], [0, 0]
    convolution = torch.ops.mkldnn._convolution_pointwise
    return _tokens(convolution(_images(x), weight[:, :, None, None], bias, none, once, once, 1, "gelu", [], "tanh"), x)


def fuses_gelu() -> bool:
    """Whether `linear_gelu` will do: no gradients, and torch has what its own compiler calls for such a pair."""
    return not torch.is_grad_enabled() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _images(x: Tensor) -> Tensor:
    """Tokens [..., C], as many as `IMAGES` divides, as images of one row, channels last, which is how they lie."""
    return x.reshape(IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)


def _tokens(images: Tensor, x: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).reshape(*x.shape[:-1], images.shape[1])


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this processor is one of those, and torch was built with both libraries."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    """The processor's maker as it calls itself, or something else where the system does not tell."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor().split(", ")[-1]  # Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
    found = re.search(r"^vendor_id\s*: (.*)$", told, re.MULTILINE)
    return found[1].strip() if found else ""
