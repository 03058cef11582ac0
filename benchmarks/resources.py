"""Memory, processor time and energy of what is measured."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

SETTLE_SECONDS = 1.0  # a card tells its power as the mean of up to so long
SAMPLE_SECONDS = 0.05


def private_memory(pid: int) -> int:
    """Bytes that a process shares with no other. Linux only."""
    facts = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in facts if line.startswith(("Private_Clean", "Private_Dirty")))


class ProcessorSeconds(NamedTuple):
    """Used so far: by all, what a host of virtual machines gave to others included, and by this program."""

    machine: float
    own: float
    processors: int


def processor_seconds() -> ProcessorSeconds | None:
    """`own` has every process that this one started and has waited for. None where the system is not Linux."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *others = map(int, lines[0].split()[1:9])  # interrupts, then stolen time
    ticks = user + nice + system + sum(others)
    processors = sum(line.startswith("cpu") for line in lines) - 1
    return ProcessorSeconds(ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), processors)


def others_share(seconds: float, before: ProcessorSeconds, after: ProcessorSeconds) -> float:
    """Of the machine, in the `seconds` between: what neither this program nor anything it started has used."""
    used = (after.machine - before.machine) - (after.own - before.own)
    return round(max(0.0, used) / (seconds * after.processors), 2)


def energy(call: Callable[[], object], device: torch.device, seconds: float = 3.0) -> float | None:
    """Joules that the card takes for a call, from its own power readings while calls follow each other for `seconds`.

    `call` returns when its work is done. None where nothing tells the power: a CPU, or no NVML.
    """
    import torch

    if device.type != "cuda":
        return None
    try:
        torch.cuda.power_draw(device)
    except Exception:  # no NVML package, no right to ask, a card without a sensor: each raises its own
        return None
    _repeat(call, SETTLE_SECONDS)
    samples: list[tuple[float, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            samples.append((time.perf_counter(), torch.cuda.power_draw(device) / 1000))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    calls = _repeat(call, seconds)
    elapsed = time.perf_counter() - began
    done.set()
    watcher.join()
    return mean_power(samples) * elapsed / calls if len(samples) > 1 else None


def mean_power(samples: Sequence[tuple[float, float]]) -> float:
    """Watts over the time of samples (seconds, watts), straight lines between them."""
    joules = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(samples))
    return joules / (samples[-1][0] - samples[0][0])


def _repeat(call: Callable[[], object], seconds: float) -> int:
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        call()
        calls += 1
    return calls
