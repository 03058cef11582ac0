"""Which clips share a row of tokens: a step has clips of all buckets, and each process packs its share of them.

After NaViT (arXiv:2307.06304); the model's part is models/packing.py.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from opensora_repro.config import Config
from opensora_repro.data.buckets import buckets_of
from opensora_repro.data.sampler import HELD_EPOCHS, Assignment, BatchSampler, SampleBatch, Samples, Schedule, Shape


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity`: the largest first, each into the first row with room; indexes, ascending in a row.

    At most 11/9 of the fewest rows possible, and one more (Johnson 1973). Raises ValueError for what fits in no row.
    """
    if max(sizes, default=0) > capacity:
        raise ValueError(f"{max(sizes)} tokens do not fit into a row of {capacity}")
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        row = next((row for row, left in enumerate(room) if left >= sizes[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= sizes[index]
    return [sorted(row) for row in rows]


def even_parts(sizes: Sequence[int], count: int) -> list[list[int]]:
    """So many parts of about one size: the largest first, each to the least part; indexes, ascending in a part."""
    parts: list[list[int]] = [[] for _ in range(count)]
    load = [(0, part) for part in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least, part = heapq.heappop(load)
        parts[part].append(index)
        heapq.heappush(load, (least + sizes[index], part))
    return [sorted(part) for part in parts]


def build_schedule(cfg: Config, assignment: Assignment, samples: Sequence[int]) -> Schedule:
    """A run's: which rows are each step's, of which each bucket's has so many."""
    scheduled = Together(assignment) if cfg.data.packing_tokens else assignment
    return Schedule(scheduled, samples, cfg.run.seed, draws=cfg.data.draws)


def build_sampler(cfg: Config, schedule: Schedule, **share: int) -> BatchSampler:
    """One process's part of a run's micro-batches; `share` as BatchSampler takes it."""
    shapes = [bucket.shape for bucket in buckets_of(cfg)]
    return (PackedSampler if cfg.data.packing_tokens else BatchSampler)(schedule, shapes, **share)


class Together(Assignment):
    """An assignment's rows as if all buckets were one."""

    def __init__(self, assignment: Assignment) -> None:
        self.by_bucket, self.num_rows, self.num_buckets = assignment, assignment.num_rows, 1

    def counts(self, draws: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.by_bucket.counts(draws).sum(axis=1, keepdims=True)
        return found

    def rows(self, draw: int, buckets: Sequence[int]) -> Iterator[np.ndarray]:
        every = self.by_bucket.rows(draw, range(self.by_bucket.num_buckets))
        return iter([np.sort(np.concatenate(list(every)))] * len(buckets))


class PackedSampler(BatchSampler):
    """One process's part of each micro-batch of a schedule of `Together`, with a shape for each sample.

    Parts are even in pixels, to which tokens are proportional, not in samples.
    """

    def __init__(self, schedule: Schedule, shapes: Sequence[Shape], **share: Any) -> None:
        super().__init__(schedule, shapes, **share)
        assert isinstance(schedule.assignment, Together)
        self._assignment = schedule.assignment.by_bucket
        self._buckets: OrderedDict[int, np.ndarray] = OrderedDict()  # of each row, by draw

    def batch(self, number: int) -> SampleBatch:
        step, part = divmod(number, self.accumulation)
        found = self.schedule.step(step)
        shapes = self._shapes(found)
        parts = even_parts([math.prod(shape) for shape in shapes], self.world_size * self.accumulation)
        own = parts[part * self.world_size + self.rank]
        pairs = [(int(found.epochs[i]), int(found.rows[i])) for i in own]
        return SampleBatch(pairs, shapes=[shapes[i] for i in own])

    def _shapes(self, samples: Samples) -> list[Shape]:
        draws = [self.schedule.draw(epoch) for epoch in samples.epochs.tolist()]
        pairs = zip(draws, samples.rows.tolist(), strict=True)
        return [self.shapes[self._of_draw(draw)[row]] for draw, row in pairs]

    def _of_draw(self, draw: int) -> np.ndarray:
        if draw not in self._buckets:
            while len(self._buckets) >= HELD_EPOCHS:
                self._buckets.popitem(last=False)
            self._buckets[draw] = self._assignment.buckets(draw)
        return self._buckets[draw]
