"""How many rows a second go through a cluster's plan where a row is no work, in how much memory of the driver.

    python -m benchmarks.rows [--rows N] [--workers N] [--chunk N] [--out FILE]

A table of N rows (a million) is made in a temporary folder. Over a Ray cluster that is started here, with two workers,
each row is given to a function that does nothing; then the same command runs again, with nothing to do; then all
results are read in their order. Each of the first two is a process of its own: seconds, the processor's seconds of it
and of everything it started (which, on a machine that others use, tell more), and its own largest resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save
from benchmarks.resources import others_share, processor_seconds

GROUP_ROWS = 1 << 18
LIMITS = {"rows_per_s": 20_000, "driver_mb": 1500, "again_s": 60}  # of ten million rows on two cores


def nothing(args: dict[str, Any]) -> dict[str, Any]:
    """The row function."""
    return {"n": args["n"]}


def make_table(path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("n", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(start + GROUP_ROWS, rows))
            names = [f"{n * 0x9E3779B97F4A7C15 % (1 << 64):016x}-{n:08d}" for n in numbers]
            writer.write_table(pa.table([names, list(numbers)], schema=schema))


def told(path: str, out: str, workers: str, chunk: str, read: str) -> None:
    """Send the table's rows through the plan; print how many there are, seconds of the steps and memory, as JSON."""
    import pyarrow.parquet as pq

    from opensora_repro.data.jobs.cluster import Place, Resources
    from opensora_repro.data.jobs.course import Job, Keeping
    from opensora_repro.data.jobs.parts import named_hash
    from opensora_repro.data.jobs.records import Records
    from opensora_repro.data.jobs.stream import BATCH, Table, run_streamed
    from opensora_repro.process import peak_memory

    def jobs(batch: Any, places: Sequence[int]) -> Iterable[Job]:
        chosen = batch.take(places)
        names, numbers = chosen["id"].to_pylist(), chosen["n"].to_pylist()
        return (Job(name, name, {"n": number}) for name, number in zip(names, numbers, strict=True))

    table = Table(
        lambda: pq.ParquetFile(path).iter_batches(BATCH),
        lambda batch: b"".join(map(named_hash, batch["id"].to_pylist())),
        jobs,
    )
    began = time.perf_counter()
    with Records(Path(out)) as records:
        results = run_streamed(
            "benchmarks.rows:nothing", table, Keeping(records, "rows"), resources=Resources(rows=int(chunk)),
            place=Place("local", int(workers)), label="rows", unit="row",
        )  # fmt: skip
        found: dict[str, Any] = {"rows": len(results), "seconds": round(time.perf_counter() - began, 1)}
        if read == "read":
            began = time.perf_counter()
            found["in_order"] = all(result["n"] == at for at, result in enumerate(results))
            found["read_s"] = round(time.perf_counter() - began, 1)
    found |= {"driver_cpu_s": round(time.process_time(), 1), "driver_mb": round(peak_memory() / 2**20)}
    print(json.dumps(found), flush=True)


def measure(*arguments: str) -> dict[str, Any]:
    """Run `told` in a process of its own, and add up the processor time of all that it starts."""
    code = "import sys; from benchmarks import rows; rows.told(*sys.argv[1:])"
    before, began, seconds = processor_seconds(), time.perf_counter(), dict[str, float]()
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            seconds |= processor_seconds_below(process.pid)
            time.sleep(0.2)
        text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit("error: the plan failed")
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    found["all_cpu_s"] = round(sum(seconds.values()), 1)
    if before and (after := processor_seconds()):
        found["others"] = others_share(time.perf_counter() - began, before, after)
    return found


def processor_seconds_below(root: int) -> dict[str, float]:
    """Return the processor's seconds that a process and what it started have used, by process. Linux only."""
    parents, used = dict[int, int](), dict[int, tuple[str, float]]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            facts = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(facts[1])
            used[pid] = (f"{pid} {facts[19]}", (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK"))
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return dict(used[pid] for pid in below if pid in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="length (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="actors (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, metavar="N", help="rows a call (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/rows.json)")
    args = parser.parse_args()

    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "rows.parquet", Path(folder) / "out"
        make_table(table, args.rows)
        given = (str(table), str(out), str(args.workers), str(args.chunk))
        first = measure(*given, "")
        again = measure(*given, "read")
        left = [path for path in (out / "parts" / "rows").iterdir() if path.suffix == ".parquet"]
        first["parts"], first["parts_mb"] = len(left), round(sum(path.stat().st_size for path in left) / 1e6)
    if first["rows"] != args.rows or again["rows"] != args.rows or not again["in_order"]:
        raise SystemExit("error: rows were lost")
    for run in (first, again):
        run["rows_per_s"] = round(args.rows / run["seconds"])
        run["rows_per_core_s"] = round(args.rows / run["all_cpu_s"])
    result = {
        "benchmark": "rows", "environment": where, "rows": args.rows, "workers": args.workers, "chunk": args.chunk,
        "limits": LIMITS, "first": first, "again": again,
    }  # fmt: skip
    path = save("rows", result, args.out)
    print(json.dumps({name: result[name] for name in ("rows", "workers", "chunk", "first", "again")}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
