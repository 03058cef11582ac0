"""Every benchmark in turn, each in a process of its own, and one table of what they found.

    python -m benchmarks.suite [--full] [NAME ...]

By default a subset that two CPU cores do in a few minutes, with its JSON in benchmarks/results/quick/; with --full what
benchmarks/results/ holds, which takes an hour and ten million rows. A benchmark that fails does not keep the others
from running; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import RESULTS, table

Line = tuple[str, object, object, object, object]  # what, ours, the other, ratio, share of the limit


def timed(result: dict[str, Any]) -> Iterator[Line]:
    """Of rows as harness.side_by_side makes them: what the row says of itself, medians, how many times as fast."""
    for row in result.get("rows", []):
        name = ", ".join(value for value in row.values() if isinstance(value, str))
        share = row["ours"].get("share_of_limit", row.get("share_of_copy"))
        limit = "" if share is None else f"{100 * share:.0f} %"
        ours, other = (f"{row[side]['median_ms']:.1f} ms" for side in ("ours", "other"))
        yield name, ours, other, f"{row['ratio']:.2f}x", limit
    if "missing" in result:
        yield result["missing"], "", "", "", ""


def counted(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.collectives: bytes."""
    for row in result["rows"]:
        ours, other = (f"{row[side]['bytes'] / 1e6:.2f} MB" for side in ("ours", "everywhere"))
        yield f"{row['phase']}, all-to-all everywhere", ours, other, f"{1 / row['share']:.2f}x less", ""


def tools(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.tables: each tool's rows and memory; of what training holds, CPU seconds."""
    for name, tool in result["tools"].items():
        rate = f"{tool['rows_per_s']:,} rows/s" if "rows_per_s" in tool else f"{tool['cpu_s']} CPU s"
        yield f"{name}, {result['rows']:,} rows", rate, "", f"{tool['peak_rss_mb']} MB", ""


def plans(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.rows: rows and the driver's memory."""
    for what in ("first", "again"):
        run = result[what]
        rate = f"{run['rows_per_core_s']:,} rows/core s"
        yield f"{what}, {result['rows']:,} rows", rate, "", f"{run['driver_mb']} MB", ""


def videos(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.split: CPU seconds over the other's."""
    for video, found in result["videos"].items():
        for name, share in found["ratios"].items():
            yield f"{video}, {name}", "", "", f"{1 / share:.2f}x", ""


def duplicates(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.duplicates: CPU seconds, memory, and the least recall of a cosine."""
    for run in result["runs"]:
        name, recall = f"{run['rows']:,} embeddings, order: {run['embeddings']}", min(run["recall"].values())
        yield name, f"{run['cpu_seconds']:.0f} CPU s", "", f"{run['peak_rss_mb']} MB", f"{100 * recall:.1f} % found"


def footage(result: dict[str, Any]) -> Iterator[Line]:
    """Of benchmarks.curation: minutes of footage a core hour, of decoding alone as the limit."""
    for name, video in result["footage"].items():
        limit = video["others"]["decode"]["footage_minutes_per_core_hour"]
        for side, found in {**video["tools"], "the line": video["line"], **video["others"]}.items():
            if minutes := found.get("footage_minutes_per_core_hour"):
                yield f"{name}, {side}", f"{minutes:,.0f} min a core hour", "", "", f"{100 * minutes / limit:.0f} %"


@dataclass(frozen=True)
class Benchmark:
    """A module of benchmarks/ with `main()` and `--out`; `quick` are its options for the subset, None: not in it."""

    quick: tuple[str, ...] | None
    lines: Callable[[dict[str, Any]], Iterator[Line]] = timed


BENCHMARKS = {
    "train_step": Benchmark(("--quick",)),
    "sample": Benchmark(("--quick",)),
    "attention": Benchmark(("--quick",)),
    "packing": Benchmark(("--quick",)),
    "kernels": Benchmark(()),
    "loader": Benchmark(("--windows", "4")),
    "collectives": Benchmark((), counted),
    "tables": Benchmark(("--rows", "200000"), tools),
    "rows": Benchmark(None, plans),
    "split": Benchmark(None, videos),
    "duplicates": Benchmark(("--rows", "60000", "--exact-rows", "25000"), duplicates),
    "curation": Benchmark(None, footage),
    "load_weights": Benchmark(None),
}


def run(name: str, full: bool) -> tuple[dict[str, Any] | None, float]:
    """What the benchmark wrote, None where it failed or wrote nothing, and its seconds."""
    out = (RESULTS if full else RESULTS / "quick") / f"{name}.json"
    before = out.stat().st_mtime_ns if out.exists() else None
    options = () if full else BENCHMARKS[name].quick or ()
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options, "--out", str(out)])
    seconds = time.perf_counter() - began
    written = out.exists() and out.stat().st_mtime_ns != before
    return (json.loads(out.read_text(encoding="utf-8")) if written and not done.returncode else None), seconds


def run_all(names: Sequence[str], full: bool) -> int:
    began, failed = time.perf_counter(), []
    lines: list[tuple[object, ...]] = []
    for name in names:
        print(f"\n{name}", flush=True)
        result, seconds = run(name, full)
        if result is None:
            failed.append(name)
        else:
            lines += [(f"{name}: {what}", *rest) for what, *rest in BENCHMARKS[name].lines(result)]
        print(f"{name}: {seconds:.0f} s", flush=True)
    columns = ("what, against", "ours", "other", "ratio", "of the limit")
    print("\n" + table(f"All benchmarks, {time.perf_counter() - began:.0f} s", columns, lines))
    if failed:
        print(f"error: without a result: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}")
    parser.add_argument("--full", action="store_true", help="all of them, at full size")
    args = parser.parse_args()
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"no benchmark is called {name!r}: expected {', '.join(BENCHMARKS)}")
    subset = [name for name, benchmark in BENCHMARKS.items() if args.full or benchmark.quick is not None]
    return run_all(args.names or subset, args.full)


if __name__ == "__main__":
    sys.exit(main())
