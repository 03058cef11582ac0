"""A file whose reading does not come back: found from outside, for a decoder that hangs cannot be asked.

Who reads says in shared memory which row it has begun; a thread of the training process looks there now and then. It
counts its own looks, not the clock, so that a job that was stopped as a whole is not taken for a stuck one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

IDLE = -1
LOOKS, LONGEST_PAUSE = 4, 1.0  # looks within the limit at least; seconds between two of them at most


class Readings:
    """Which row of the manifest each reader is at, for all processes to see."""

    def __init__(self, num_readers: int) -> None:
        # Row and number of the reading: a reader may come back to the same row.
        self._rows = torch.full((num_readers, 2), IDLE, dtype=torch.int64).share_memory_()

    @contextmanager
    def reading(self, reader: int, row: int) -> Iterator[None]:
        mine = self._rows[reader].numpy()
        mine[1] += 1
        mine[0] = row
        try:
            yield
        finally:
            mine[0] = IDLE

    def now(self) -> list[tuple[int, int]]:
        """Return (row or IDLE, number of the reading) of each reader."""
        return [(int(row), int(number)) for row, number in self._rows.numpy()]


@contextmanager
def watching(readings: Readings, limit: float, end: Callable[[int, int], None]) -> Iterator[None]:
    """Meanwhile call `end(reader, row)`, in a thread, once for a reading that takes `limit` seconds; 0: never."""
    over = threading.Event()
    pause = min(LONGEST_PAUSE, limit / LOOKS)

    def watch() -> None:
        seen = readings.now()
        looks = [0] * len(seen)
        while not over.wait(pause):
            for reader, now in enumerate(readings.now()):
                looks[reader] = looks[reader] + 1 if now == seen[reader] and now[0] != IDLE else 0
                if looks[reader] == round(limit / pause):
                    end(reader, now[0])
                seen[reader] = now

    thread = threading.Thread(target=watch, daemon=True)
    if limit:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if limit:
            thread.join()
