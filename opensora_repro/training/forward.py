"""The model's forward under the run's autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ModelRunner:
    """Calls the model, as an engine offers it, in bfloat16 autocast or float32; timesteps and losses stay float32."""

    def __init__(self, forward: Callable[..., Tensor], dtype: str, device: torch.device) -> None:
        self.forward, self.half, self.device = forward, dtype == "bf16", device

    def conditioned(
        self, text: Tensor, mask: Tensor, drop_text: Tensor | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x_t [B, C, T, H, W], timestep [B]) -> [B, C_out, T, H, W]` for these captions."""

        def call(x: Tensor, timestep: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                output: Tensor = self.forward(x, timestep, text, mask, drop_text=drop_text)
            return output

        return call
