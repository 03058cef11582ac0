"""Which kernels a process computes with, torch's own ("eager") or fused ones ("triton"), and on what device.

One setting for the process, `train.kernels`. Triton is imported where it is first needed and compiles a kernel where it
is first run; without it everything here works in eager mode.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache

import torch
from torch import Tensor

from opensora_repro.errors import UserError

CHOICES = ("auto", "eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. Nobody waits: a GPU fetches it from pinned memory when its stream comes to it."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # memory that is pinned already is not copied again
