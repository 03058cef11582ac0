"""Samples that cannot be read: recorded with their reason, counted, and never replaced by others."""

from __future__ import annotations

import math
from pathlib import Path

from opensora_repro.data.dataset import BadSample
from opensora_repro.data.manifest import DataError
from opensora_repro.training.metrics import QUARANTINE_FILE, JsonLines


class Quarantine:
    """RUN/quarantine.jsonl: one line (id, path, reason) a bad sample, kept over restarts."""

    def __init__(self, run_dir: Path, *, num_samples: int, max_fraction: float, writes: bool = True) -> None:
        """`writes`: whether this process keeps the file; all count."""
        self._file = JsonLines(run_dir / QUARANTINE_FILE)
        self._num_samples, self._max_fraction, self._writes = num_samples, max_fraction, writes
        self._known = {str(line.get("id")) for line in self._file.read()}
        self._seen: set[str] = set()  # since this start: repaired files of earlier starts do not count

    def add(self, sample: BadSample) -> bool:
        """Record a bad sample; True where it is news. Raises DataError when there are too many."""
        if sample.id in self._seen:
            return False
        self._seen.add(sample.id)
        if self._writes and sample.id not in self._known:
            self._known.add(sample.id)
            self._file.write({"id": sample.id, "path": str(sample.path), "reason": sample.reason})
        limit = math.floor(self._max_fraction * self._num_samples)
        if len(self._seen) > limit:
            raise DataError(
                f"{len(self._seen)} of {self._num_samples} samples cannot be read, more than data.max_bad_fraction = "
                f"{self._max_fraction} allows; the latest is {sample.id!r} ({sample.path}): {sample.reason}; "
                f"all are listed in {self._file.path}"
            )
        return True

    def __len__(self) -> int:
        return len(self._seen)

    def close(self) -> None:
        self._file.close()
