"""What every benchmark shares: interleaved timing, a description of the machine, JSON out."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "av", "opencv-python", "diffusers", "transformers", "triton", "colossalai")


def interleaved(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    seconds: float,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call by `clock`, a call of each side in turn, so that a machine that slows down slows both.

    Ends after `rounds` rounds, or earlier once `seconds` have passed (but never before three rounds).
    """
    clocked = {name: timed(call, clock) for name, call in sides.items()}
    return taking_turns(clocked, rounds=rounds, seconds=seconds, warmup=warmup)


def taking_turns(
    sides: Mapping[str, Callable[[], float]], *, rounds: int, seconds: float, warmup: int = 2
) -> dict[str, list[float]]:
    """As `interleaved`, of calls that say themselves how many seconds they took, such as those in other processes."""
    for _ in range(warmup):
        for call in sides.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        for name, call in sides.items():
            times[name].append(call())
    return times


def timed(call: Callable[[], object], clock: Callable[[], float]) -> Callable[[], float]:
    """The call, returning its seconds."""

    def work() -> float:
        start = clock()
        call()
        return clock() - start

    return work


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """Median and spread in milliseconds."""
    ordered = sorted(1000 * value for value in times)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "min_ms": round(ordered[0], 3),
        "max_ms": round(ordered[-1], 3),
        "rounds": len(ordered),
    }


def side_by_side(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Both sides and how many times as fast ours is: the median over rounds of other / ours."""
    ratios = [b / a for a, b in zip(ours, other, strict=True)]
    return {"ours": summary(ours), "other": summary(other), "ratio": round(statistics.median(ratios), 3)}


def environment() -> dict[str, Any]:
    """Hardware and versions, as far as this machine tells."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(name: str, result: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write the result beside the others, or to `out`; a half-written file is never seen."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text with aligned columns; the first is left-aligned."""
    cells = [list(map(str, columns)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
