"""What chance decides: which samples form which batch, and the generators of what is drawn for each sample.

Both are pure functions of their keys. A batch follows from its number; a sample's generators from (seed, epoch, sample
id, stream), where no rank, worker or step enters. So a sample meets the same crop, noise and timestep wherever and
whenever it is processed, and neither resuming nor another layout of processes needs any state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Shape = tuple[int, int, int]  # frames, height, width in pixels


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


class SampleBatch(list[tuple[int, int]]):
    """(epoch, index) of each sample of a batch; `shape` is what they are cut to (None: the data section's size)."""

    def __init__(self, samples: Iterable[tuple[int, int]] = (), shape: Shape | None = None) -> None:
        super().__init__(samples)
        self.shape = shape


class BatchSampler:
    """Endless batches over keyed epoch permutations.

    Batch k of all ranks together covers positions [k * g, (k + 1) * g) of the epochs laid end to end, g = batch_size *
    world_size, and rank r takes the r-th `batch_size` of them. So ranks never share a sample, every sample comes once
    an epoch, and the samples of a global batch do not depend on how many processes share it.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shape: Shape | None = None,
    ) -> None:
        """`batch_size` counts one process's samples; raises ValueError for sizes below one or a rank out of range."""
        if num_samples < 1:
            raise ValueError("the dataset has no samples: there is nothing to draw batches from")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not in [0, world_size={world_size})")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size, self.shape = rank, world_size, shape

    def batch(self, step: int) -> SampleBatch:
        """Return this rank's (epoch, index) pairs of micro-batch `step`, counted from 0 over the whole run."""
        first = (step * self.world_size + self.rank) * self.batch_size
        positions = (divmod(p, self.num_samples) for p in range(first, first + self.batch_size))
        return SampleBatch(((epoch, self._index(epoch, place)) for epoch, place in positions), self.shape)

    def _index(self, epoch: int, place: int) -> int:
        return int(epoch_permutation(self.num_samples, self.seed, epoch)[place])


def drawn(num_samples: int, seed: int, first: int, count: int) -> np.ndarray:
    """Indices of the samples at positions [first, first + count) of the epochs laid end to end, int64 [count]."""
    parts = [np.empty(0, dtype=np.int64)]
    while count > 0:
        epoch, place = divmod(first, num_samples)
        parts.append(epoch_permutation(num_samples, seed, epoch)[place : place + count])
        first, count = first + len(parts[-1]), count - len(parts[-1])
    return np.concatenate(parts)


class SharedBatches:
    """The part of each batch that one of the processes reads which work on the same samples: every `size`-th sample."""

    def __init__(self, sampler: BatchSampler, member: int, size: int) -> None:
        self.sampler, self.member, self.size = sampler, member, size

    def batch(self, step: int) -> SampleBatch:
        whole = self.sampler.batch(step)
        return SampleBatch(whole[self.member :: self.size], whole.shape)


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """A batch in its order from its parts, inverse of `SharedBatches`."""
    count = sum(map(len, parts))
    return [parts[index % len(parts)][index // len(parts)] for index in range(count)]


@lru_cache(maxsize=4)
def epoch_permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the epoch's order, int64 [num_samples].

    Sorted raw 64-bit words: numpy promises bit generators' raw streams for good, but not those of its `permutation`.
    """
    words = np.random.PCG64(keyed_seed(seed, epoch, "permutation")).random_raw(num_samples)
    ordered = np.sort(words)
    ties = (ordered[1:] == ordered[:-1]).any()  # hardly ever; without any, the quicker sort gives the same
    order = np.argsort(words, kind="stable" if ties else None)
    order.setflags(write=False)  # shared through the cache
    return order
