"""Drop the clips of a manifest of any length that are near to a better one, by their embeddings.

    python -m data_tools.deduplicate INPUT --embeddings EMBEDDINGS.parquet --out DIR [--cosine .95]

INPUT is a manifest. EMBEDDINGS holds `id` and `embedding`, lists of numbers of one length, for clips of INPUT and maybe
others: `score --embed` and `score --clip` write it as embeddings.parquet. Of two clips whose embeddings have at least
that cosine, the larger stays, then the longer, then the first. More than 20,000 clips are compared within clusters
(SemDeDup), all of what a cluster holds; without faiss (`pip install faiss-cpu`) all are compared with each other.

DIR receives `manifest.parquet`, `deduplicate.json` with the counts, and `rejects.parquet`: each dropped clip with
`duplicate_of`, the best clip that is near to it, their `cosine`, and `kept`, the clip that stays for both. Clips
without an embedding stay, and are counted. Memory holds a few numbers a clip; the embeddings lie in a file of DIR
meanwhile.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.options import argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError, run_command

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.data.tables import Table

SIZES = ("height", "width", "num_frames")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    input: str = argument(INPUT_HELP, type=expanduser)
    embeddings: str = option(
        "Parquet table with the columns id and embedding, such as score's embeddings.parquet",
        type=expanduser,
        metavar="FILE",
    )
    out: str = option("folder for manifest.parquet and what was dropped", type=expanduser, metavar="DIR")
    cosine: float = option(
        "embeddings that are at least so near are of near-duplicates (%(default)s)", 0.95, metavar="X"
    )


build_parser = partial(parser_of, Arguments, "data_tools.deduplicate", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("deduplicate", args)(lambda: deduplicate(args)))


def check(args: Arguments) -> None:
    """Raise DataError for options that cannot work, before any input is looked at."""
    if not 0 < args.cosine <= 1:
        raise DataError(f"--cosine {args.cosine}: expected more than 0 and at most 1")


@dataclass(frozen=True)
class Drops:
    """What stays for what, by the manifest's rows: `duplicate_of` and `kept` are rows, -1 for those that stay."""

    duplicate_of: np.ndarray  # int64 [rows]
    kept: np.ndarray  # int64 [rows]
    cosine: np.ndarray  # float32 [rows]


def deduplicate(args: Arguments) -> int:
    """Write the kept rows, the rejects and the report; returns the exit status."""
    from opensora_repro.data.tables import open_table
    from opensora_repro.files import write_text
    from opensora_repro.process import limit_threads

    check(args)
    limit_threads()
    out = Path(args.out)
    table = open_table(manifest_of(args.input, out, Runner()))
    ids, ranks = read_ranks(table)
    drops, counts = find_drops(Path(args.embeddings), ids, ranks, args.cosine, out)
    write_rows_of(table, ids, drops, out)
    write_text(out / "deduplicate.json", json.dumps({**counts, "cosine": args.cosine}, indent=2) + "\n")
    if counts["without_embedding"]:
        print(f"{counts['without_embedding']:,} clips have no embedding: they stay, uncompared")
    dropped, groups = counts["dropped"], counts["groups"]
    print(f"{counts['pairs']:,} pairs of near-duplicates: {dropped:,} clips drop for {groups:,} that stay", end="")
    print(f", up to {counts['largest']:,} for one; {counts['rows'] - dropped:,} of {counts['rows']:,} rows kept: {out}")
    return 0


def read_ranks(table: Table) -> tuple[Any, np.ndarray]:
    """Return the ids, a pyarrow array, and each row's place among all, the best being 0."""
    import numpy as np
    import pyarrow as pa

    if missing := [name for name in ("id", *SIZES) if name not in table.schema.names]:
        raise DataError(f"{table.path}: column {missing[0]} missing; expected id, {', '.join(SIZES)}")
    batches = [batch.select(["id", *SIZES]) for batch in table.batches(["id", *SIZES])]
    whole = pa.Table.from_batches(batches).combine_chunks()
    height, width, frames = (whole[name].to_numpy().astype(np.float64) for name in SIZES)
    ranks = np.empty(len(whole), dtype=np.int64)
    ranks[np.lexsort((-frames, -height * width))] = np.arange(len(whole))
    return whole["id"].cast(pa.string()).combine_chunks(), ranks


def find_drops(path: Path, ids: Any, ranks: np.ndarray, cosine: float, out: Path) -> tuple[Drops, dict[str, Any]]:
    """Compare the embeddings, which are gathered in a file of `out` that goes with this process. Raises DataError."""
    import numpy as np

    from opensora_repro.data.embeddings import gather_embeddings
    from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates, num_cells
    from opensora_repro.data.tables import num_rows

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        with progress("reading embeddings", num_rows(path) if path.is_file() else None, "row") as advance:
            vectors, whose = gather_embeddings(path, ids, file, advance)
        if not len(whose):
            raise DataError(f"{path}: holds no embedding of the manifest's clips")
        print(cells_note(len(whose)), flush=True)
        order = np.argsort(ranks[whose])
        with progress("comparing", len(whose), "clip") as advance:
            found = find_near_duplicates(vectors, order, cosine=cosine, advance=advance)
    rows, kept = whose[order], found.kept()  # rows of the manifest, best first
    worse = np.flatnonzero(found.better >= 0)
    drops = Drops(*(np.full(len(ids), -1, dtype=np.int64) for _ in range(2)), np.zeros(len(ids), dtype=np.float32))
    drops.duplicate_of[rows[worse]], drops.kept[rows[worse]] = rows[found.better[worse]], rows[kept[worse]]
    drops.cosine[rows[worse]] = found.cosine[worse]
    _, sizes = np.unique(kept[worse], return_counts=True)
    return drops, {
        "rows": len(ids), "compared": len(whose), "without_embedding": len(ids) - len(whose),
        "clusters": num_cells(len(whose)), "pairs": found.num_pairs, "dropped": len(worse), "groups": len(sizes),
        "largest": int(sizes.max(initial=0)),
    }  # fmt: skip


def write_rows_of(table: Table, ids: Any, drops: Drops, out: Path) -> None:
    """Read the rows once, write each to the manifest or to the rejects."""
    import pyarrow as pa

    from opensora_repro.data.manifest import Rebase
    from opensora_repro.data.tables import table_writer

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
            near, kept = (ids.take(pa.array(which[rows][bad])) for which in (drops.duplicate_of, drops.kept))
            cosines = drops.cosine[rows][bad]
            why = [f"near-duplicate of {a} (cosine {c:.3f})" for a, c in zip(near.to_pylist(), cosines, strict=True)]
            columns += [pa.repeat(pa.scalar("deduplicate"), len(why)), pa.array(why, pa.string()), near, kept]
            refuse(pa.RecordBatch.from_arrays([*columns, pa.array(cosines)], schema=schema))
            advance(batch.num_rows)


if __name__ == "__main__":
    sys.exit(main())
