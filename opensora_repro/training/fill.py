"""All processes fill the cache of encoded samples, and judge together how many could not be read."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from opensora_repro.config import Config
from opensora_repro.data.cache import CacheRows, LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader
from opensora_repro.data.sampler import SampleBatch
from opensora_repro.errors import TrainingError, cannot_write
from opensora_repro.frozen.encoder import Encoder
from opensora_repro.frozen.hashes import HashMemo
from opensora_repro.parallel.engine import Engine
from opensora_repro.training.quarantine import Quarantine

FROZEN_HASHES = "frozen-files.json"  # in a cache's folder: the frozen models' digests
FLUSH_EVERY = 256  # samples between the cache's writes: what a killed fill loses at most


@dataclass
class Tried:
    """What one process has tried since the processes last compared notes."""

    indices: set[int] = field(default_factory=set)
    bad: dict[str, BadSample] = field(default_factory=dict)
    full: bool = False  # nothing of its share is left
    stopped: bool = False


def fill_together(
    dataset: ClipDataset,
    rows: CacheRows,
    encoder: Encoder,
    cache: LatentCache,
    engine: Engine,
    quarantine: Quarantine,
    *,
    num_workers: int,
    stopped: Callable[[], bool],
) -> None:
    """Encode what the cache lacks; collective. Ends early where a process is `stopped()`.

    A process with too many bad samples in its own share pauses, so that all judge whether there are too many in all.
    Raises, in every process alike, DataError where there are, TrainingError where a process cannot go on.
    """
    missing = {name for name, _ in cache.missing(rows.keys(dataset.cfg.draws))}
    quarantine.saw([index for index, name in enumerate(rows.names) if name not in missing])
    while True:
        tried, error = _fill_share(dataset, rows, encoder, cache, engine, quarantine, num_workers, stopped)
        engine.peers.agree(error)
        everyone: list[Tried] = engine.peers.gather(tried)
        for other in everyone:
            quarantine.saw(sorted(other.indices))
            for sample in other.bad.values():
                quarantine.add(sample)
        engine.peers.agree(quarantine.error)
        quarantine.check()
        if all(other.full for other in everyone) or any(other.stopped for other in everyone):
            return


def _fill_share(
    dataset: ClipDataset,
    rows: CacheRows,
    encoder: Encoder,
    cache: LatentCache,
    engine: Engine,
    quarantine: Quarantine,
    num_workers: int,
    stopped: Callable[[], bool],
) -> tuple[Tried, TrainingError | None]:
    """Until this process's share is done, or too much of what it has tried is bad."""
    tried = Tried()

    def attempted(index: int) -> None:
        if rows.ids[index] not in quarantine:  # bad ones are tried again in each round
            tried.indices.add(index)

    def set_aside(sample: BadSample) -> None:
        if sample.id not in quarantine:
            tried.bad[sample.id] = sample

    def pauses() -> bool:
        return stopped() or quarantine.is_too_much(len(tried.bad), len(tried.indices))

    share = (engine.mesh.rank, engine.mesh.world_size)
    try:
        fill_cache(
            dataset, rows, share, encoder, cache,
            num_workers=num_workers, set_aside=set_aside, stopped=pauses, attempted=attempted,
        )  # fmt: skip
    except TrainingError as error:
        return tried, TrainingError(f"{error}; what is encoded is in the cache, the same command goes on")
    except OSError as error:
        kept = "what was written before is kept, the same command goes on; or set another data.cache"
        return tried, TrainingError(f"{cannot_write(error)}; {kept}")
    tried.full, tried.stopped = not pauses(), stopped()
    return tried, None


def cache_fingerprint(cfg: Config, encoder: Encoder) -> str:
    """Digest of all that an encoded sample depends on, but for its row and its draw.

    The frozen models enter by their files' digests, which `data.cache` remembers.
    """
    hash_file = HashMemo(Path(cfg.data.cache) / FROZEN_HASHES)
    keys = ("num_frames", "frame_interval", "height", "width", "flip", "draws")
    content = {
        "vae": encoder.vae.fingerprint(hash_file),
        "text": encoder.text.fingerprint(hash_file),
        "max_length": cfg.model.model_max_length,
        "half": encoder.half,
        "text dtype": str(encoder.text_dtype),
        "data": {key: getattr(cfg.data, key) for key in keys},
        "seed": cfg.run.seed,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fill_cache(
    dataset: ClipDataset,
    rows: CacheRows,
    share: tuple[int, int],
    encoder: Encoder,
    cache: LatentCache,
    *,
    num_workers: int,
    set_aside: Callable[[BadSample], None],
    stopped: Callable[[], bool],
    attempted: Callable[[int], None] = lambda index: None,
) -> None:
    """Encode what the cache lacks of every sample's draws; what a killed fill wrote is kept.

    `share` is (rank, world size): each process fills its rows. `attempted` is told each row's index, with every draw.
    Ends early once `stopped()`. Raises OSError where the cache cannot be written, TrainingError without its loaders.
    """
    from tqdm import tqdm

    draws = dataset.cfg.draws
    missing = set(cache.missing(rows.keys(draws)))
    # A share is every so many rows of all, not of those missing: others write while this one looks. A row's draws stay
    # together, so that its caption is encoded once.
    own = range(share[0], len(rows.names), share[1])
    todo = [(draw, i) for i in own for draw in range(draws) if (rows.names[i], draw) in missing]
    if not todo:
        return
    interval = 0.5 if sys.stderr.isatty() else 15.0
    with tqdm(
        total=len(todo), desc="encoding", unit="clip", mininterval=interval, dynamic_ncols=True, disable=share[0] > 0
    ) as bar:
        try:
            samples = encoder.encoded(sample for _, _, sample in _load(dataset, todo, num_workers))
            for done, ((draw, index), sample) in enumerate(zip(todo, samples, strict=True), start=1):
                attempted(index)
                if isinstance(sample, BadSample):
                    set_aside(sample)
                else:
                    entry = {"moments": sample.moments, "text": sample.text, "mask": sample.mask}
                    cache.put((rows.names[index], draw), entry)
                if done % FLUSH_EVERY == 0:
                    cache.flush()
                bar.update(1)
                if stopped():
                    break
        except TrainingError:
            cache.flush()
            raise
    cache.flush()


def load_listed(dataset: ClipDataset, indices: list[int], num_workers: int) -> Iterator[Clip | BadSample]:
    """The samples of these indexes, in order."""
    for _, _, sample in _load(dataset, [(0, index) for index in indices], num_workers):
        yield sample


class _Listed:
    """A sampler of listed (draw, index) pairs, one a batch, for the loader."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self._pairs = pairs

    def batch(self, step: int) -> SampleBatch:
        return SampleBatch([self._pairs[step]])


def _load(
    dataset: ClipDataset, pairs: list[tuple[int, int]], num_workers: int
) -> Iterator[tuple[int, int, Clip | BadSample]]:
    loader = build_loader(dataset, _Listed(pairs), 0, len(pairs), num_workers)
    try:
        for (draw, index), (sample,) in zip(pairs, loader, strict=True):
            yield draw, index, sample
    except LoaderDied as error:
        raise TrainingError(str(error)) from error
