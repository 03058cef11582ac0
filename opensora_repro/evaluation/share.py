"""Processes that share out work on a list, and all get all of its results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from opensora_repro.errors import TrainingError, UserError
from opensora_repro.parallel.engine import TorchEngine

T = TypeVar("T")
R = TypeVar("R")


def shared(engine: TorchEngine, items: Sequence[T], work: Callable[[Sequence[T]], Iterable[R]]) -> list[R]:
    """`work` gives a (picklable) result for each item of a share. Collective; what goes wrong is raised in all."""
    rank, size = engine.mesh.data_rank, engine.mesh.data_size
    found: list[R] = []
    error: Exception | None = None
    try:
        found = list(work(items[rank::size]))
    except (UserError, TrainingError) as mistake:
        error = mistake
    engine.world.agree(error)
    parts: list[Any] = engine.world.gather(found)[:: engine.mesh.model_size]  # others work on the same
    return [parts[index % size][index // size] for index in range(len(items))]
