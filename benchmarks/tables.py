"""How fast the tools go through a long manifest, and in how much memory.

    python -m benchmarks.tables [--rows N] [--out FILE]

A manifest of N rows (10 million) is made in a temporary folder, and each tool reads it in a process of its own, whose
largest resident memory is what the system says at its end. The manifest and what came of it are deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, save

MEMORY_LIMIT_MB = 2000
GROUP_ROWS = 1 << 18
FILTER = (
    "--keep", "motion > 0.5 and duration >= 2 and not duplicate and (contains(lower(caption), 'dog') or width >= 640)",
    "--percentile", "sharpness >= 10%",
    "--percentile", "brightness <= 95%",
)  # fmt: skip

# Run in a process of its own; the last line is its largest resident memory in MB.
INSIDE = """
import importlib, sys
from benchmarks.resources import peak_memory
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
    with tempfile.TemporaryDirectory() as name:
        manifest = Path(name) / "score" / "manifest.parquet"
        manifest.parent.mkdir()
        make_manifest(manifest, args.rows)
        size = round(manifest.stat().st_size / 1e6)
        out = Path(name) / "filter"
        tools = {"filter": measure("data_tools.filter", [str(manifest), "--out", str(out), *FILTER], args.rows)}
        tools["filter"]["report"] = json.loads((out / "filter.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        tools |= measure_convert(Path(name), manifest, args.rows)
    result = {
        "benchmark": "tables",
        "environment": where,
        "rows": args.rows,
        "manifest_mb": size,
        "memory_limit_mb": MEMORY_LIMIT_MB,
        "within_memory": {name: tool["peak_rss_mb"] < MEMORY_LIMIT_MB for name, tool in tools.items()},
        "tools": tools,
    }
    path = save("tables", result, args.out)
    print(json.dumps({"rows": args.rows, "manifest_mb": size, "tools": tools}, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
