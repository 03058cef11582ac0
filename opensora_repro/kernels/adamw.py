"""torch's AdamW with its step, the gradients' scale and the weights' average in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora_repro.kernels import ops


class FusedAdamW(torch.optim.AdamW):
    """torch's state under torch's names, so a checkpoint of either optimizer is the other's.

    It takes `grad_scale` and `found_inf` as torch's fused optimizers do, float32 [] on the parameters' device or None:
    gradients are divided by the one, and where the other is 1 the step changes nothing. Steps are counted on the
    device, so that nobody waits to learn whether one was made.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        self._shadow: Mapping[Tensor, Tensor] = {}
        self._weight: Callable[[], float] | None = None

    def average_into(self, shadow: Mapping[Tensor, Tensor], weight: Callable[[], float]) -> None:
        """From now on every step moves the parameters' shadows towards the new weights, by `weight()`."""
        self._shadow, self._weight = shadow, weight

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The gradients stay as they are. Shadows of parameters without one move, too."""
        assert closure is None
        weight = 0.0 if self._weight is None else self._weight()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._state(param) for param in params]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            ops.adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                steps,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                averages=[self._shadow[param] for param in params] if self._shadow else (),
                average_weight=weight,
            )
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))
        self._average_still_ones(weight)

    def _average_still_ones(self, weight: float) -> None:
        still = [param for group in self.param_groups for param in group["params"] if param.grad is None]
        for param in still if self._shadow else ():
            taken = torch.full((), weight, device=param.device)
            self._shadow[param].lerp_(param, taken if self.found_inf is None else taken * (1 - self.found_inf))

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return state
