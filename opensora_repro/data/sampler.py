"""What chance decides: which samples form which batch, and the generators of what is drawn for each sample.

Both are pure functions of their keys. A batch follows from its number; a sample's generators from (seed, epoch, sample
id, stream), where no rank, worker or step enters. So a sample meets the same crop, noise and timestep wherever and
whenever it is processed, and neither resuming nor another layout of processes needs any state.

A bucket's samples of all epochs, laid end to end, each epoch's in that epoch's order, are cut into steps: so what is
left of an epoch begins the bucket's first step of a later one, and none is lost. A step belongs to the epoch that
completes it; an epoch's steps come so that every bucket's are spread evenly over it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from opensora_repro.errors import DataError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Shape = tuple[int, int, int]  # frames, height, width in pixels

TURN = 2_654_435_769  # 2**32 / golden ratio: draws that follow each other lie as far apart as can be
MOST_BOUNDS = 1 << 20  # looked up at once
HELD_EPOCHS = 2  # of which the order is kept: loaders are an epoch ahead at most
MOST_EPOCHS = 1 << 20  # without a step: no bucket ever takes enough


def keyed_seed(seed: int, *parts: int | str) -> int:
    """Hash the key to 64 bits with BLAKE2b; the same on every machine, process and Python version.

    Each part is written with its type and length, so that ("a", "bc") and ("ab", "c"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def keyed_generator(seed: int, epoch: int, sample_id: str, stream: str) -> torch.Generator:
    """Return a CPU generator for one purpose (`stream`: "noise", "timestep", "crop", ...) of one sample's visit.

    torch's CPU generator keeps the low 32 bits of its seed, so two of n keys agree with probability about n^2 / 2^33.
    """
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, epoch, sample_id, stream))


def keyed_words(ids: Any, seed: int, stream: str) -> np.ndarray:
    """64 bits for one purpose of each id of an Arrow array of strings, uint64 [N]: cheap for millions of ids.

    Eight bytes of every id at a time are mixed in, as SplitMix64 mixes its counter.
    """
    _, offsets, letters = ids.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int32)[ids.offset : ids.offset + len(ids) + 1].astype(np.int64)
    data = np.zeros(bounds[-1] - bounds[0] + 16, dtype=np.uint8)
    data[:-16] = np.frombuffer(letters or b"", dtype=np.uint8)[bounds[0] : bounds[-1]]
    eights = np.ndarray(len(data) - 7, dtype="<u8", buffer=data, strides=(1,))  # from each byte on
    place, left = bounds[:-1] - bounds[0], np.diff(bounds)
    found = _mixed(left.astype(np.uint64) ^ np.uint64(keyed_seed(seed, stream)))
    while (there := left > 0).any():
        letters_left = np.uint64(0xFFFF_FFFF_FFFF_FFFF) >> (8 * (8 - left.clip(0, 8))).clip(0, 63).astype(np.uint64)
        words = eights[np.where(there, place, 0)] & letters_left
        found = np.where(there, _mixed(found ^ words), found)
        place, left = place + 8, left - 8
    return found


