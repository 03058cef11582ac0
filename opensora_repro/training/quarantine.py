"""Samples that cannot be read: recorded with their reason, counted, and never replaced by others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opensora_repro.data.dataset import BadSample
from opensora_repro.errors import DataError, TrainingError
from opensora_repro.run_folder import QUARANTINE_FILE, JsonLines

JUDGED_FROM = 20  # samples seen: the share of fewer says little, unless there are no more


class Quarantine:
    """RUN/quarantine.jsonl: one line (id, path, reason) a bad sample, kept over restarts.

    What counts is the share of the samples seen since this start: repaired files of earlier starts do not.
    """

    def __init__(
        self, run_dir: Path, *, num_samples: int, max_fraction: float, writes: bool = True, kind: str = "samples"
    ) -> None:
        """`writes`: whether this process keeps the file; all count. `kind` is what messages call the samples."""
        self._file = JsonLines(run_dir / QUARANTINE_FILE)
        self.num_samples, self._max_fraction, self._writes, self._kind = num_samples, max_fraction, writes, kind
        self._known = {(line.get("id"), line.get("path")) for line in self._file.read()}
        self._bad: set[str] = set()
        self._latest: BadSample | None = None
        self._seen = np.zeros(num_samples, dtype=bool)
        self.num_seen = 0

    def saw(self, indices: Sequence[int] | np.ndarray) -> None:
        """These rows of the manifest were tried by some process, good or bad; a row counts once."""
        if self.num_seen < self.num_samples:
            self._seen[np.asarray(indices, dtype=np.int64)] = True
            self.num_seen = int(np.count_nonzero(self._seen))

    def add(self, sample: BadSample) -> bool:
        """Record a bad sample; True where it is news."""
        if sample.id in self._bad:
            return False
        self._bad.add(sample.id)
        self._latest = sample
        if self._writes and (sample.id, str(sample.path)) not in self._known:
            self._file.write({"id": sample.id, "path": str(sample.path), "reason": sample.reason})
        return True

    def check(self) -> None:
        """Raise DataError where more of the samples seen are bad than `max_fraction`."""
        if self.is_too_much(len(self._bad), self.num_seen):
            limit = f"more than data.max_bad_fraction = {self._max_fraction} allows"
            raise DataError(f"{self._share()} cannot be read, {limit}; {self.latest()}")

    def summary(self) -> str:
        """One line on the bad ones so far."""
        return f"{self._share()} cannot be read and are set aside; {self.latest()}"

    def _share(self) -> str:
        return f"{len(self._bad)} of {self.num_seen} {self._kind}"

    def is_too_much(self, num_bad: int, num_seen: int) -> bool:
        return num_seen >= min(JUDGED_FROM, self.num_samples) and num_bad / num_seen > self._max_fraction

    def latest(self) -> str:
        """The latest bad sample and where all are listed, for a message."""
        if self._latest is None:
            return "none was bad"
        sample = self._latest
        return f"the latest is {sample.id!r} ({sample.path}): {sample.reason}; all are listed in {self._file.path}"

    @property
    def error(self) -> TrainingError | None:
        """Why the file could not be written; None where it could."""
        return self._file.error

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._bad

    def __len__(self) -> int:
        return len(self._bad)

    def close(self) -> None:
        self._file.close()
