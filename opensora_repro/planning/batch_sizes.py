"""Batch sizes with which the steps of all of a config's buckets take about the same time, within the memory given.

A bucket's ratios have nearly as many tokens each; the heaviest one stands for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from opensora_repro.config import Config, ConfigError
from opensora_repro.data.buckets import Bucket, Rule, as_one_size, buckets_of, kept_buckets
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.budget import bucket_costs, step_flops
from opensora_repro.planning.encoders import frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.gpus import Gpu
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.report import duration, number, size
from opensora_repro.planning.sizes import latent_shape, token_grid

TOLERANCE = math.sqrt(1.5)  # of the time aimed at, up or down: so any two steps are within 1.5 x of each other
SINGLE_SAMPLES = "single samples"  # are too long for a time between one's and two's, or below one's


@dataclass(frozen=True)
class Entry:
    """One `[[data.buckets]]`, or the one size of a config without any."""

    key: str  # of its batch size
    resolution: str  # as the config has it; empty without buckets
    bucket: Bucket  # of its heaviest ratio
    ratios: int
    tokens: int  # of a sample
    flops: float  # of a sample's part of a step, with what is computed again and the encoders' share
    clips: float | None  # an epoch, on average; None: not known

    def __str__(self) -> str:
        if self.ratios == 1:
            return str(self.bucket)
        bucket = self.bucket
        return f"{bucket.num_frames} x {self.resolution} ({bucket.height}x{bucket.width} of {self.ratios} ratios)"

    @property
    def name(self) -> str:
        return f"{self.key.removesuffix('.batch_size')} ({self.bucket})" if self.resolution else str(self.bucket)


class Cost(Protocol):
    """What a step with so many samples in each process's micro-batch takes; both grow with them."""

    def seconds(self, batch_size: int) -> float: ...

    def memory(self, batch_size: int) -> float:
        """Bytes of one process at most."""
        ...


@dataclass(frozen=True)
class Choice:
    """A bucket's batch size, and what kept its steps from the time aimed at, if anything did."""

    entry: Entry
    cost: Cost
    batch_size: int
    held_by: str = ""


def of_one_size(cfg: Config, bucket: Bucket, batch_size: int) -> Config:
    """The config of steps with so many samples of a bucket's size."""
    cfg = as_one_size(cfg, bucket)
    return replace(cfg, train=replace(cfg.train, batch_size=batch_size))


def entries_of(cfg: Config, clips: Sequence[float] | None = None) -> list[Entry]:
    """Those that keep clips, in the config's order. `clips`: an epoch's, of each of `buckets_of`.

    Raises ConfigError.
    """
    buckets, kept, costs = buckets_of(cfg), set(kept_buckets(cfg)), bucket_costs(cfg)
    numbers = Rule(cfg.data, cfg.train.batch_size).entries if cfg.data.buckets else (0,)
    found = []
    for own in range(max(numbers) + 1):
        places = [place for place, entry in enumerate(numbers) if entry == own]
        if not any(buckets[place] in kept for place in places):
            continue
        tokens, flops, place = max((*costs[place], place) for place in places)
        key, resolution = "train.batch_size", ""
        if cfg.data.buckets:
            key, resolution = f"data.buckets[{own}].batch_size", cfg.data.buckets[own].resolution
        count = None if clips is None else sum(clips[place] for place in places)
        found.append(Entry(key, resolution, buckets[place], len(places), tokens, flops, count))
    return found


class Formula:
    """By the planner's formulas: a share of the peak for all sizes alike, which small steps do not reach."""

    def __init__(self, cfg: Config, bucket: Bucket, mesh: Mesh, gpu: Gpu, utilisation: float) -> None:
        """Raises ConfigError."""
        self.cfg, self.bucket, self.mesh = cfg, bucket, mesh
        one = of_one_size(cfg, bucket, 1)
        products = forward_products(cfg.model, token_grid(cfg.model, latent_shape(one)))
        useful, _, encoding = step_flops(one, products, frozen_sizes(one), cfg.train.accumulation)
        self._sample_seconds = (useful + encoding) / (mesh.model_size * gpu.peak(cfg.train.dtype) * utilisation)

    def seconds(self, batch_size: int) -> float:
        return batch_size * self._sample_seconds

    def memory(self, batch_size: int) -> float:
        return needed_memory(of_one_size(self.cfg, self.bucket, batch_size), self.mesh, "cuda").peak


# ---------------------------------------------------------------------------------------------------------------------
# The choice

# What is known of a bucket's steps, up to those that take so many seconds or have so many samples in a micro-batch
CostOf = Callable[[Entry, float, int | None], Cost]


