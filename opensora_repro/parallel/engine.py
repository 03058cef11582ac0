"""Where processes and devices are known: the engine's protocol and the plain torch engine.

The torch engine is one process, or plain data parallelism (DistributedDataParallel) when started by torchrun: gloo on
CPUs, NCCL on GPUs. Weights, gradients and optimizer state are whole on every rank; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora_repro.parallel.errors import EngineError as EngineError
from opensora_repro.parallel.preflight import launch
from opensora_repro.parallel.watchdog import Watchdog

Result = TypeVar("Result")

# Work that only rank 0 does (filling a cache, sampling) may outlast any collective's usual time limit.
PATIENCE = datetime.timedelta(days=7)


class Engine(Protocol):
    """What training asks of the processes that run it."""

    device: torch.device
    rank: int
    world_size: int
    watchdog: Watchdog

    @property
    def is_main(self) -> bool: ...

    def wrap(self, model: nn.Module) -> nn.Module: ...

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]: ...

    def sum(self, values: Tensor) -> Tensor: ...

    def gather(self, value: Any) -> list[Any]: ...

    def on_main(self, work: Callable[[], Result]) -> Result: ...

    def close(self) -> None: ...


class TorchEngine:
    """One process, or torchrun's data-parallel ones.

    Raises EngineError where there are more processes than GPUs, or where the processes do not come together.
    """

    def __init__(self, device: str | None = None, timeout: float = 600) -> None:
        """`device`: "cpu" or "cuda"; None takes the GPU where there is one. `timeout`: seconds a step may take."""
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        self._patient: dist.ProcessGroup | None = None
        self.watchdog = launch(self.rank, self.world_size, self.device, timeout)
        if self.world_size > 1:
            self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to run forward and backward through; every rank then holds rank 0's weights."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def accumulating(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch's forward and backward: ranks average their gradients at the step's last one only."""
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over all ranks, in place; every rank gets the result."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 while the others wait; all get its (picklable) result, or raise its error."""
        if self.world_size == 1:
            return work()
        with self.watchdog.paused():
            return self._share(work)

    def _share(self, work: Callable[[], Result]) -> Result:
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = _picklable(error)
                dist.broadcast_object_list(outcome, group=self._patient)
                raise
        dist.broadcast_object_list(outcome, group=self._patient)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
        self.watchdog.close()


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """The GPU of this process's local rank, or the CPU. Raises EngineError."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise EngineError(
            f"process {local_rank} of this machine has no GPU ({count} found): start torchrun with "
            f"--nproc-per-node={count}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _picklable(error: Exception) -> Exception:
    """The error itself where another process can rebuild it, else one that says the same."""
    try:
        pickle.dumps(error)
        copy.copy(error)  # rebuilds it as unpickling would
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
