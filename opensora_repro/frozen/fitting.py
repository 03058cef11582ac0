"""How many items a model takes at a time: as many as the memory that is free where it computes has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from opensora_repro.errors import is_out_of_memory

USED = 0.7  # of what is free: items differ, and an allocator leaves gaps
GROWTH = 4  # times as large as the one before a batch is at most: the first ones tell little of what large ones take
Item = TypeVar("Item")
Result = TypeVar("Result")


class Memory(Protocol):
    """What a device tells of its memory, in bytes."""

    def free(self) -> int: ...

    def begin(self) -> None: ...

    def peak(self) -> int:
        """The most that was taken at a time since `begin`, beside what was taken then."""

    def release(self) -> None:
        """Give back what is kept for later use."""


class CudaMemory:
    """Of a GPU, as torch's allocator and the driver tell."""

    def __init__(self, device: str) -> None:
        self.device, self.before = device, 0

    def free(self) -> int:
        from torch import cuda

        kept = cuda.memory_reserved(self.device) - cuda.memory_allocated(self.device)
        return int(cuda.mem_get_info(self.device)[0]) + kept

    def begin(self) -> None:
        from torch import cuda

        cuda.reset_peak_memory_stats(self.device)
        self.before = cuda.memory_allocated(self.device)

    def peak(self) -> int:
        from torch import cuda

        return cuda.max_memory_allocated(self.device) - self.before

    def release(self) -> None:
        from torch import cuda

        cuda.empty_cache()


class FittingBatches:
    """Sizes each batch by what an item of the one before took; a batch that does not fit is halved, and none is as
    large again."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.size, self.most = memory, 1, 1 << 30

    def run(self, work: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
        """Return what `work` gives for the items, in their order. Raises what it does, out of memory for one alone."""
        results: list[Result] = []
        while left := items[len(results) :]:
            batch = left[: self.size]
            self.memory.begin()
            try:
                results += work(batch)
            except Exception as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self.size = self.most = len(batch) // 2
            else:
                self._grow(len(batch))
                continue
            self.memory.release()  # here the error no longer holds what the batch took
        return results

    def _grow(self, count: int) -> None:
        each = self.memory.peak() / count
        room = int(USED * self.memory.free() / each) if each > 0 else self.most
        self.size = max(1, min(room, GROWTH * count, self.most))


@lru_cache(maxsize=1)
def batches_on(device: str) -> FittingBatches:
    """Return the batches of this process's model on a GPU, which learn from one call to the next."""
    return FittingBatches(CudaMemory(device))


def in_batches_that_fit(
    work: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any], device: str, *, given: bool
) -> list[Any]:
    """Return what `work` gives for the items, on a GPU in batches that fit; all at once where a size was `given`."""
    fits = not given and device.startswith("cuda")
    return batches_on(device).run(work, items) if fits else list(work(items))
