"""Tables of clips: our manifests, other CSV and Parquet tables with a `path`, and Open-Sora's CSVs without a header."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_repro.data.convert.source import Refuse, Source, refusal
from opensora_repro.data.manifest import LINEAGE, MANIFEST
from opensora_repro.data.tables import Table, open_table, schema_of
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

# Open-Sora 1.0 writes the first three; its successors write all of them, under a header.
OPENSORA_COLUMNS = ("path", "caption", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution")
OPENSORA_WIDTHS = (2, 3, len(OPENSORA_COLUMNS))


def open_clip_table(path: Path) -> Source:
    """Open a table with at least a `path` column; `text` stands in for a missing `caption`. Raises DataError."""
    table = open_table(path)
    if "path" not in table.schema.names:
        raise DataError(f"{path}: column path missing (has {', '.join(map(one_line, table.schema.names))})")
    return _source(table, "text" if "caption" not in table.schema.names else "caption")


def open_opensora_csv(path: Path) -> Source:
    """Open a CSV without a header: path, caption, and what may follow. Raises DataError."""
    width = len(first_record(path))
    if width not in OPENSORA_WIDTHS:
        names = ", ".join(OPENSORA_COLUMNS)
        raise DataError(f"{path}: {width} columns, expected 2, 3 or {len(OPENSORA_COLUMNS)} without a header: {names}")
    return _source(open_table(path, names=OPENSORA_COLUMNS[:width]), "caption")


def first_record(path: Path) -> list[str]:
    """Return the first line's fields, [] for an empty file. Raises DataError for what is no text."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as csv: {one_line(error)}") from error


def _source(table: Table, caption: str) -> Source:
    import pyarrow as pa

    known = {**MANIFEST, **{name: kind for name, kind in LINEAGE.items() if name in table.schema.names}}
    others = [field for field in table.schema if field.name not in (*known, caption)]
    schema = pa.schema([*schema_of(known), *others])

    def batches(refuse: Refuse) -> Iterator[Any]:
        seen = 0
        for batch in table.batches():
            yield _with_paths(_typed(table.path, batch, schema, known, caption), seen, refuse)
            seen += batch.num_rows

    return Source(table.path.absolute().parent, schema, batches, table.num_rows)


def _typed(path: Path, batch: Any, schema: Any, known: dict[str, str], caption: str) -> Any:
    """Return the batch with the columns of `schema`; those it lacks are null. Raises DataError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for field in schema:
        name = caption if field.name == "caption" else field.name
        at = batch.schema.get_field_index(name)
        if at < 0:
            column = pa.nulls(batch.num_rows, field.type)
            columns.append(column.fill_null("") if field.name == "caption" else column)
            continue
        column = batch.column(at)
        try:
            column = column.cast(field.type) if field.name in known else column
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}, expected {field.type}: {one_line(error)}") from error
        if field.name in ("id", "caption"):
            column = pc.utf8_trim_whitespace(column)
        columns.append(pc.fill_null(column, "") if field.name == "caption" else column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _with_paths(batch: Any, before: int, refuse: Refuse) -> Any:
    """Leave out the rows without a path."""
    import pyarrow.compute as pc

    paths = batch.column("path")
    good = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(paths), ""), False)
    if pc.all(good).as_py() is not False:
        return batch
    for at in pc.indices_nonzero(pc.invert(good)).to_pylist():
        refuse(refusal(batch.column("id")[at].as_py() or "", f"row {before + at + 1}: path is empty"))
    return batch.filter(good)
