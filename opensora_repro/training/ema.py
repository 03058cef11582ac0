"""An exponential moving average of the weights, which sampling uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """A float32 shadow of every parameter, by name.

    After n updates the decay is min(decay, (1 + n) / (10 + n)): young averages forget the random start quickly, and a
    short run has a useful one. A decay of 0 makes the shadow the newest weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.shadow = {name: value.float().clone() for name, value in self._parameters.items()}

    def next_decay(self) -> float:
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def update(self) -> None:
        """Move the shadow towards the current weights."""
        weight = 1 - self.next_decay()
        torch._foreach_lerp_(list(self.shadow.values()), [p.float() for p in self._parameters.values()], weight)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model for the block's duration, then the trained ones back, bit for bit."""
        trained = {name: value.clone() for name, value in self._parameters.items()}
        self._copy_in(self.shadow)
        try:
            yield
        finally:
            self._copy_in(trained)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict with averaged parameters; buffers are the model's own."""
        return {**model.state_dict(), **self.shadow}

    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Continue from a saved `state_dict`; raises KeyError where a parameter is absent."""
        for name, value in self.shadow.items():
            value.copy_(weights[name])
        self.updates = updates

    def _copy_in(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._parameters.items():
            value.copy_(weights[name])


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
