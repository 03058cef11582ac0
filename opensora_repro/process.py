"""What a process may use of its machine: CPUs, memory, what it keeps of freed memory; when it is asked to stop; and
processes of our own commands."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

KEPT_BYTES = 1 << 30  # what the process may hold on to without using it; larger tensors come and go as before
INTERRUPTED_BY_SIGTERM = 143  # exit code
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep up to `KEPT_BYTES` of freed memory for the next tensors; return whether the C library does.

    glibc gives blocks above 32 MB back to the system at once, which then clears every page of the next such block: a
    fifth of a forward pass at 8192 tokens of 384 channels. A user's own settings for malloc stay as they are.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  only glibc knows these numbers
    except (OSError, AttributeError, TypeError):
        return False
    return bool(libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def limit_threads() -> None:
    """No more threads than this process may use CPUs: a container's share is often far below the machine's count."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cpus())))


def available_cpus() -> int:
    """CPUs by affinity and by the control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no control groups, or "max": no quota
        return count


def peak_memory() -> int:
    """This program's largest resident memory so far, in bytes.

    Not getrusage's where it can be helped: that counts the memory of the process that started this one, too.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except OSError:  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Give freed memory back, and let `peak_memory` count from what is left, where the system can do so (Linux)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@dataclass(frozen=True)
class HostMemory:
    """What this machine gives a process, in bytes: what it has, or its control group's limit where that is lower."""

    total: int
    free: int  # of that, now: what nobody uses, and caches of files
    swap: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """`root`: where proc and sys are."""
    facts = _meminfo(root / "proc/meminfo")
    total = facts.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = facts.get("MemAvailable", total)
    for limit, used in _group_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return HostMemory(total, free, facts.get("SwapTotal", 0))


def _meminfo(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return {}
    words = (line.replace(":", " ").split() for line in lines)
    return {name: 1024 * int(value) for name, value, *_ in words if value.isdecimal()}


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of this process's control group and of those around it, where they have a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (root / base / part for part in (inner, *inner.parents)):
            try:
                limit = int((folder / limit_file).read_text())
                used = int((folder / used_file).read_text())
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit, used - int(stats.get(cache, 0))
            except (OSError, ValueError):  # "max": no limit; or a group that is not shown here
                continue


# Signals

STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """SIGTERM and Ctrl-C as a request to stop soon.

    Within its block the first signal sets `received`; a second one ends the process as it would have anyway.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOPPING_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._restore()

    def requested(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def call(command: Sequence[str], is_done: Callable[[], bool]) -> int:
    """Run one of our command lines in a process of its own, which is told when this one is to end; its exit code.

    A stage that is told to stop saves, and calls that well: what ends so and is not done was interrupted.
    """
    print("$ python -m " + shlex.join(command), flush=True)
    told: list[int] = []
    with subprocess.Popen([sys.executable, "-m", *command]) as process:

        def stop(number: int, _: object) -> None:
            told.append(number)
            process.send_signal(number)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which it has got from the terminal, too
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    told_to_stop = told or (code == 0 and not is_done())
    return INTERRUPTED_BY_SIGTERM if told_to_stop else code if code >= 0 else 128 - code
