"""The optimizer's step within the backward pass: each weight is updated as soon as its gradient is complete.

The gradient is then freed, so that hardly two of them exist at a time. The numbers are those of a step after the
backward pass: an update reads its own gradient, and nothing reads the weight after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class StepInBackward:
    """For one process and an optimizer that updates each weight by itself."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """From now on each armed backward pass is a step."""
        self._norms: dict[Tensor, Tensor] = {}
        self._parameters = list(parameters.values())
        self._armed = False
        # One for each weight, all with the state of the whole.
        self._parts: dict[Tensor, torch.optim.Optimizer] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                part = copy.copy(optimizer)
                part.param_groups = [{**group, "params": [parameter]}]
                self._parts[parameter] = part
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def arm(self, lr: float, factor: float) -> None:
        """The next backward pass multiplies the gradients by `factor` and makes the step."""
        self._armed = True
        self._norms.clear()
        scale = 1 / torch.full((), factor, device=self._parameters[0].device)
        for part in self._parts.values():
            part.param_groups[0]["lr"] = lr
            part.grad_scale = scale  # type: ignore[attr-defined]  # fused optimizers divide by it while they read

    def disarm(self) -> None:
        self._armed = False
        self._norms.clear()

    def norms(self) -> list[Tensor]:
        """Of the gradients since `arm`, before their factor."""
        return [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]

    def _update(self, parameter: Any) -> None:
        if not self._armed:
            return
        gradient = parameter.grad
        (self._norms[parameter],) = torch._foreach_norm([gradient])
        self._parts[parameter].step()
        parameter.grad = None
