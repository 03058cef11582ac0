"""How many planted near-duplicates `data_tools.deduplicate` finds among a million embeddings, in what time and memory.

    python -m benchmarks.duplicates [--rows N] [--exact-rows N] [--out FILE]

Embeddings of 384 numbers are made in two ways: around 5,000 topics of very different size, as a model's are, and
without any order, which is the hardest for clusters. Among them pairs are planted whose cosines lie just over the
threshold of .95, or just below; all others are further apart. The tool reads them, with a manifest, in a process of
its own, of as many threads as it may use CPUs: wall and CPU seconds, largest resident memory, and of each cosine the
share of pairs of which one is dropped for the other. At a smaller size every pair is compared as well: the same rows
must drop. What was made is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import environment, save, table
from benchmarks.tables import INSIDE, make_manifest
from opensora_repro.data.tables import BATCH_ROWS

SIZE, TOPICS, PAIRS = 384, 5000, 1000  # numbers of an embedding, topics, pairs of each cosine
COSINES = (0.94, 0.952, 0.96, 0.97, 0.98, 0.99)  # the first is no duplicate
ORDERS = ("topics", "none")
LIMIT_SECONDS, LIMIT_RECALL = 900, 0.98  # on two cores


def make_embeddings(path: Path, ids: Any, order: str) -> tuple[np.ndarray, np.ndarray]:
    """Write a row for each of `ids`; return the rows [C, PAIRS] and their partners of the pairs of each cosine."""
    import pyarrow as pa

    from opensora_repro.data.tables import table_writer

    random = np.random.default_rng(0)
    chosen = random.permutation(len(ids))[: 2 * PAIRS * len(COSINES)].reshape(2, len(COSINES), PAIRS)
    partner = np.full(len(ids), -1)
    partner[chosen[1].ravel()] = chosen[0].ravel()
    cosine = np.zeros(len(ids), dtype=np.float32)
    cosine[chosen[1]] = np.array(COSINES, dtype=np.float32)[:, None]
    centres = random.standard_normal((TOPICS, SIZE), dtype=np.float32)
    cone = random.standard_normal(SIZE, dtype=np.float32) / 2
    kind = pa.list_(pa.float16(), SIZE)

    def vectors(rows: np.ndarray) -> np.ndarray:
        """Of a row's number alone, so that a pair's rows need not be made together."""
        made = np.empty((len(rows), SIZE), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            draw = np.random.Generator(np.random.SFC64(row))
            made[place] = draw.standard_normal(SIZE, dtype=np.float32)
            if order == "topics":
                made[place] = 0.7 * made[place] + centres[int(draw.pareto(0.5)) % TOPICS]
        made += cone
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    with table_writer(path, pa.schema([("id", pa.string()), ("embedding", kind)])) as write:
        for start in range(0, len(ids), BATCH_ROWS):
            rows = np.arange(start, min(start + BATCH_ROWS, len(ids)))
            made, twins = vectors(rows), np.flatnonzero(partner[rows] >= 0)
            if len(twins):
                originals, c = vectors(partner[rows[twins]]), cosine[rows[twins], None]
                away = random.standard_normal(originals.shape, dtype=np.float32)
                away -= (away * originals).sum(axis=1, keepdims=True) * originals
                made[twins] = c * originals + np.sqrt(1 - c**2) * away / np.linalg.norm(away, axis=1, keepdims=True)
            lists = pa.FixedSizeListArray.from_arrays(pa.array(made.astype(np.float16).ravel()), SIZE)
            write(pa.RecordBatch.from_arrays([ids.slice(start, len(rows)), lists], schema=pa.schema(
                [("id", pa.string()), ("embedding", kind)])))  # fmt: skip
    return chosen[0], chosen[1]


def measure(folder: Path, rows: int, order: str, exact: bool) -> dict[str, Any]:
    """Make a manifest and its embeddings, run the tool, and look up the planted pairs among what it dropped."""
    import pyarrow.parquet as pq

    from opensora_repro.data.tables import num_rows

    manifest, embeddings, out = folder / "in" / "manifest.parquet", folder / "embeddings.parquet", folder / "out"
    manifest.parent.mkdir(parents=True)
    make_manifest(manifest, rows)
    ids = pq.read_table(manifest, columns=["id"])["id"].combine_chunks()
    first, second = make_embeddings(embeddings, ids, order)
    command = [sys.executable, "-c", INSIDE, "data_tools.deduplicate", str(manifest), "--embeddings", str(embeddings)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"error: data_tools.deduplicate failed: {done.stderr.strip()[-500:]}")
    dropped = dict.fromkeys(zip(*(pq.read_table(out / "rejects.parquet")[name].to_pylist() for name in
                                  ("id", "duplicate_of")), strict=True))  # fmt: skip
    names = np.array(ids.to_pylist(), dtype=object)
    found = [
        float(np.mean([pair in dropped or pair[::-1] in dropped for pair in zip(names[a], names[b], strict=True)]))
        for a, b in zip(first, second, strict=True)
    ]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = {
        "rows": rows, "embeddings": order, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "peak_rss_mb": round(float(done.stdout.split()[-1])), "embeddings_mb": round(embeddings.stat().st_size / 1e6),
        "recall": dict(zip(map(str, COSINES[1:]), found[1:], strict=True)), "below_threshold": found[0],
        "counts": json.loads((out / "deduplicate.json").read_text(encoding="utf-8")),
    }  # fmt: skip
    assert num_rows(out / "manifest.parquet") + result["counts"]["dropped"] == rows
    if exact:
        result["exact"] = against_every_pair(embeddings, ids)
    return result


def against_every_pair(embeddings: Path, ids: Any) -> dict[str, Any]:
    """Search the same embeddings within clusters and among all pairs: rows that drop in either, and CPU seconds."""
    from opensora_repro.data.embeddings import gather_embeddings
    from opensora_repro.data.near_duplicates import find_near_duplicates

    with tempfile.TemporaryFile() as file:
        vectors, whose = gather_embeddings(embeddings, ids, file, lambda rows: None)
        order, sides = np.argsort(whose), {}
        for name, cells in (("clusters", None), ("every_pair", 1)):
            began = time.process_time()
            found = find_near_duplicates(vectors, order, cells=cells)
            sides[name] = set(np.flatnonzero(found.better >= 0).tolist()), round(time.process_time() - began, 1)
    (ours, fast), (all_of_them, slow) = sides["clusters"], sides["every_pair"]
    return {
        "dropped": len(all_of_them), "found": len(ours & all_of_them), "too_many": len(ours - all_of_them),
        "clusters_cpu_seconds": fast, "every_pair_cpu_seconds": slow,
    }  # fmt: skip


def main() -> None:
    from opensora_repro.process import available_cpus, limit_threads

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, metavar="N", help="embeddings (default: %(default)s)")
    parser.add_argument(
        "--exact-rows", type=int, default=40_000, metavar="N", help="so many with every pair, too (%(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/duplicates.json)")
    args = parser.parse_args()

    limit_threads()
    where, runs = environment(), []
    for rows, exact in ((args.exact_rows, True), (args.rows, False)):
        for order in ORDERS:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measure(Path(folder), rows, order, exact))
            print(json.dumps(runs[-1]), flush=True)
    result = {
        "benchmark": "duplicates", "environment": where, "size": SIZE, "cpus": available_cpus(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as many as CPUs"),
        "limits": {"seconds": LIMIT_SECONDS, "recall": LIMIT_RECALL}, "runs": runs,
    }  # fmt: skip
    lines = [
        (f"{run['rows']:,}, order: {run['embeddings']}", run["seconds"], run["cpu_seconds"], run["peak_rss_mb"],
         min(run["recall"].values()), run["below_threshold"]) for run in runs
    ]  # fmt: skip
    print(table("Near-duplicates", ("embeddings", "s", "CPU s", "MB", "least recall", "below"), lines))
    print(f"written to {save('duplicates', result, args.out)}")


if __name__ == "__main__":
    main()
