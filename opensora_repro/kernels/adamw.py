"""torch's AdamW with its step, the gradients' factor and the weights' average in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora_repro.kernels import ops


class FusedAdamW(torch.optim.AdamW):
    """torch's state under torch's names, so a checkpoint of either optimizer is the other's.

    Steps are counted in host memory, as in torch's own loop over tensors, and so are read without waiting for a device.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options, fused=False, foreach=False)
        self._shadow: Mapping[Tensor, Tensor] = {}
        self._weight: Callable[[], float] | None = None

    def average_into(self, shadow: Mapping[Tensor, Tensor], weight: Callable[[], float]) -> None:
        """From now on every step moves the parameters' shadows towards the new weights, by `weight()`."""
        self._shadow, self._weight = shadow, weight

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        self.step_scaled(1.0)

    @torch.no_grad()
    def step_scaled(self, factor: float) -> None:
        """Step on the gradients times `factor`; they stay as they are. Shadows of parameters without one move, too."""
        weight = 0.0 if self._weight is None else self._weight()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state(param) for param in params]
            for state in states:
                state["step"] += 1
            ops.adamw(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [float(state["step"]) for state in states],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                factor=factor,
                averages=[self._shadow[param] for param in params] if self._shadow else (),
                average_weight=weight,
            )
        still = [param for group in self.param_groups for param in group["params"] if param.grad is None]
        if self._shadow and still:
            torch._foreach_lerp_([self._shadow[param] for param in still], still, weight)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return state
