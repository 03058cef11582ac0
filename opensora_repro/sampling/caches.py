"""What neighbouring steps of a sampling have in common is computed once: attention's outputs, and all blocks at once.

Both caches stand around the layers of STDiT, STDiT2 and STDiT3 for the time of one sampling; the models know of
neither. Where a layer, or all blocks, are told another batch or another frame mask than before, they are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.models.captioned import Block, CaptionedModel


@dataclass(frozen=True)
class Broadcast:
    """Pyramid attention broadcast (Zhao et al. 2024, arXiv:2408.12588).

    An attention's output serves so many calls of the model in a row, the one that computed it among them (1: that
    alone), where they lie `between` these shares of all calls.
    """

    spatial: int = 2
    temporal: int = 4
    cross: int = 6
    between: tuple[float, float] = (0.1, 0.9)

    def within(self, calls: int) -> range:
        """Calls, counted from 0, in which outputs may be taken again."""
        low, high = self.between
        return range(round(low * calls), round(high * calls))

    def layers(self, block: Block) -> Iterator[tuple[nn.Module, int]]:
        """A block's attentions, and how many calls an output of each serves."""
        for layer in (block.attn, block.attn_temp):
            if layer is not None:
                yield layer, self.temporal if layer.over == "time" else self.spatial
        yield block.cross_attn, self.cross


@dataclass(frozen=True)
class StepCache:
    """Blocks are skipped, and what they added last time is added again, while little has changed.

    As TeaCache (Liu et al. 2024, arXiv:2411.19108): the relative L1 change from call to call of what the first block
    attends to, through a polynomial that foretells from it how far the blocks' residual changes, is summed up since
    the blocks last ran, and they run again when the sum reaches the threshold. Each sample's sum is its own, so
    neighbours in a batch do not matter; they wait for each other. The first call and the last always run.
    """

    threshold: float
    polynomial: tuple[float, ...]  # of the highest power first
    span: tuple[float, float]  # changes that it was fitted to; others are taken for the nearest

    def foretold(self, change: Tensor) -> Tensor:
        """The residual's change for that of the first block's input, [B] both."""
        change = change.double().clamp(*self.span)
        found = torch.zeros_like(change)
        for factor in self.polynomial:
            found = found * change + factor
        return found.clamp(min=0)


class Clock:
    """Which call of the model this is, and since which one the frame mask is as it is now."""

    def __init__(self, calls: int) -> None:
        self.calls, self.now, self.same_since = calls, -1, 0
        self._mask: Tensor | None = None

    def tick(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A model's forward pre-hook."""
        self.now += 1
        mask = named.get("frame_mask")
        known = self._mask
        same = mask is known if mask is None or known is None else torch.equal(mask, known)
        if not same:
            self.same_since = self.now
        self._mask = mask


@dataclass(frozen=True)
class Caches:
    """`with caches(model, calls):` around a sampling of so many calls of the model, one after the other."""

    broadcast: Broadcast | None = None
    step_cache: StepCache | None = None

    @contextlib.contextmanager
    def __call__(self, model: nn.Module, calls: int) -> Iterator[None]:
        assert isinstance(model, CaptionedModel), "DiT and Latte are refused before"
        clock = Clock(calls)
        with contextlib.ExitStack() as stack:
            hook = model.register_forward_pre_hook(clock.tick, with_kwargs=True)
            stack.callback(hook.remove)
            if self.broadcast is not None:
                within = self.broadcast.within(calls)
                for block in model.in_order():
                    for layer, times in self.broadcast.layers(block):
                        if times > 1:
                            stack.enter_context(
                                replaced(layer, "forward", _served(layer.forward, times, within, clock))
                            )
            if self.step_cache is not None:
                stack.enter_context(replaced(model, "run_blocks", SkippedSteps(model, self.step_cache, clock)))
            yield


@contextlib.contextmanager
def replaced(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within, the module's own method of that name is another."""
    before = vars(module).get(name)  # another cache's, around this one
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def _served(forward: Callable[..., Tensor], times: int, within: range, clock: Clock) -> Callable[..., Tensor]:
    """`forward`, each of whose outputs serves up to `times` calls."""
    kept: Tensor | None = None
    computed = 0

    def serve(x: Tensor, *rest: Any) -> Tensor:
        nonlocal kept, computed
        fits = kept is not None and kept.shape == x.shape and computed >= clock.same_since
        if kept is not None and fits and clock.now in within and clock.now < computed + times:
            return kept
        found = forward(x, *rest)
        kept, computed = (found if clock.now + 1 in within else None), clock.now  # or memory is held for nothing
        return found

    return serve


class SkippedSteps:
    """A model's `run_blocks` behind a StepCache."""

    def __init__(self, model: CaptionedModel, cache: StepCache, clock: Clock) -> None:
        self._run, self._first = model.run_blocks, model.in_order()[0]
        self._cache, self._clock = cache, clock
        self._seen: Tensor | None = None  # [B, T, S, D], what the first block attended to at the call before
        self._residual: Tensor | None = None  # [n * B, T, S, D]
        self._sums = torch.zeros(0)  # [B]
        self._computed = 0

    def __call__(self, x: Tensor, texts: Any, modulation: Tensor, captions: Any, temporal: Tensor | None) -> Tensor:
        rows, samples, before = modulation.shape[1], len(x), self._residual
        seen = attended(self._first, x, modulation)
        reuse = self._may_reuse(seen, rows)  # [B]
        self._seen, repeats = seen, rows // samples
        if before is not None and reuse is not None and bool(reuse.all()):
            return x.repeat(repeats, 1, 1, 1) + before
        found = self._run(x, texts, modulation, captions, temporal)
        self._computed = self._clock.now
        self._residual = found - x.repeat(repeats, 1, 1, 1)
        if before is not None and reuse is not None and bool(reuse.any()):  # those do as they would alone
            own = reuse.repeat(repeats)[:, None, None, None]
            self._residual = torch.where(own, before, self._residual)
            found = torch.where(own, x.repeat(repeats, 1, 1, 1) + before, found)
        return found

    def _may_reuse(self, seen: Tensor, rows: int) -> Tensor | None:
        clock, before = self._clock, self._residual
        last = clock.now == clock.calls - 1
        other = before is None or len(before) != rows or self._computed < clock.same_since
        if last or other or self._seen is None or self._seen.shape != seen.shape:
            self._sums = torch.zeros(len(seen), dtype=torch.float64, device=seen.device)
            return None
        sums = self._sums + self._cache.foretold(relative_change(seen, self._seen))
        reuse = sums < self._cache.threshold
        self._sums = torch.where(reuse, sums, 0.0)
        return reuse


def attended(first: Block, x: Tensor, modulation: Tensor) -> Tensor:
    """What the first block attends to, [B, T, S, D]: its tokens, normed, under shift and scale of the timestep."""
    shift, scale = first.vectors(modulation)[:2]
    return ops.norm_modulate(x, shift[: len(x)], scale[: len(x)])


def relative_change(after: Tensor, before: Tensor) -> Tensor:
    """The L1 norm of the difference over that of what was before, each sample's: [B]."""
    after, before = after.flatten(1).float(), before.flatten(1).float()
    return (after - before).abs().sum(1) / before.abs().sum(1).clamp(min=1e-12)
