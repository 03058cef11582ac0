"""Batches sized by free memory, as a function of it: no GPU is needed to see what they do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from opensora_repro.frozen.fitting import FittingBatches

GIB = 1 << 30


class Device:
    """So many bytes, of which each item of a batch takes `each`, and the whole a square's part of `more`."""

    def __init__(self, size: int, each: int, more: int = 0) -> None:
        self.size, self.each, self.more, self.taken = size, each, more, 0
        self.batches: list[int] = []

    def work(self, items: Sequence[int]) -> list[int]:
        self.batches.append(len(items))
        self.taken = self.each * len(items) + self.more * len(items) ** 2
        if self.taken > self.size:
            raise MemoryError
        return [item * item for item in items]

    def free(self) -> int:
        return self.size

    def begin(self) -> None:
        self.taken = 0

    def peak(self) -> int:
        return self.taken

    def release(self) -> None:
        self.taken = 0


@pytest.mark.parametrize(
    ("device", "batches"),
    [
        (Device(100 * GIB, GIB), [1, 4, 16, 64, 70, 45]),
        (Device(10 * GIB, GIB), [1, 4, *[7] * 27, 6]),
        (Device(GIB, GIB), [1] * 200),
        (Device(10 * GIB, GIB // 10, GIB // 8), [1, 4, 11, *[5] * 39]),  # attention: eleven do not fit, five do
        (Device(0, 0), [1, 4, 16, 64, 115]),  # nothing is told
    ],
)
def test_batches_are_as_large_as_memory_has_room_for(device: Device, batches: list[int]) -> None:
    fitting = FittingBatches(device)
    assert fitting.run(device.work, range(200)) == [n * n for n in range(200)]
    assert device.batches == batches
    assert fitting.run(device.work, range(3)) == [0, 1, 4] and device.batches[len(batches)] in (1, 3)  # learnt


def test_one_that_does_not_fit_alone_is_told() -> None:
    device = Device(GIB, 2 * GIB)
    with pytest.raises(MemoryError):
        FittingBatches(device).run(device.work, range(5))
