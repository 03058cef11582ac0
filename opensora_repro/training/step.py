"""What a step consists of: its learning rate, the model's forward, the sums over all processes, what follows, and the
average of the weights.

Gradient norm, clipping, and whether the step is skipped are decided on the device, so that no step waits for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import OptimConfig
from opensora_repro.data.dataset import BadSample
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.kernels.adamw import FusedAdamW
from opensora_repro.kernels.ops import to_device
from opensora_repro.parallel.device import HostValues
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.parallel.offload import chunks, on_device, to_host
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


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights


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
