"""What every benchmark shares: interleaved timing, a description of the machine, JSON out."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.resources import others_share, processor_seconds
from opensora_repro.files import write_text

Call = TypeVar("Call", bound=Callable[[], object])
RESULTS = Path(__file__).resolve().parent / "results"
BUSY = 0.1  # share of the machine from which on others' work shows in wall time
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
    return interleaved_seconds(clocked, rounds=rounds, seconds=seconds, warmup=warmup)


def interleaved_seconds(
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


def with_products(calls: Mapping[str, Call], products: Mapping[str, Call]) -> dict[str, Call]:
    """Both in one round, the products shared out behind the sides, so that each side has some of them beside it."""
    order: dict[str, Call] = {}
    for i, (name, call) in enumerate(calls.items()):
        order[name] = call
        order |= dict(list(products.items())[i :: len(calls)])
    return order


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


def add_options(parser: ArgumentParser, benchmark: str) -> None:
    """What benchmarks of models have in common."""
    add = parser.add_argument
    add("--one-thread", action="store_true", help="on a CPU: CPU seconds of one thread instead of wall time of all")
    add("--out", type=Path, help=f"JSON file (default: benchmarks/results/{benchmark}[_one_thread].json)")


def clock_of(one_thread: bool) -> Callable[[], float]:
    return time.process_time if one_thread else time.perf_counter


class Run:
    """A benchmark of models from its first moment on; sets how many threads torch takes."""

    def __init__(self, benchmark: str, *, one_thread: bool) -> None:
        import torch

        where = environment()
        if one_thread:
            torch.set_num_threads(1)
        clock = "CPU time" if one_thread else "wall time"
        self.header = {"benchmark": benchmark, "environment": where, "threads": torch.get_num_threads(), "clock": clock}
        self._began = time.perf_counter(), processor_seconds()

    def finish(self, found: Mapping[str, Any], report: Callable[[dict[str, Any]], str], out: Path | None) -> None:
        """Save and print the result, with what others used of the machine meanwhile; processes it started have ended.

        Not by the load: that counts our own threads, and the benchmark before this one.
        """
        (began, before), after = self._began, processor_seconds()
        share = others_share(time.perf_counter() - began, before, after) if before and after else None
        result = {**self.header, **found, "others_share": share}
        name = result["benchmark"] + ("_one_thread" if result["clock"] == "CPU time" else "")
        path = save(name, result, out)
        print(report(result))
        if note := busy_note(result):
            print(note)
        print(f"written to {path}")


def busy_note(result: Mapping[str, Any]) -> str:
    """A line where wall times say little because of others, else nothing."""
    share = result["others_share"]
    if result["clock"] != "wall time" or share is None or share < BUSY:
        return ""
    return f"others used {100 * share:.0f} % of the machine meanwhile: see --one-thread"


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
    write_text(path, json.dumps(result, indent=2) + "\n")
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
    from importlib import metadata  # late: the processes that are measured have no need of it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
