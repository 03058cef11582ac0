"""Where a run's samples come from: decoded clips, or the cache of encoded ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

from opensora_repro.data.cache import CacheRows, LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader
from opensora_repro.data.sampler import SharedBatches
from opensora_repro.errors import TrainingError
from opensora_repro.frozen.encoder import Encoded

Sample: TypeAlias = "tuple[int, Clip | Encoded | BadSample]"  # with the epoch it is drawn in

HELD_BYTES = 1 << 30  # cached samples kept in memory


class Feed(Protocol):
    def batches(self, first: int, count: int) -> Iterator[list[Sample]]:
        """Micro-batches first .. first + count - 1 of this rank, in order. Raises TrainingError, OSError."""
        ...


class ClipFeed:
    """Decodes in loader processes while the model computes."""

    def __init__(self, dataset: ClipDataset, sampler: SharedBatches, num_workers: int, *, pinned: bool) -> None:
        """`pinned`: the clips will be encoded on a GPU."""
        self.dataset, self.sampler, self.num_workers, self.pinned = dataset, sampler, num_workers, pinned

    def batches(self, first: int, count: int) -> Iterator[list[Sample]]:
        loader = build_loader(self.dataset, self.sampler, first, count, self.num_workers, pinned=self.pinned)
        try:
            for number, clips in enumerate(loader, start=first):
                epochs = [epoch for epoch, _ in self.sampler.batch(number)]
                yield list(zip(epochs, clips, strict=True))
        except LoaderDied as error:
            raise TrainingError(str(error)) from error


class CacheFeed:
    """Reads what was encoded before; the first `HELD_BYTES` met stay in memory.

    A sample that is not in the cache could not be read when it was filled.
    """

    def __init__(self, cache: LatentCache, sampler: SharedBatches, rows: CacheRows, draws: int) -> None:
        self.cache, self.sampler, self.rows, self.draws = cache, sampler, rows, draws
        self._absent = set(cache.missing(rows.keys(draws)))
        self._held: dict[tuple[str, int], Encoded] = {}
        self._held_bytes = 0

    def batches(self, first: int, count: int) -> Iterator[list[Sample]]:
        for number in range(first, first + count):
            yield [(epoch, self._get(index, epoch % self.draws)) for epoch, index in self.sampler.batch(number)]

    def _get(self, index: int, draw: int) -> Encoded | BadSample:
        key = (self.rows.names[index], draw)
        if key in self._held:
            return self._held[key]
        if key in self._absent:
            reason = "could not be read when the cache was filled"
            return BadSample(self.rows.ids[index], self.rows.paths[index], reason)
        encoded = Encoded(self.rows.ids[index], **self.cache.get(key))
        size = encoded.moments.nbytes + encoded.text.nbytes + encoded.mask.nbytes
        if self._held_bytes + size <= HELD_BYTES:
            self._held[key] = encoded
            self._held_bytes += size
        return encoded


def ids_fingerprint(ids: Sequence[str]) -> str:
    """Digest of the ids in their order, on which the order of training depends."""
    digest = hashlib.blake2b(digest_size=8)
    for name in ids:
        digest.update(f"{len(name)}:{name}".encode())
    return f"{len(ids)} samples, ids {digest.hexdigest()}"
