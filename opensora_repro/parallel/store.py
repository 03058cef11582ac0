"""The store through which processes find each other, and who they are.

A small key-value server outside any collective, so that it still answers when a collective does not. Under torchrun the
agent of the first host keeps it, else process 0 does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed import Store as Store  # type: ignore[attr-defined]

from opensora_repro.errors import EngineError
from opensora_repro.parallel.mesh import meeting_place


@dataclass(frozen=True)
class Place:
    """Where a process runs."""

    rank: int
    host: str
    pid: int
    device: str

    def __str__(self) -> str:
        return f"process {self.rank} (host {self.host}, pid {self.pid})"


def kept_by_agent() -> bool:
    """Whether torchrun keeps the store; it then outlives every process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def keeps_store(rank: int) -> bool:
    return rank == 0 and not kept_by_agent()


def keeper() -> str:
    """Who keeps the store, for a message."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"torchrun at {address}" if kept_by_agent() else f"process 0 at {address}"


def open_store(*, serve: bool, timeout: float) -> Store:
    """A connection of its own to the store of this start of the job; `serve`: keep the store as well.

    Keys of an earlier start are not seen: torchrun's store outlives a restart. Raises EngineError where nobody answers
    within `timeout` seconds, or where the port is taken.
    """
    address, port = meeting_place()
    try:
        store = TCPStore(
            address,
            port,
            is_master=serve,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if serve:
            raise EngineError(f"port {port} (MASTER_PORT) cannot be opened: {reason}") from None
        raise EngineError(
            f"{keeper()} does not answer within {timeout:.0f} s: see that it has started, that this host reaches it, "
            f"and that MASTER_ADDR and MASTER_PORT are its own ({reason})"
        ) from None
    return part_of(store, f"opensora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")


def part_of(store: Store, name: str) -> Store:
    """The same store, with keys of its own."""
    return PrefixStore(name, store)


def listed(items: Sequence[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
