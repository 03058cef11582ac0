"""Before anything is computed: are all processes here, does a collective reach them, and were they started alike?"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_repro.config import Config, config_dict
from opensora_repro.errors import EngineError
from opensora_repro.parallel.device import backend_of, device_name
from opensora_repro.parallel.store import Place, Store, keeper, keeps_store, listed, open_store, part_of
from opensora_repro.parallel.watchdog import Watchdog

DEADLINE = 60.0  # seconds for all processes to arrive, and again for the first all-reduce
MARGIN = 30.0  # seconds a collective may outlast the watchdog's limit, so that the watchdog with its stacks comes first
POLL = 0.05  # seconds


def launch(rank: int, world_size: int, device: torch.device, timeout: float) -> Watchdog:
    """Join the other processes: a default process group (NCCL on GPUs, else gloo) and the watchdog that guards it.

    Process 0 prints the table of processes. Raises EngineError where they do not come together. One process alone: no
    group, nothing printed.
    """
    if world_size == 1:
        return Watchdog(rank, [], timeout)
    store = open_store(serve=keeps_store(rank), timeout=DEADLINE)
    places = check_in(store, rank, world_size, device)
    if rank == 0:
        print("\n".join(table(places)), flush=True)
    connect = functools.partial(open_store, serve=False, timeout=DEADLINE)
    watchdog = Watchdog(rank, places, timeout, store=store, connect=connect)
    watchdog.start()
    all_reduce_check(watchdog, device)
    return watchdog


def check_in(store: Store, rank: int, world_size: int, device: torch.device, deadline: float = DEADLINE) -> list[Place]:
    """Every process's place, in rank order, once all have told theirs.

    Needs no collective. Raises EngineError that names those who have not within `deadline` seconds.
    """
    place = Place(rank, socket.gethostname(), os.getpid(), device_name(device))
    store.set(f"beat/{rank}", "0 0 start")  # the watchdogs' first, so that none waits for another to start
    store.set(f"place/{rank}", json.dumps([place.host, place.pid, place.device]))
    keys = [f"place/{other}" for other in range(world_size)]
    absent = _wait_for(store, keys, deadline)
    if absent:
        ranks = listed([key.removeprefix("place/") for key in absent])
        raise EngineError(
            f"after {deadline:.0f} s only {world_size - len(absent)} of {world_size} processes are here; silent: "
            f"process {ranks}. See whether they were started, reach {keeper()}, and what they say themselves"
        )
    return [Place(other, *json.loads(text)) for other, text in enumerate(store.multi_get(keys))]


def table(places: Sequence[Place]) -> list[str]:
    """Rank, host, pid and device of every process, in aligned columns."""
    rows = [("rank", "host", "pid", "device")]
    rows += [(str(place.rank), place.host, str(place.pid), place.device) for place in places]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    hosts = len({place.host for place in places})
    lines = [
        f"{rank:>{widths[0]}}  {host:<{widths[1]}}  {pid:>{widths[2]}}  {device}" for rank, host, pid, device in rows
    ]
    return [f"{len(places)} processes on {hosts} host{'s' if hosts > 1 else ''}", *lines]


def all_reduce_check(watchdog: Watchdog, device: torch.device, deadline: float = DEADLINE) -> None:
    """Create the default process group and add up one number of every process with it.

    Raises EngineError where that fails. Where it hangs, the watchdog ends the process after `deadline` seconds with a
    line that names those who did not arrive: a hung collective cannot be left in any other way.
    """
    rank, count = watchdog.rank, len(watchdog.places)
    assert watchdog.store is not None
    with watchdog.limited("the first all-reduce", deadline):
        try:
            dist.init_process_group(
                backend_of(device),
                store=part_of(watchdog.store, "group"),
                rank=rank,
                world_size=count,
                timeout=timedelta(seconds=watchdog.timeout + MARGIN),
            )
            total = torch.tensor(float(rank + 1), device=device)
            dist.all_reduce(total)
            found = total.item()
        except RuntimeError as error:
            raise EngineError(
                f"the first all-reduce failed: {str(error).splitlines()[0]}. See that the hosts reach each other; "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface to use"
            ) from error
    if found != count * (count + 1) / 2:
        raise EngineError(f"the first all-reduce of {count} processes gave {found}, not {count * (count + 1) / 2}")


def check_same(watchdog: Watchdog, about: str, facts: Mapping[str, str]) -> None:
    """Raise EngineError, in every process, where the processes' `facts` differ: which fact, and who has which value.

    `about` names this exchange, once in a run. No process may come later than the watchdog's `timeout` in seconds.
    """
    store, rank = watchdog.store, watchdog.rank
    if store is None:
        return
    store.set(f"{about}/{rank}", json.dumps(dict(facts)))
    if rank == 0:
        keys = [f"{about}/{place.rank}" for place in watchdog.places]
        absent = _wait_for(store, keys, watchdog.timeout)
        if absent:
            late = [place for place in watchdog.places if f"{about}/{place.rank}" in absent]
            outcome = f"{listed(late)} did not tell {about} within {watchdog.timeout:.0f} s"
        else:
            outcome = difference(watchdog.places, [json.loads(text) for text in store.multi_get(keys)])
        store.set(f"{about}/outcome", outcome or "same")
    absent = _wait_for(store, [f"{about}/outcome"], watchdog.timeout + MARGIN)
    outcome = f"process 0 did not compare {about}" if absent else store.get(f"{about}/outcome").decode()
    if outcome != "same":
        raise EngineError(outcome)


def difference(places: Sequence[Place], facts: Sequence[Mapping[str, str]]) -> str:
    """One line on the first three facts in which the processes differ; empty where there are none."""
    names = list(dict.fromkeys(name for own in facts for name in own))
    differing = [name for name in names if len({own.get(name) for own in facts}) > 1]
    if not differing:
        return ""
    parts = [_who_has_what(name, places, [own.get(name, "none") for own in facts]) for name in differing[:3]]
    more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
    return (
        f"the processes were not started alike: {'; '.join(parts)}{more}. "
        "Start all of them with the same command, config and files"
    )


def _who_has_what(name: str, places: Sequence[Place], values: Sequence[str]) -> str:
    """The most frequent value is the others'; every other one is told with its processes."""
    usual = Counter(values).most_common(1)[0][0]
    parts = []
    for value in dict.fromkeys(value for value in values if value != usual):
        holders = [f"{p.rank} on host {p.host}" for p, own in zip(places, values, strict=True) if own == value]
        parts.append(f"{value} in process {listed(holders)}")
    return f"{name} is {', '.join(parts)}, and {usual} in the others"