def _mixed(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E37_79B9_7F4A_7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return words ^ (words >> np.uint64(31))


class Assignment:
    """Which rows of a manifest are each bucket's, at each of their draws.

    A row's number in [0, 1) is keyed by (seed, id), and turned by a fixed part of a circle from one draw to the next.
    So what a bucket keeps with probability p it keeps in p of the draws, evenly, and the rows of any draw are counted
    without a look at them.
    """

    def __init__(self, keys: np.ndarray, chances: Callable[[int], list[tuple[int, float]]], num_buckets: int) -> None:
        """`keys`: uint64 [N], a row's cell, then its number in 32 bits; `chances` as `Rule.chances`."""
        self.num_rows, self.num_buckets = len(keys), num_buckets
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._rows = order.astype(np.uint32)
        self.cells: dict[int, int] = {}  # with how many rows
        leaves, end = [], 0  # a leaf: the rows of a cell that one bucket takes
        while end < len(keys):
            cell, start = int(self._keys[end]) >> 32, end
            end = int(np.searchsorted(self._keys, np.uint64((cell + 1) << 32)))
            self.cells[cell] = end - start
            shares = [0, *(round(share * 2**32) for _, share in chances(cell))]
            for (bucket, _), low, high in zip(chances(cell), shares, shares[1:], strict=False):
                leaves.append((cell << 32, start, end - start, low, high, bucket))
        columns = np.array(leaves, dtype=np.int64).reshape(-1, 6).T
        self._cell, self._start, self._size, self._low, self._high, self._bucket = columns
        if self._is_certain:
            self._keys = self._keys[:0].copy()  # of millions of rows: give the memory back

    @property
    def _is_certain(self) -> bool:
        """Whether each cell's rows are one bucket's at every draw."""
        return bool((self._high - self._low == 2**32).all())

    def counts(self, draws: np.ndarray) -> np.ndarray:
        """Rows of each bucket at each draw, int64 [D, buckets]."""
        found = np.zeros((self.num_buckets, len(draws)), dtype=np.int64)
        at_once = max(1, MOST_BOUNDS // max(1, len(self._bucket)))
        for first in range(0, len(draws), at_once):
            _, sizes = self._spans(draws[first : first + at_once])
            np.add.at(found[:, first : first + at_once], self._bucket, sizes.T)
        return found.T

    def rows(self, draw: int, buckets: Sequence[int]) -> Iterator[np.ndarray]:
        """The rows of each of the buckets at a draw, ascending, uint32."""
        places, sizes = (found[0] for found in self._spans(np.array([draw])))
        for bucket in buckets:
            parts = [self._rows[:0]]
            for leaf in np.flatnonzero(self._bucket == bucket):
                of_cell = self._rows[self._start[leaf] : self._start[leaf] + self._size[leaf]]
                place, end = places[leaf] % len(of_cell), places[leaf] % len(of_cell) + sizes[leaf]
                parts += [of_cell[place:end], of_cell[: max(0, end - len(of_cell))]]
            yield np.sort(np.concatenate(parts))

    def buckets(self, draw: int) -> np.ndarray:
        """The bucket of each row at a draw, int32 [N]; -1: none takes it."""
        found = np.full(self.num_rows, -1, dtype=np.int32)
        for bucket, rows in enumerate(self.rows(draw, range(self.num_buckets))):
            found[rows] = bucket
        return found

    def _spans(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each leaf begins within its cell, and how many rows it has, int64 [D, leaves] each.

        A leaf that goes over its cell's end goes on at its beginning.
        """
        if self._is_certain:
            return np.zeros((len(draws), len(self._size)), dtype=np.int64), np.tile(self._size, (len(draws), 1))
        back = (-draws.astype(np.int64) * TURN % 2**32)[:, None]

        def before(number: np.ndarray) -> np.ndarray:
            bound = (number + back) % 2**32
            places: np.ndarray = np.searchsorted(self._keys, (self._cell + bound).astype(np.uint64)) - self._start
            around = (bound < back) | (number == 2**32)
            return np.where(around, places + self._size, places)

        low, high = before(self._low), before(self._high)
        return low, high - low


def everything(num_rows: int) -> Assignment:
    """All rows are the one bucket's, at every draw."""
    return Assignment(np.zeros(num_rows, dtype=np.uint64), lambda cell: [(0, 1.0)], 1)


@dataclass(frozen=True)
class Samples:
    """Samples of one step: the epoch each is drawn in, and its row; int64 [N] each."""

    bucket: int
    epochs: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    order: list[np.ndarray]  # of each bucket: its rows, uint32
    left: list[Samples]  # of each bucket: what is left of earlier epochs
    buckets: np.ndarray  # of each step
    ordinals: np.ndarray  # of each step: which one of its bucket's it is in this epoch


class Schedule:
    """The samples of every step of a run, whatever the processes that share them."""

    def __init__(self, assignment: Assignment, samples: Sequence[int], seed: int, *, draws: int = 0) -> None:
        """`samples`: of a step, by bucket. `draws`: as `data.draws`. Raises ValueError, DataError without samples."""
        if min(samples, default=0) < 1:
            raise ValueError(f"a step needs samples, got {list(samples)} by bucket")
        self.assignment, self.samples, self.seed, self.draws = assignment, np.array(samples), seed, draws
        self._taken = np.zeros((1, len(samples)), dtype=np.int64)  # of each bucket, before each epoch
        self._first = np.zeros(1, dtype=np.int64)  # step of each epoch
        self._held: OrderedDict[int, _Epoch] = OrderedDict()

    def step(self, number: int) -> Samples:
        """The samples of a step, counted from 0 over the whole run, in their order. Raises DataError."""
        while self._first[-1] <= number:
            self._count_more()
        epoch = int(np.searchsorted(self._first, number, side="right")) - 1
        found, at = self._epoch(epoch), number - int(self._first[epoch])
        bucket, ordinal = int(found.buckets[at]), int(found.ordinals[at])
        size, left, order = int(self.samples[bucket]), found.left[bucket], found.order[bucket]
        first = ordinal * size - len(left.rows)  # place in this epoch's order
        rows = order[max(0, first) : first + size].astype(np.int64)
        own = Samples(bucket, np.full(len(rows), epoch), rows)
        return own if ordinal else _joined(left, own)

    def require_step(self) -> None:
        """Raise DataError where the samples never make a step."""
        while not self._first[-1]:
            self._count_more()

    def draw(self, epoch: int) -> int:
        """Which of the samples' draws an epoch shows."""
        return epoch % self.draws if self.draws else epoch

    def steps_before(self, epoch: int) -> int:
        """Steps that earlier epochs complete."""
        while len(self._first) <= epoch:
            self._count_more()
        return int(self._first[epoch])

    def _count_more(self) -> None:
        """Count the samples of as many epochs more as were counted before."""
        counted = len(self._taken) - 1
        if counted > max(64, self.draws) and not self._taken[-1].any():
            raise DataError(
                f"no clip goes to any of data.buckets in {counted} epochs: let one that has clips keep more"
            )
        if counted > MOST_EPOCHS and not self._first[-1]:
            raise DataError(
                f"{counted:,} epochs of the clips do not make one step of {self.samples.min():,} samples: lower "
                "train.batch_size (or batch_size of data.buckets) or train.accumulation, or add clips"
            )
        epochs = np.arange(counted, max(1, 2 * counted))
        counts = self.assignment.counts(epochs % self.draws if self.draws else epochs)
        self._taken = np.concatenate([self._taken, self._taken[-1] + counts.cumsum(axis=0)])
        self._first = (self._taken // self.samples).sum(axis=1)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._held:
            self._held.move_to_end(epoch)
            return self._held[epoch]
        before, after = self._taken[epoch], self._taken[epoch + 1]
        left = self._left(epoch, before % self.samples)
        while len(self._held) >= HELD_EPOCHS:
            self._held.popitem(last=False)
        steps = after // self.samples - before // self.samples
        buckets, ordinals = self._spread(epoch, steps)
        found = self._held[epoch] = _Epoch(self._order(epoch, range(len(steps))), left, buckets, ordinals)
        return found

    def _left(self, epoch: int, counts: np.ndarray) -> list[Samples]:
        """The last so many samples of each bucket before an epoch."""
        nothing = np.empty(0, dtype=np.int64)
        found = [Samples(bucket, nothing, nothing) for bucket in range(len(counts))]
        missing = counts.copy()
        while missing.any():
            epoch -= 1
            held, buckets = self._held.get(epoch), np.flatnonzero(missing).tolist()
            orders = [held.order[bucket] for bucket in buckets] if held else self._order(epoch, buckets)
            for bucket, order in zip(buckets, orders, strict=True):
                rows = order[max(0, len(order) - missing[bucket]) :].astype(np.int64)
                found[bucket] = _joined(Samples(bucket, np.full(len(rows), epoch), rows), found[bucket])
                missing[bucket] -= len(rows)
                if held and missing[bucket]:  # which the epoch had begun with
                    earlier, of = held.left[bucket], slice(-missing[bucket], None)
                    found[bucket] = _joined(Samples(bucket, earlier.epochs[of], earlier.rows[of]), found[bucket])
                    missing[bucket] = 0
        return found

    def _order(self, epoch: int, buckets: Sequence[int]) -> list[np.ndarray]:
        """The rows of these buckets in the epoch's order, uint32: a bucket's part of one order of all rows.

        Sorted raw 64-bit words: numpy promises bit generators' raw streams for good, but not those of its
        `permutation`.
        """
        words = np.random.PCG64(keyed_seed(self.seed, epoch, "permutation")).random_raw(self.assignment.num_rows)
        found = []
        for rows in self.assignment.rows(self.draw(epoch), buckets):
            own = words if len(rows) == len(words) else words[rows]
            ordered = np.sort(own)
            ties = (ordered[1:] == ordered[:-1]).any()  # hardly ever; without any, the quicker sort gives the same
            del ordered
            found.append(rows[np.argsort(own, kind="stable" if ties else None)])
        return found

    def _spread(self, epoch: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and ordinal of each of an epoch's steps: one of n falls anywhere in its n-th part of the epoch."""
        buckets = np.repeat(np.arange(len(steps), dtype=np.int32), steps)
        ordinals = np.concatenate([np.arange(count, dtype=np.int32) for count in steps])
        words = np.random.PCG64(keyed_seed(self.seed, epoch, "buckets")).random_raw(len(buckets))
        places = ((words >> np.uint64(11)) * 2.0**-53 + ordinals) / steps[buckets]
        order = np.argsort(places, kind="stable")
        return buckets[order], ordinals[order]


def _joined(first: Samples, second: Samples) -> Samples:
    epochs, rows = np.concatenate([first.epochs, second.epochs]), np.concatenate([first.rows, second.rows])
    return Samples(first.bucket, epochs, rows)


class SampleBatch(list[tuple[int, int]]):
    """(epoch, index) of each sample of a batch; `shape` is what they are cut to (None: the data section's size).

    `shapes`: of each, where they differ.
    """

    def __init__(
        self,
        samples: Iterable[tuple[int, int]] = (),
        shape: Shape | None = None,
        shapes: Sequence[Shape] | None = None,
    ) -> None:
        super().__init__(samples)
        self.shape, self.shapes = shape, shapes


class BatchSampler:
    """One process's part of each micro-batch of a schedule.

    A step is `accumulation` micro-batches, each of which the processes share, all of one bucket: so the samples of a
    step do not depend on how many processes and micro-batches share it.
    """

    def __init__(
        self, schedule: Schedule, shapes: Sequence[Shape], *, rank: int = 0, world_size: int = 1, accumulation: int = 1
    ) -> None:
        """`shapes`: of each bucket's samples. Raises ValueError where a step cannot be shared."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        if (schedule.samples % (world_size * accumulation)).any():
            raise ValueError(f"{world_size} x {accumulation} parts do not divide steps of {schedule.samples} samples")
        self.schedule, self.shapes, self.accumulation = schedule, shapes, accumulation
        self.rank, self.world_size = rank, world_size

    def batch(self, number: int) -> SampleBatch:
        """Return this process's (epoch, index) pairs of a micro-batch, counted from 0 over the whole run."""
        step, part = divmod(number, self.accumulation)
        found = self.schedule.step(step)
        size = len(found.rows) // (self.world_size * self.accumulation)
        first = (part * self.world_size + self.rank) * size
        own = slice(first, first + size)
        pairs = zip(found.epochs[own].tolist(), found.rows[own].tolist(), strict=True)
        return SampleBatch(pairs, self.shapes[found.bucket])


class SharedBatches:
    """The part of each batch that one of the processes reads which work on the same samples: every `size`-th sample."""

    def __init__(self, sampler: BatchSampler, member: int, size: int) -> None:
        self.sampler, self.member, self.size = sampler, member, size

    def batch(self, number: int) -> SampleBatch:
        whole = self.sampler.batch(number)
        if self.size == 1:
            return whole
        return SampleBatch(whole[self.member :: self.size], whole.shape)


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """A batch in its order from its parts, inverse of `SharedBatches`."""
    count = sum(map(len, parts))
    return [parts[index % len(parts)][index // len(parts)] for index in range(count)]
