"""How ranks are laid out: data x sequence x tensor parallelism, the last axis fastest.

Ranks that share a sample are neighbours, so that their traffic stays within a machine wherever it fits; tensor
parallelism talks most, so its ranks are the closest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from opensora_repro.errors import EngineError

LAST_PORT = 65535


def launched_as(world_size: int = 1) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE (by default `world_size`) and LOCAL_RANK as torchrun sets them. Raises EngineError."""
    size = _number("WORLD_SIZE", world_size)
    if size < 1:
        raise EngineError(f"WORLD_SIZE={size}: expected at least 1")
    if size > 1 and "WORLD_SIZE" in os.environ and "RANK" not in os.environ:
        raise EngineError(f"WORLD_SIZE={size}, but RANK is not set: start the processes with torchrun, or unset both")
    rank = _number("RANK", 0)
    if not 0 <= rank < size:
        raise EngineError(f"RANK={rank}: expected 0 to {size - 1}, one less than WORLD_SIZE; torchrun sets both")
    local_rank = _number("LOCAL_RANK", 0)
    if local_rank < 0:
        raise EngineError(f"LOCAL_RANK={local_rank}: expected 0 or more")
    return rank, size, local_rank


def meeting_place() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, where several processes find each other. Raises EngineError."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port:
        raise EngineError("several processes, but MASTER_ADDR and MASTER_PORT are not set: start them with torchrun")
    if not port.isdecimal() or int(port) > LAST_PORT:
        raise EngineError(f"MASTER_PORT={port!r} in the environment: expected a port, 0 to {LAST_PORT}")
    return address, int(port)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise EngineError(f"{name}={text!r} in the environment: expected a whole number, as torchrun sets it") from None


@dataclass(frozen=True)
class Mesh:
    """One process's place. Raises EngineError where the processes cannot be laid out."""

    rank: int = 0
    world_size: int = 1
    tp_size: int = 1
    sp_size: int = 1

    model_size: int = field(init=False)  # processes that work on the same samples
    data_size: int = field(init=False)  # shares that a step's samples are divided into
    data_rank: int = field(init=False)
    member: int = field(init=False)  # this process's number among those that work on the same samples

    def __post_init__(self) -> None:
        model_size = self.tp_size * self.sp_size
        if self.world_size % model_size:
            raise EngineError(
                f"{self.world_size} processes are not divisible by parallel.tp_size={self.tp_size} x "
                f"parallel.sp_size={self.sp_size} = {model_size}: start a multiple of {model_size}"
            )
        data_rank, member = divmod(self.rank, model_size)
        derived = {"model_size": model_size, "data_size": self.world_size // model_size}
        for name, value in (derived | {"data_rank": data_rank, "member": member}).items():
            object.__setattr__(self, name, value)  # as a frozen dataclass does itself

    def model_groups(self) -> list[list[int]]:
        """Ranks that work on the same samples."""
        return [list(range(first, first + self.model_size)) for first in range(0, self.world_size, self.model_size)]

    def sequence_groups(self) -> list[list[int]]:
        """Ranks that share a sample's frames and hold the same weights."""
        return [group[t :: self.tp_size] for group in self.model_groups() for t in range(self.tp_size)]