def config_facts(config: Config) -> dict[str, str]:
    """Every setting by its name, so that a difference can be named."""
    sections = config_dict(config)
    return {f"{name}.{key}": json.dumps(value) for name, keys in sections.items() for key, value in keys.items()}


@torch.no_grad()
def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and bits, summed where the weights lie, so that a large model costs no copy."""
    sums = [_bit_sums(tensor) for tensor in state.values()]
    words = torch.stack([total.cpu() for total in sums]) if sums else torch.zeros(0)
    digest = hashlib.blake2b(words.numpy().tobytes(), digest_size=8)
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    return digest.hexdigest()


def _bit_sums(tensor: Tensor) -> Tensor:
    """int64 [2]: sum of the bit patterns, and the same weighted by position, which tells swapped values apart."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()]).long()
    positions = torch.arange(1, bits.numel() + 1, device=bits.device) % 65521
    return torch.stack([bits.sum(), (bits * positions).sum()])


def _wait_for(store: Store, keys: Sequence[str], seconds: float) -> list[str]:
    """Wait until all keys are there; those that are not after `seconds`. Raises EngineError where the store is gone."""
    end = time.monotonic() + seconds
    try:
        while not store.check(list(keys)):
            if time.monotonic() > end:
                return [key for key in keys if not store.check([key])]
            time.sleep(POLL)
    except RuntimeError:
        raise EngineError(f"{keeper()} has ended, see what it says") from None
    return []
