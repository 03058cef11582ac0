"""All processes fill the cache of encoded samples, and judge together how many could not be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opensora_repro.data.cache import LatentCache
from opensora_repro.data.dataset import BadSample, ClipDataset
from opensora_repro.errors import TrainingError, cannot_write
from opensora_repro.frozen.encoder import Encoder, fill_cache
from opensora_repro.parallel.engine import Engine
from opensora_repro.training.feed import CacheRows
from opensora_repro.training.quarantine import Quarantine


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