def balance(
    entries: Sequence[Entry],
    cost_of: CostOf,
    limit: float,
    *,
    seconds: float | None,
    most: int | None,
    say: Callable[[str], None] = print,
) -> list[Choice]:
    """All buckets' batch sizes, `most` at most, for steps of so many seconds and a process of `limit` bytes.

    None: as long as those of the bucket whose samples take most, at the batch size that it has, or as much of that as
    fits. Raises ConfigError where one sample does not.
    """
    known: dict[str, Cost] = {}
    source = "as asked for"
    if seconds is None:
        first = max(entries, key=lambda entry: entry.flops)
        configured = min(first.bucket.batch_size, most or first.bucket.batch_size)
        cost = known[first.key] = cost_of(first, math.inf, configured)
        require_one(first, cost, limit)
        own = largest(lambda count: count <= configured and cost.memory(count) <= limit)
        seconds, source = cost.seconds(own), f"as of {first.name} at batch size {own}"
        source += f", as {first.bucket.batch_size} do not fit" if own < configured else ""
    say(f"aim: {duration(seconds)} a step, {source}; at most {size(limit)} a process")
    return [
        choose(entry, known.get(entry.key) or cost_of(entry, seconds, most), seconds, limit, most) for entry in entries
    ]


def choose(entry: Entry, cost: Cost, aim: float, limit: float, most: int | None) -> Choice:
    """The batch size, `most` at most, with which a step takes `aim` seconds as nearly as `limit` bytes allow.

    Raises ConfigError where one sample does not fit.
    """
    require_one(entry, cost, limit)

    def held(batch_size: int) -> str:
        if most is not None and batch_size > most:
            return "--max-batch"
        return "memory" if cost.memory(batch_size) > limit else ""

    found = largest(lambda count: not held(count) and cost.seconds(count) <= aim)
    below, above = (cost.seconds(count) / aim for count in (found, found + 1))
    bound = held(found + 1)
    if not bound and above * below < 1:
        found, below = found + 1, above
    if 1 / TOLERANCE <= below <= TOLERANCE:
        return Choice(entry, cost, found)
    return Choice(entry, cost, found, bound if bound and below < 1 else SINGLE_SAMPLES)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, at least 1; a smaller one always does, and some one does not."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require_one(entry: Entry, cost: Cost, limit: float) -> None:
    """Raise ConfigError where one sample does not fit."""
    if cost.memory(1) > limit:
        raise too_large(entry, f"takes {size(cost.memory(1))}", limit)


def too_large(entry: Entry, takes: str, limit: float) -> ConfigError:
    return ConfigError(
        f"{entry.name}: a step with one sample {takes}, {size(limit)} are given: lower num_frames or resolution; set "
        'what takes less, if it is not (data.cache, text.offload, optim.offload, activation_checkpointing="full"); '
        "or take more memory, or several GPUs with parallel.plugin=fsdp"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table


def choice_lines(cfg: Config, choices: Sequence[Choice], data_ranks: int) -> Iterator[str]:
    """Lines for people, a row a bucket."""
    shares = _shares(choices)
    rows = [_HEADER, *(_row(cfg, choice, data_ranks, share) for choice, share in zip(choices, shares, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *padded, cells[-1]]).rstrip()
    ranks = f" x {data_ranks} data ranks" if data_ranks > 1 else ""
    yield (
        f"batch sizes are of one process's micro-batch: a step has batch size x {cfg.train.accumulation} "
        f"(train.accumulation){ranks} samples; seconds are a whole step's"
    )
    if len(choices) > 1:
        before = [choice.cost.seconds(choice.entry.bucket.batch_size) for choice in choices]
        after = [choice.cost.seconds(choice.batch_size) for choice in choices]
        yield f"the longest step took {_spread(before)} x the shortest, and takes {_spread(after)} x"
    if any(choice.held_by == SINGLE_SAMPLES for choice in choices):
        yield "where single samples decide, a longer step (--seconds) makes times more alike"


_HEADER = (
    "bucket", "clips", "tokens", "batch size", "s a step", "tokens/s", "memory", "share of time", "held by",
)  # fmt: skip


def _row(cfg: Config, choice: Choice, data_ranks: int, share: float | None) -> tuple[str, ...]:
    entry, cost, count = choice.entry, choice.cost, choice.batch_size
    before, seconds = entry.bucket.batch_size, cost.seconds(count)
    tokens = count * cfg.train.accumulation * entry.tokens / seconds
    return (
        str(entry),
        "-" if entry.clips is None else f"{entry.clips:,.0f}",
        f"{entry.tokens:,}",
        f"{before} -> {count}",
        f"{number(cost.seconds(before))} -> {number(seconds)}",
        f"{data_ranks * tokens:,.0f}",
        size(cost.memory(count)),
        "-" if share is None else f"{share:.1%}",
        choice.held_by,
    )


def _shares(choices: Sequence[Choice]) -> list[float | None]:
    """Of an epoch's time."""
    times = [(c.entry.clips or 0) / c.batch_size * c.cost.seconds(c.batch_size) for c in choices]
    return [time / sum(times) if sum(times) else None for time in times]


def _spread(seconds: Sequence[float]) -> str:
    return number(max(seconds) / min(seconds))
