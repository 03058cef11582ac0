"""What a step consists of: its learning rate, the model's forward, the sums over all processes, and what follows.

Gradient norm, clipping, and whether the step is skipped are decided on the device, so that no step waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import OptimConfig
from opensora_repro.data.dataset import BadSample
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.kernels.ops import to_device
from opensora_repro.parallel.device import HostValues
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.training.batches import PackedBatch


def learning_rate(cfg: OptimConfig, step: int, num_steps: int) -> float:
    """Rate of step 0 .. num_steps - 1: linear warm-up, constant, linear decay over the last `decay_steps`."""
    rate = cfg.lr
    if step < cfg.warmup_steps:
        rate *= (step + 1) / cfg.warmup_steps
    if num_steps - step <= cfg.decay_steps:
        rate *= (num_steps - step) / (cfg.decay_steps + 1)
    return rate


class ModelRunner:
    """Calls the model, as an engine offers it, in bfloat16 autocast or float32; timesteps and losses stay float32."""

    def __init__(self, forward: Callable[..., Tensor], dtype: str, device: torch.device) -> None:
        self.forward, self.half, self.device = forward, dtype == "bf16", device

    def conditioned(
        self, text: Tensor, mask: Tensor, drop_text: Tensor | None = None, **conditions: Any
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`(x_t [B, C, T, H, W], timestep [B]) -> [B, C_out, T, H, W]` for these captions.

        `conditions`: what else the model is told of each sample (see `conditions_of`), and its `frame_mask`; None is
        not handed on, for not every model knows it.
        """
        told = {name: value for name, value in conditions.items() if value is not None}

        def call(x: Tensor, timestep: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                output: Tensor = self.forward(x, timestep, text, mask, drop_text=drop_text, **told)
            return output

        return call


def packed_losses(model: ModelRunner, objective: Objective, batch: PackedBatch) -> Tensor:
    """The loss of each sample of a row, float32 [B]."""
    parts = batch.parts
    fields = ("text", "mask", "drop_text", "timesteps")
    *captions, timesteps = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
    conditions: dict[str, Any] = {
        name: torch.cat([part.conditions[name] for part in parts]) for name in parts[0].conditions
    }
    masks = [part.frame_mask for part in parts]
    if any(mask is not None for mask in masks):
        conditions["frame_mask"] = masks
    drawn = [(part.latents, part.noise, part.timesteps) for part in parts]
    seen: Any = [objective.noised(*of, frame_mask=mask) for of, mask in zip(drawn, masks, strict=True)]
    outputs = model.conditioned(*captions, **conditions)(seen, timesteps)
    losses = [
        objective.losses_of(output, x_t, *of, frame_mask=mask)
        for output, x_t, of, mask in zip(outputs, seen, drawn, masks, strict=True)
    ]
    return torch.cat(losses)


@dataclass
class PendingStep:
    """A step that the device has been given, and of which the host does not know yet how it went."""

    number: int
    lr: float
    seconds: float = 0.0
    seconds_waited: float = 0.0  # for samples
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of its samples, in the manifest
    ids: list[str] = field(default_factory=list)
    bad_samples: list[BadSample] = field(default_factory=list)
    result: HostValues | None = None  # once all of the step has been given
    parts: list[Tensor] = field(default_factory=list)  # of this process's micro-batches' losses, where they have any


@dataclass
class StepTotals:
    """A step's sums over this data rank's micro-batches."""

    loss: Tensor  # float64 scalar: sum of the good samples' losses
    samples: int = 0
    bad: int = 0
    tokens: int = 0
    lost: bool = False  # a process could not read on: what it should have added is not in the sums


@dataclass(frozen=True)
class StepResult:
    """What the host learns of a step, once the device has come to its end."""

    loss: float  # mean over the good samples
    grad_norm: float  # of the mean loss's gradient
    samples: int  # good ones, of all processes, as are the bad ones and the tokens
    bad: int
    tokens: int
    stopping: bool  # a process was asked to stop, or has to
    lost: bool = False  # a process's samples are not in it: the step does not count

    @staticmethod
    def of(values: Sequence[float]) -> StepResult:
        """From what `decide` has found."""
        loss, norm, samples, bad, tokens, stopping, lost = values
        return StepResult(loss, norm, int(samples), int(bad), int(tokens), bool(stopping), bool(lost))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def stepped(self) -> bool:
        """Whether the weights have moved."""
        return self.finite and self.samples > 0 and not self.lost


@dataclass(frozen=True)
class Decision:
    """How the optimizer takes the step, and what the host may learn of it; all on the device."""

    factor: Tensor  # float32 []: multiplies the gradients
    skip: Tensor  # float32 []: 1 where the step is not finite, has no good sample, or is lost; else 0
    result: Tensor  # float64 [7], in the order of StepResult


def decide(
    engine: TorchEngine, totals: StepTotals, *, stopping: bool, global_batch_size: int, clip_norm: float
) -> Decision:
    """Collective. Gradients are of the mean over `global_batch_size` samples, as if all of them were good.

    `clip_norm` 0: the norm is not clipped.
    """
    counts = torch.tensor([totals.samples, totals.bad, totals.tokens, stopping, totals.lost], dtype=torch.float64)
    sums = torch.cat([totals.loss[None], to_device(counts, engine.device)])
    sums /= engine.members.size  # as many ranks have counted the same samples
    sums = engine.sum(torch.cat([sums, engine.squared_gradients()[None]]))
    loss, samples, bad, tokens, stops, lost, square = sums.unbind()
    good = samples.clamp(min=1)
    share = global_batch_size / good
    loss, norm = loss / good, square.sqrt() * share
    factor = share * (clip_norm / norm).clamp(max=1) if clip_norm else share
    skip = ~(loss.isfinite() & norm.isfinite() & (samples > 0) & (lost == 0))
    return Decision(factor.float(), skip.float(), torch.stack([loss, norm, samples, bad, tokens, stops, lost]))
