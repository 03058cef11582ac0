"""Python values between processes: small facts, samples, outcomes. Tensors of the model never travel this way."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class Collectives:
    """What the processes of one gloo group do together; without a group, this process alone."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        paused: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`paused`: the context in which work of one process may take as long as it likes."""
        self.group, self.paused = group, paused
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def gather(self, value: Any) -> list[Any]:
        """Every process's picklable value, in rank order, on every process; waits for all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise here what went wrong anywhere, the first process's error first; wait for all of them."""
        for found in self.gather(None if error is None else picklable(error)):
            if found is not None:
                raise found

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the first process while the others wait; all get its (picklable) result, or raise its error."""
        if self.size == 1:
            return work()
        with self.paused():
            return self._share(work)

    def _share(self, work: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = picklable(error)
                self._broadcast(outcome)
                raise
        self._broadcast(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def _broadcast(self, outcome: list[Any]) -> None:
        assert self.group is not None
        dist.broadcast_object_list(outcome, src=dist.get_global_rank(self.group, 0), group=self.group)


def picklable(error: Exception) -> Exception:
    """The error itself where another process can rebuild it, else one that says the same."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # rebuilds it as unpickling would
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
