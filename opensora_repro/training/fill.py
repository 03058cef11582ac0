"""All processes fill the cache of encoded samples, and judge together how many could not be read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from opensora_repro.config import Config
from opensora_repro.data.cache import FIELDS, CacheRows, LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader
from opensora_repro.data.sampler import SampleBatch, Shape
from opensora_repro.errors import TrainingError, cannot_write
from opensora_repro.files import Sha256Memo, digest
from opensora_repro.frozen.encoder import Encoder
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.storage.addresses import place
from opensora_repro.training.metrics import Quarantine

FROZEN_HASHES = "frozen-files.json"  # in a cache's folder: the frozen models' digests
FLUSH_EVERY = 256  # samples between the cache's writes: what a killed fill loses at most


def cache_fingerprint(cfg: Config, encoder: Encoder) -> str:
    """Digest of all that an encoded sample depends on, but for its row and its draw.

    The frozen models enter by their files' digests, which `data.cache` remembers.
    """
    hash_file = Sha256Memo.in_file(place(cfg.data.cache) / FROZEN_HASHES)
    keys = ["frame_interval", "fps", "frame_sampling", "flip", "draws"]
    keys += [] if cfg.data.buckets else ["num_frames", "height", "width"]  # buckets: each sample's key says it
    content = {
        "vae": encoder.vae.fingerprint(hash_file),
        "text": encoder.text.fingerprint(hash_file),
        "max_length": cfg.model.model_max_length,
        "half": encoder.half,
        "text dtype": str(encoder.text_dtype),
        "data": {key: getattr(cfg.data, key) for key in keys},
        "seed": cfg.run.seed,
    }
    return digest([content])


@dataclass
class CacheFill:
    """One process's share of the encoding: every so many rows, with all their draws."""

    dataset: ClipDataset
    rows: CacheRows
    encoder: Encoder
    cache: LatentCache
    num_workers: int
    rank: int = 0
    world_size: int = 1

    def missing(self) -> set[tuple[str, int]]:
        """(row's name, draw) of what the cache lacks, in any share."""
        return set(self.cache.missing(self.rows.keys()))

    def encode(self) -> Generator[tuple[int, BadSample | None], None, None]:
        """Encode what the share lacks; yields each sample's index, and what could not be read instead of the sample.

        What was encoded is in the cache however the iteration ends. Raises OSError where that cannot be written,
        TrainingError without its loaders.
        """
        from tqdm import tqdm

        missing = self.missing()
        # A share is of all rows, not of those missing: others write while this one looks. A row's draws stay
        # together, so that its caption is encoded once.
        own = range(self.rank, len(self.rows), self.world_size)
        draws = range(self.rows.draws)
        todo = [(draw, index) for index in own for draw in draws if self.rows.key(index, draw) in missing]
        if not todo:
            return
        shapes = [self.rows.shape(index, draw) for draw, index in todo]
        samples = self.encoder.encoded(_load(self.dataset, todo, shapes, self.num_workers))
        interval = 0.5 if sys.stderr.isatty() else 15.0
        bar = tqdm(
            total=len(todo), desc="encoding", unit="clip", mininterval=interval, dynamic_ncols=True,
            disable=self.rank > 0,
        )  # fmt: skip
        try:
            for done, ((draw, index), sample) in enumerate(zip(todo, samples, strict=True), start=1):
                bad = sample if isinstance(sample, BadSample) else None
                if not isinstance(sample, BadSample):
                    entry = {name: getattr(sample, name) for name in FIELDS}
                    self.cache.put(self.rows.key(index, draw), entry)
                if done % FLUSH_EVERY == 0:
                    self.cache.flush()
                bar.update(1)
                yield index, bad
        finally:
            bar.close()
            self.cache.flush()


@dataclass
class Tried:
    """What one process has tried since the processes last compared notes."""

    indices: set[int] = field(default_factory=set)
    bad: dict[str, BadSample] = field(default_factory=dict)
    full: bool = False  # nothing of its share is left
    stopped: bool = False


def fill_cache(fill: CacheFill, engine: TorchEngine, quarantine: Quarantine, stopped: Callable[[], bool]) -> None:
    """Encode what the cache lacks; collective. Ends early where a process is `stopped()`.

    A process with too many bad samples in its own share pauses, so that all judge whether there are too many in all.
    Raises, in every process alike, DataError where there are, TrainingError where a process cannot go on.
    """
    missing = fill.missing()
    keys = (set(fill.rows.keys_of(index)) for index in range(len(fill.rows)))
    quarantine.saw([index for index, own in enumerate(keys) if own and own.isdisjoint(missing)])
    while True:
        tried, error = Tried(), None
        try:
            _try_share(fill, tried, quarantine, stopped)
        except TrainingError as found:
            error = TrainingError(f"{found}; what is encoded is in the cache, the same command goes on")
        except OSError as found:
            kept = "what was written before is kept, the same command goes on; or set another data.cache"
            error = TrainingError(f"{cannot_write(found)}; {kept}")
        fill.encoder.join()
        engine.world.agree(error)
        everyone: list[Tried] = engine.world.gather(tried)
        for other in everyone:
            quarantine.saw(sorted(other.indices))
            for sample in other.bad.values():
                quarantine.add(sample)
        engine.world.agree(quarantine.error)
        quarantine.check()
        if all(other.full for other in everyone) or any(other.stopped for other in everyone):
            return


def _try_share(fill: CacheFill, tried: Tried, quarantine: Quarantine, stopped: Callable[[], bool]) -> None:
    """Until this process's share is done, or too much of what it has tried is bad."""
    with closing(fill.encode()) as samples:
        for index, bad in samples:
            if fill.rows.id(index) not in quarantine:  # bad ones are tried again in each round
                tried.indices.add(index)
            if bad is not None and bad.id not in quarantine:
                tried.bad[bad.id] = bad
            tried.stopped = stopped()
            if tried.stopped or quarantine.is_too_much(len(tried.bad), len(tried.indices)):
                return
    tried.full, tried.stopped = True, stopped()


def load_listed(
    dataset: ClipDataset, indices: Sequence[int], shapes: Sequence[Shape], num_workers: int
) -> Iterator[Clip | BadSample]:
    """The samples of these indexes in these shapes, in order."""
    return _load(dataset, [(0, index) for index in indices], shapes, num_workers)


class _Listed:
    """A sampler of listed (draw, index) pairs, one a batch, for the loader."""

    def __init__(self, pairs: Sequence[tuple[int, int]], shapes: Sequence[Shape | None]) -> None:
        self._pairs, self._shapes = pairs, shapes

    def batch(self, step: int) -> SampleBatch:
        return SampleBatch([self._pairs[step]], self._shapes[step])


def _load(
    dataset: ClipDataset, pairs: Sequence[tuple[int, int]], shapes: Sequence[Shape | None], num_workers: int
) -> Iterator[Clip | BadSample]:
    try:
        for (sample,) in build_loader(dataset, _Listed(pairs, shapes), 0, len(pairs), num_workers):
            yield sample
    except LoaderDied as error:
        raise TrainingError(str(error)) from error
