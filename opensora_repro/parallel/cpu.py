"""CPUs and gloo as a place where ColossalAI trains."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from colossalai.accelerator import CpuAccelerator
from colossalai.accelerator.base_accelerator import BaseAccelerator


class GlooAccelerator(CpuAccelerator):
    """A CPU that answers what ZeRO and the hybrid plugin ask of a device: there are no streams to wait for.

    Its own CpuAccelerator raises at these calls, though a CPU has honest answers to all of them.
    """

    def __init__(self) -> None:
        # ZeRO checks the name against a list of devices that it knows; it asks for nothing else of theirs.
        BaseAccelerator.__init__(self, name="cuda", communication_backend="gloo", is_synchronous=True)

    def get_current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any = None) -> None:
        return None

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def Stream(self, device: Any = None, priority: int = 0, **options: Any) -> None:
        return None

    def current_stream(self, device: Any = None) -> None:
        return None

    def default_stream(self, device: Any = None) -> None:
        return None

    def stream(self, stream_: Any) -> Any:
        return contextlib.nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()
