"""How much memory this machine gives a process: what it has, or its control group's limit where that is lower."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostMemory:
    """Bytes."""

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
