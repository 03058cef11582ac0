"""Which clips of a manifest drop for which, by their embeddings; rows stream, a few numbers of each are held."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.embeddings import gather_embeddings
from opensora_repro.data.manifest import Rebase, check_ids
from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates, num_cells
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import Table, num_rows, table_writer
from opensora_repro.errors import DataError
from opensora_repro.files import is_file

SIZES = ("height", "width", "num_frames")


@dataclass(frozen=True)
class Drops:
    """What stays for what, by the manifest's rows: `duplicate_of` and `kept` are rows, -1 for those that stay."""

    duplicate_of: np.ndarray  # int64 [rows]
    kept: np.ndarray  # int64 [rows]
    cosine: np.ndarray  # float32 [rows]


def read_ranks(table: Table) -> tuple[Any, np.ndarray]:
    """Return the ids, a pyarrow array, and each row's place among all, the best being 0."""
    import pyarrow as pa

    if missing := [name for name in ("id", *SIZES) if name not in table.schema.names]:
        raise DataError(f"{table.path}: column {missing[0]} missing; expected id, {', '.join(SIZES)}")
    batches = [batch.select(["id", *SIZES]) for batch in table.batches(["id", *SIZES])]
    whole = pa.Table.from_batches(batches).combine_chunks()
    check_ids(table.path, whole["id"])
    height, width, frames = (_numbers(table.path, name, whole[name]) for name in SIZES)
    ranks = np.empty(len(whole), dtype=np.int64)
    ranks[np.lexsort((-frames, -height * width))] = np.arange(len(whole))
    return whole["id"].cast(pa.string()).combine_chunks(), ranks


def _numbers(path: Path, name: str, column: Any) -> np.ndarray:
    """Return float64 [rows], NaN where a number is missing. Raises DataError."""
    import pyarrow as pa

    try:
        return np.asarray(column.cast(pa.float64()).to_numpy())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(f"{path}: column {name} holds {column.type}, expected numbers") from None


def find_drops(path: Path, ids: Any, ranks: np.ndarray, cosine: float, out: Path) -> tuple[Drops, dict[str, Any]]:
    """Compare the embeddings, which are gathered in a file of `out` that goes with this process. Raises DataError."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        with progress("reading embeddings", num_rows(path) if is_file(path) else None, "row") as advance:
            vectors, whose = gather_embeddings(path, ids, file, advance)
        if not len(whose):
            raise DataError(f"{path}: holds no embedding of the manifest's clips that is finite and not zero")
        print(cells_note(len(whose)), flush=True)
        order = np.argsort(ranks[whose])
        with progress("comparing", len(whose), "clip") as advance:
            found = find_near_duplicates(vectors, order, cosine=cosine, advance=advance)
    rows, kept = whose[order], found.kept()  # rows of the manifest, best first
    worse = np.flatnonzero(found.better >= 0)
    none = np.full(len(ids), -1, dtype=np.int64)
    drops = Drops(none, none.copy(), np.zeros(len(ids), dtype=np.float32))
    drops.duplicate_of[rows[worse]], drops.kept[rows[worse]] = rows[found.better[worse]], rows[kept[worse]]
    drops.cosine[rows[worse]] = found.cosine[worse]
    _, sizes = np.unique(kept[worse], return_counts=True)
    return drops, {
        "rows": len(ids), "compared": len(whose), "without_embedding": len(ids) - len(whose),
        "clusters": num_cells(len(whose)), "dropped": len(worse), "groups": len(sizes),
        "largest": int(sizes.max(initial=0)),
    }  # fmt: skip


def write_rows_of(table: Table, ids: Any, drops: Drops, out: Path) -> None:
    """Read the rows once, write each to the manifest or to the rejects."""
    import pyarrow as pa

    rebase = Rebase(table.path.absolute().parent, out.absolute())
    told = [name for name in ("id", "path", "source") if name in table.schema.names]
    texts = [(name, pa.string()) for name in (*told, "stage", "reason", "duplicate_of", "kept")]
    schema, first = pa.schema([*texts, ("cosine", pa.float32())]), 0
    with (
        table_writer(out / "rejects.parquet", schema) as refuse,
        table_writer(out / "manifest.parquet", table.schema) as keep,
        progress("writing", table.num_rows, "row") as advance,
    ):
        for batch in table.batches():
            rows = slice(first, first + batch.num_rows)
            first = rows.stop
            bad = drops.duplicate_of[rows] >= 0
            keep(rebase(batch.filter(pa.array(~bad))))
            dropped = rebase(batch.filter(pa.array(bad)))
            columns = [dropped.column(name).cast(pa.string()) for name in told]
            of, kept = (ids.take(pa.array(which[rows][bad])) for which in (drops.duplicate_of, drops.kept))
            cosines = drops.cosine[rows][bad]
            why = [f"near-duplicate of {a} (cosine {c:.3f})" for a, c in zip(of.to_pylist(), cosines, strict=True)]
            columns += [pa.repeat(pa.scalar("deduplicate"), len(why)), pa.array(why, pa.string()), of, kept]
            refuse(pa.RecordBatch.from_arrays([*columns, pa.array(cosines)], schema=schema))
            advance(batch.num_rows)
