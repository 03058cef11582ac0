"""An exponential moving average of the weights, which sampling uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from opensora_repro.kernels.adamw import FusedAdamW
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.offload import chunks, on_device, to_host


class Ema:
    """A float32 shadow of this rank's piece of every trained parameter, by name.

    After n updates the decay is min(decay, (1 + n) / (10 + n)): young averages forget the random start quickly, and a
    short run has a useful one. A decay of 0 makes the shadow the newest weights.

    A FusedAdamW moves the shadow in its own step, which `update` must then follow. With `offload` the shadow lies
    in host memory.
    """

    def __init__(self, engine: TorchEngine, decay: float, *, offload: bool = False) -> None:
        self.engine, self.decay = engine, decay
        self.updates = 0
        self.offload = offload
        self.shadow = {name: self._copy(value) for name, value in engine.masters.items()}
        self._moved_by_step = isinstance(engine.optimizer, FusedAdamW)
        if isinstance(engine.optimizer, FusedAdamW):
            shadow_of = {master: self.shadow[name] for name, master in engine.masters.items()}
            engine.optimizer.average_into(shadow_of, lambda: 1 - self.next_decay())

    def next_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the current weights."""
        if not self._moved_by_step:
            self._move(1 - self.next_decay())
        self.updates += 1

    def _move(self, weight: float) -> None:
        shadow, masters = list(self.shadow.values()), list(self.engine.masters.values())
        if not self.offload:
            torch._foreach_lerp_(shadow, masters, weight)
            return
        for targets, moved in zip(chunks(masters), on_device(chunks(shadow), masters), strict=True):
            torch._foreach_lerp_(moved, targets, weight)

    def _copy(self, value: Tensor) -> Tensor:
        return to_host(value, value.device) if self.offload else value.detach().clone()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model compute with the averaged weights for the block, then with the trained ones, bit for bit.

        Collective: every rank must enter and leave.
        """
        trained = {name: self._copy(value) for name, value in self.engine.masters.items()}
        self.engine.show(self.shadow)
        try:
            yield
        finally:
            self.engine.show(trained)


def horizon_warning(decay: float, steps: int) -> str | None:
    """One line when the average looks back over more steps than the run has, so that it would lag behind it."""
    horizon = 1 / (1 - decay)
    if horizon <= steps:
        return None
    suggestion = max(0.0, 1 - 10 / steps)
    return (
        f"ema.decay={decay} averages over about {horizon:,.0f} steps, the run has train.steps={steps}: "
        f"the average will lag behind; about {suggestion:.4g} suits this length"
    )
