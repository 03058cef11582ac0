"""The clips that a checkpoint is judged by: held-out ones and training clips, in the size of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from opensora_repro.config import Config, DataConfig
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset
from opensora_repro.data.sample_frames import frames_at_rate
from opensora_repro.data.sampler import keyed_seed
from opensora_repro.errors import DataError
from opensora_repro.evaluation.share import shared
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.training.fill import load_listed

SAME_SHAPE = 0.1  # ratios of width to height that differ by less are alike
AT_ONCE = 64  # clips in memory where only something small of each is kept
MANY = 16  # clips for which processes that read them are worth their start
R = TypeVar("R")


class Clips:
    """At most `count` clips of a manifest's table, the same ones in every process: middle window, centre of the frame.

    Those of about the samples' shape, where there are any: of others, the crop would leave something else to see.
    """

    def __init__(self, table: Any, cfg: Config, count: int, *, what: str) -> None:
        """`what` names the manifest's option in errors. Raises DataError where no clip is long enough."""
        self.data, self.what = cfg.data, what
        rows = _fitting(table, cfg.data)
        if not len(rows):
            raise DataError(f"{what}: none of its {len(table)} clips has {cfg.data.num_frames} frames, as samples have")
        ids = table["id"].to_pylist()
        order = sorted(rows.tolist(), key=lambda row: keyed_seed(0, "evaluation", ids[row]))
        self.seed, self.table = cfg.run.seed, table
        self._take(order[:count])  # of more, these are the first

    def _take(self, rows: Sequence[int]) -> None:
        self.table = self.table.take(rows)
        self.ids: list[str] = self.table["id"].to_pylist()
        self.captions: list[str] = self.table["caption"].to_pylist()
        self.dataset = ClipDataset(self.table, self.data, self.seed, augment=False)

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, numbers: Sequence[int]) -> list[Clip | BadSample]:
        shape = (self.data.num_frames, self.data.height, self.data.width)
        workers = self.data.num_workers if len(numbers) >= MANY else 0
        return list(load_listed(self.dataset, numbers, [shape] * len(numbers), workers))

    def good(self, numbers: Sequence[int]) -> list[Clip]:
        """Clips that `drop_bad` has read before. Raises DataError for one that cannot be read any more."""
        found = self.load(numbers)
        for sample in found:
            if isinstance(sample, BadSample):
                raise DataError(f"{self.what}: clip {sample.id!r} ({sample.path}) cannot be read: {sample.reason}")
        return [sample for sample in found if isinstance(sample, Clip)]

    def drop_bad(self, engine: TorchEngine, max_fraction: float) -> list[str]:
        """Leave out, in every process, what cannot be read; return lines on it. Collective. Raises DataError."""
        found = shared(engine, range(len(self)), self._faults)
        bad = [fault for fault in found if fault is not None]
        if len(bad) > max_fraction * len(self) or len(bad) == len(self):
            raise DataError(f"{self.what}: {len(bad)} of {len(self)} clips cannot be read; {bad[0]}")
        self._take([number for number, fault in enumerate(found) if fault is None])
        return [f"left out of {self.what}: {fault}" for fault in bad]

    def _faults(self, numbers: Sequence[int]) -> list[str | None]:
        parts = [numbers[first : first + AT_ONCE] for first in range(0, len(numbers), AT_ONCE)]
        samples = (sample for part in parts for sample in self.load(part))
        return [f"{s.id!r} ({s.path}): {s.reason}" if isinstance(s, BadSample) else None for s in samples]

    def map_videos(self, numbers: Sequence[int], work: Callable[[list[np.ndarray]], Sequence[R]]) -> list[R | None]:
        """What `work` keeps of each video, uint8 [T, H, W, 3], a few in memory at a time; None: it cannot be read."""
        found: list[R | None] = []
        for first in range(0, len(numbers), AT_ONCE):
            samples = self.load(numbers[first : first + AT_ONCE])
            kept = iter(work([as_video(sample) for sample in samples if isinstance(sample, Clip)]))
            found += [next(kept) if isinstance(sample, Clip) else None for sample in samples]
        return found


def once_each(table: Any) -> Any:
    """A manifest's rows without those of files that rows before have: what is repeated is to be seen once."""
    _, first = np.unique(np.array(table["path"].to_pylist(), dtype=object), return_index=True)
    return table.take(np.sort(first))


def as_video(clip: Clip) -> np.ndarray:
    """uint8 [T, H, W, 3]."""
    return np.ascontiguousarray(clip.pixels.numpy())


def _fitting(table: Any, data: DataConfig) -> np.ndarray:
    columns = (table[name].to_numpy().astype(np.float64) for name in ("num_frames", "fps", "height", "width"))
    num_frames, fps, height, width = columns
    long_enough = frames_at_rate(data, num_frames, fps) >= data.num_frames
    shape = np.abs(np.log(width / height) - np.log(data.width / data.height)) < SAME_SHAPE
    alike = long_enough & shape
    found: np.ndarray = np.flatnonzero(alike if alike.any() else long_enough)
    return found
