"""What every dataset tool leaves behind: a manifest of what came out, and a list of what did not."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora_repro.data.manifest import is_missing
from opensora_repro.data.tables import BATCH, in_batches, table_writer
from opensora_repro.files import one_line

Row = dict[str, Any]
MANIFEST = {
    "id": "string", "path": "string", "caption": "string", "num_frames": "int64", "fps": "double",
    "height": "int64", "width": "int64",
}  # fmt: skip
LINEAGE = {
    "source": "string", "start_frame": "int64", "end_frame": "int64", "start_time": "double", "end_time": "double",
}  # fmt: skip
REJECTS = {
    "id": "string", "path": "string", "source": "string", "stage": "string", "reason": "string",
    "start_frame": "int64", "end_frame": "int64",
}  # fmt: skip


def reject(identity: str, source: str, stage: str, reason: str, **more: Any) -> Row:
    """Return a row of rejects.parquet; `more` may be path, start_frame and end_frame."""
    return {"id": identity, "source": source, "stage": stage, "reason": one_line(reason), **more}


def write_outcome(out: Path, rows: Iterable[Row], rejects: Iterable[Row], columns: Mapping[str, str]) -> None:
    """Write OUT/rejects.parquet, then OUT/manifest.parquet: where a manifest is, its work is done.

    Each whole or not at all, and left untouched if equal. `columns` are the manifest's, with pyarrow's names of their
    types; what a row lacks is null, what it has besides is left out. Both are read once and never held whole.
    """
    write_rows(out / "rejects.parquet", rejects, REJECTS)
    write_rows(out / "manifest.parquet", rows, columns)


def write_rows(path: Path, rows: Iterable[Row], columns: Mapping[str, str]) -> int:
    """Write a Parquet file row by row, whole or not at all; an equal file is left untouched. Returns how many."""
    schema, count = schema_of(columns), 0
    with table_writer(path, schema) as write:
        for batch in in_batches(rows):
            count += len(batch)
            write(rows_batch(batch, schema))
    return count


@contextmanager
def rejects_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a function that takes rejects one at a time; the file is there at the end of the block, or is not."""
    waiting: list[Row] = []
    with table_writer(path, schema_of(REJECTS)) as write:

        def refuse(row: Row) -> None:
            waiting.append(row)
            if len(waiting) >= BATCH:
                flush()

        def flush() -> None:
            write(rows_batch(waiting, schema_of(REJECTS)))
            waiting.clear()

        yield refuse
        flush()


def schema_of(columns: Mapping[str, str]) -> Any:
    """Return the pyarrow schema of columns that are given with pyarrow's names of their types."""
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def rows_batch(rows: Sequence[Row], schema: Any) -> Any:
    """Return rows as a pyarrow record batch; what a row lacks is null, what it has besides is left out."""
    import pyarrow as pa

    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        values = [None if isinstance(v, float) and math.isnan(v) else v for v in values]  # pandas' null
        if field.type == pa.string():
            values = [v if v is None or isinstance(v, str) else str(v) for v in values]
        columns.append(pa.array(values, field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def with_types(rows: Iterable[Row], columns: Mapping[str, str]) -> dict[str, str]:
    """Return `columns` and what else the rows hold, typed by its values: a user's own columns are kept."""
    found: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in columns:
                found.setdefault(name, set()).update(() if is_missing(value) else (type(value),))
    numbers: dict[frozenset[type], str] = {frozenset({bool}): "bool", frozenset({int}): "int64"}
    numbers |= {frozenset({float}): "double", frozenset({int, float}): "double"}
    return {**columns, **{name: numbers.get(frozenset(kinds), "string") for name, kinds in found.items()}}


def path_from(out: Path, path: Path) -> str:
    """Return a manifest's way of naming a file: relative to the manifest's folder, with /."""
    return Path(os.path.relpath(path.absolute(), out.absolute())).as_posix()
