"""The devices that processes compute on: all that is asked of CUDA itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from opensora_repro import process
from opensora_repro.errors import EngineError


def default_kind() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """The device torch calls `name`; "cuda" is this process's GPU by its local rank, None a GPU where there is one.

    Raises EngineError where there is no such GPU.
    """
    device = torch.device(name or default_kind())
    if device.type != "cuda":
        return device
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise EngineError(
            f"process {local_rank} of this machine has no GPU {index} ({count} found): start torchrun with "
            f"--nproc-per-node={count}, or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on CPUs"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_kind(device: torch.device) -> str:
    """`cpu`, or what a GPU calls itself, such as `NVIDIA H100`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_name(device: torch.device) -> str:
    """`cpu`, or `cuda:0 (NVIDIA H100)`."""
    return f"{device} ({device_kind(device)})" if device.type == "cuda" else str(device)


def total_memory(device: torch.device) -> int:
    """A GPU's memory in bytes."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def backend_of(device: torch.device) -> str:
    """The collectives' library for tensors on the device."""
    return "nccl" if device.type == "cuda" else "gloo"


def return_memory(device: torch.device) -> None:
    """Give freed memory back to the device, for others to take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Give freed memory back, and let `peak_memory` count from here."""
    return_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        process.forget_peak()


def peak_memory(device: torch.device) -> int:
    """The most bytes of a GPU's memory in tensors at a time; on a CPU, of the whole process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process.peak_memory()


class HostValues:
    """A device's numbers on their way to host memory. Only `read` waits, and only where they have not arrived."""

    def __init__(self, values: Tensor) -> None:
        """`values` [N] are fetched once all that the current stream has been given so far is done."""
        self._arrived: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._host = values.detach().clone()
            return
        self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._host.copy_(values.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
        self._arrived.record()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._host.tolist()
        return found


class SideStream:
    """Work that a GPU does beside its main stream's, one result ahead of that; a CPU does it when it is given."""

    def __init__(self, device: torch.device) -> None:
        """What the main stream has been given until now comes first: the work may read what that makes."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._done: torch.cuda.Event | None = None
        self._taken: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The block's work goes to the side stream, where it waits for earlier work of that stream alone.

        Waits until the main stream has come to the result that was handed over last: what the host gives away too early
        would only fill memory.
        """
        if self._stream is None:
            yield
            return
        if self._taken is not None:
            self._taken.synchronize()
        with torch.cuda.stream(self._stream):
            yield
            self._done = self._stream.record_event()

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """From here on the main stream may read these results of the last block: it waits for them, the host does not.

        Once they are freed, their memory is used anew only when the main stream has come that far.
        """
        if self._stream is None or self._done is None:
            return
        main = torch.cuda.current_stream(self._stream.device)
        main.wait_event(self._done)
        self._taken = torch.cuda.Event(blocking=True)
        self._taken.record(main)
        read_here(results)


def read_here(tensors: Iterable[Tensor]) -> None:
    """Tensors that another stream may have made are read by the current one: their memory waits for it, too."""
    for tensor in tensors:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
