"""The rows whose value is closest to a threshold, below and above it, gathered while rows stream by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class NearRow:
    """A row near the threshold."""

    value: float
    id: str
    path: str
    num_frames: int


class Nearest:
    """Keeps the `count` rows just below a threshold and the `count` at or just above it; first come, first kept."""

    def __init__(self, threshold: float, count: int) -> None:
        self.threshold, self.count = threshold, count
        self._below: list[NearRow] = []
        self._above: list[NearRow] = []

    def add(self, values: np.ndarray, batch: Any) -> None:
        """Look at a record batch with the columns id and path; `values` is float64 [rows], NaN for missing."""
        self._below = self._merge(self._below, values, values < self.threshold, batch)
        self._above = self._merge(self._above, values, values >= self.threshold, batch)

    def sides(self) -> tuple[list[NearRow], list[NearRow]]:
        """Return the rows below and those above, the closest first."""
        return self._below, self._above

    def _merge(self, known: list[NearRow], values: np.ndarray, side: np.ndarray, batch: Any) -> list[NearRow]:
        rows = np.flatnonzero(side)
        distances = np.abs(values[rows] - self.threshold)
        if len(known) == self.count:  # most batches hold nothing closer
            closer = distances < abs(known[-1].value - self.threshold)
            rows, distances = rows[closer], distances[closer]
        if len(rows) > self.count:
            reach = np.partition(distances, self.count - 1)[self.count - 1]
            close = distances <= reach
            rows, distances = rows[close], distances[close]
        rows = rows[np.argsort(distances, kind="stable")][: self.count]
        merged = [*known, *(_row(batch, int(row), float(values[row])) for row in rows)]
        return sorted(merged, key=lambda row: abs(row.value - self.threshold))[: self.count]


def _row(batch: Any, row: int, value: float) -> NearRow:
    def cell(name: str) -> Any:
        return batch.column(name)[row].as_py() if name in batch.schema.names else None

    return NearRow(value, str(cell("id")), str(cell("path") or ""), int(cell("num_frames") or 1))
