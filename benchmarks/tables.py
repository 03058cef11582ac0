"""How fast the tools go through a long manifest, and in how much memory.

    python -m benchmarks.tables [--rows N] [--out FILE]

A manifest of N rows (10 million) is made in a temporary folder, and each tool reads it in a process of its own, whose
largest resident memory is what the system says at its end. So do `read_manifest`, training's dataset with a loader
process, whose private memory is told, and the schedule of its steps in buckets. What was made is deleted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save

MEMORY_LIMIT_MB = 2000  # of a tool, which holds no table
READ_LIMIT_MB, READ_LIMIT_CPU_S = 3000, 20.0  # of 10 million rows, which training holds
SCHEDULE_LIMIT_MB, SCHEDULE_LIMIT_CPU_S = 400, 10.0  # besides them
GROUP_ROWS = 1 << 18
FILTER = (
    "--keep", "motion > 0.5 and duration >= 2 and not duplicate and (contains(lower(caption), 'dog') or width >= 640)",
    "--percentile", "sharpness >= 10%",
    "--percentile", "brightness <= 95%",
)  # fmt: skip

# Run in a process of its own; the last line is its largest resident memory in MB.
INSIDE = """
import importlib, sys
from opensora_repro.process import peak_memory
code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
print(peak_memory() / 2**20)
sys.exit(code)
"""


def make_manifest(path: Path, rows: int) -> None:
    """Write a manifest as `split`, `score` and `caption` leave it, with random scores; a fraction is missing."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = [f"a {thing} {does} {where}" for thing in ("dog", "red car", "woman") for does in ("runs", "turns")
             for where in ("along the beach at sunset", "through a crowded street", "past a window")]  # fmt: skip
    writer = None
    for start in range(0, rows, GROUP_ROWS):
        size = min(GROUP_ROWS, rows - start)
        random = np.random.default_rng(start)
        names = pa.array(
            [f"{number * 0x9E3779B97F4A7C15 % (1 << 64):016x}-000000" for number in range(start, start + size)]
        )
        scores = {
            name: pa.array(random.gamma(2, 1, size).astype(np.float32), mask=random.random(size) < 0.01)
            for name in ("motion", "sharpness", "brightness")
        }
        table = pa.table(
            {
                "id": names,
                "path": pa.compute.binary_join_element_wise("../split/clips/", names, ".mp4", ""),
                "caption": pa.array(words).take(pa.array(random.integers(0, len(words), size))),
                "num_frames": random.integers(8, 300, size),
                "fps": random.choice([24.0, 25.0, 30.0], size),
                "height": np.full(size, 360),
                "width": random.choice([480, 640], size),
                **scores,
                "duplicate": random.random(size) < 0.05,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    if writer:
        writer.close()


def measure(module: str, arguments: list[str], rows: int) -> dict[str, Any]:
    """Run a tool over the manifest; rows a second of the whole process, and its largest resident memory."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", INSIDE, module, *arguments], capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"error: {module} failed: {done.stderr.strip()[-500:]}")
    peak = float(done.stdout.split()[-1])
    if f"{rows:,} rows, 0 rejected" not in done.stdout and f"of {rows:,} rows kept" not in done.stdout:
        raise SystemExit(f"error: {module} lost rows: {done.stdout.strip()[-500:]}")
    return {"seconds": round(seconds, 1), "rows_per_s": round(rows / seconds), "peak_rss_mb": round(peak)}


def measure_training(name: str, manifest: Path) -> dict[str, Any]:
    """Run `read_manifest`, `dataset` or `schedule` below in a process of its own."""
    code = "import sys; from benchmarks import tables; tables.told(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, name, str(manifest)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {name} failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def told(name: str, path: str) -> None:
    """Read a manifest, for "dataset" also make one with a loader process, for "schedule" the steps of an epoch.

    Prints CPU seconds and memory as JSON.
    """
    from opensora_repro.data.manifest import read_manifest
    from opensora_repro.process import peak_memory

    before = time.process_time()
    table = read_manifest(path)
    found = {"cpu_s": round(time.process_time() - before, 1)}
    if name == "schedule":
        found |= schedule_costs(table)
    if name == "dataset":
        found["loader_private_mb"] = round(loader_memory(table) / 1e6)
        found["cpu_s"] = round(time.process_time() - before, 1)
    print(json.dumps({**found, "peak_rss_mb": round(peak_memory() / 2**20)}))


def schedule_costs(table: Any) -> dict[str, float]:
    """CPU seconds and memory of two epochs' steps in buckets, and CPU seconds to resume in the twenty-first."""
    from opensora_repro.config import BucketConfig, Config, DataConfig
    from opensora_repro.data.buckets import assigned, buckets_of
    from opensora_repro.data.sampler import Schedule
    from opensora_repro.process import peak_memory

    ratios = ("16:9", "4:3", "1:1")
    entries = [(64, "360p", 0.5), (16, "360p", 1.0), (32, "240p", 0.5), (8, "144p", 1.0)]
    buckets = tuple(BucketConfig(frames, name, ratios, 64, keep) for frames, name, keep in entries)
    cfg = Config(data=DataConfig(frame_interval=1, buckets=buckets))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak begins anew
    held, before = peak_memory(), time.process_time()
    assignment, sizes = assigned(table, cfg), [bucket.batch_size for bucket in buckets_of(cfg)]
    schedule = Schedule(assignment, sizes, 0)
    schedule.step(0)
    first, before = time.process_time() - before, time.process_time()
    for step in range(schedule.steps_before(1), schedule.steps_before(1) + 1000):
        schedule.step(step)
    second, memory = time.process_time() - before, peak_memory() - held
    before = time.process_time()
    Schedule(assignment, sizes, 0).step(20 * schedule.steps_before(1) + 7)
    resumed = time.process_time() - before
    times = {"first_epoch_cpu_s": first, "next_epoch_cpu_s": second, "resumed_cpu_s": resumed}
    return {**{name: round(value, 1) for name, value in times.items()}, "schedule_mb": round(memory / 1e6)}


def loader_memory(table: Any, samples: int = 20_000) -> int:
    """Private bytes of training's loader process after so many rows, drawn from all; no video is opened."""
    from benchmarks.resources import private_memory
    from opensora_repro.config import DataConfig
    from opensora_repro.data.dataset import ClipDataset, build_loader
    from opensora_repro.data.sampler import BatchSampler, Schedule, everything

    dataset = ClipDataset(table, DataConfig(num_frames=1 << 30), seed=0)  # more frames than any clip has
    batches = samples // 1000
    sampler = BatchSampler(Schedule(everything(len(dataset)), [1000], 0), [dataset.shape])
    loader = build_loader(dataset, sampler, 0, batches + 1, 1)
    others = multiprocessing.active_children()
    read = iter(loader)
    for _ in range(batches):
        next(read)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    assert worker.pid is not None
    return private_memory(worker.pid)


def measure_convert(folder: Path, manifest: Path, rows: int) -> dict[str, Any]:
    """Convert the manifest to each format of text and back."""
    tools: dict[str, Any] = {}
    steps = {
        "to csv": (manifest, ["--to", "csv"]),
        "from csv": (folder / "to csv" / "manifest.csv", []),
        "to opensora": (manifest, ["--to", "opensora"]),
        "from opensora": (folder / "to opensora" / "opensora.csv", ["--no-probe"]),
    }
    for step, (given, options) in steps.items():
        out = folder / step
        result = measure("data_tools.convert", [str(given), "--out", str(out), *options], rows)
        result["mb"] = {path.name: round(path.stat().st_size / 1e6) for path in (given, *out.glob("[mo]*.*"))}
        tools[f"convert {step}"] = result
        if step.startswith("from"):
            shutil.rmtree(out)
            shutil.rmtree(given.parent)
    return tools


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, metavar="N", help="length (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/tables.json)")
    args = parser.parse_args()

    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "score" / "manifest.parquet"
        manifest.parent.mkdir()
        make_manifest(manifest, args.rows)
        size = round(manifest.stat().st_size / 1e6)
        out = Path(folder) / "filter"
        tools = {"filter": measure("data_tools.filter", [str(manifest), "--out", str(out), *FILTER], args.rows)}
        tools["filter"]["report"] = json.loads((out / "filter.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        for name in ("read_manifest", "dataset", "schedule"):
            tools[name] = measure_training(name, manifest)
        tools |= measure_convert(Path(folder), manifest, args.rows)
    result = {
        "benchmark": "tables",
        "environment": where,
        "rows": args.rows,
        "manifest_mb": size,
        "memory_limit_mb": MEMORY_LIMIT_MB,
        "read_limits": {"peak_rss_mb": READ_LIMIT_MB, "cpu_s": READ_LIMIT_CPU_S},
        "schedule_limits": {"first_epoch_cpu_s": SCHEDULE_LIMIT_CPU_S, "schedule_mb": SCHEDULE_LIMIT_MB},
        "within_memory": {
            name: tool["peak_rss_mb"] < (READ_LIMIT_MB if "cpu_s" in tool else MEMORY_LIMIT_MB)
            for name, tool in tools.items()
        },
        "tools": tools,
    }
    path = save("tables", result, args.out)
    print(json.dumps({"rows": args.rows, "manifest_mb": size, "tools": tools}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
