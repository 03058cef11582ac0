"""Rows and columns of tables that may be anybody's, read in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from opensora_repro.data.tables import NUMBER, Table, Value, column_of
from opensora_repro.errors import DataError
from opensora_repro.files import one_line


def batches(table: Table, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield a table's record batches; bytes that are no UTF-8 in text become U+FFFD: a table may be anybody's."""
    import pyarrow as pa

    for batch in table.batches(columns):
        for at, column in enumerate(batch.columns):
            try:
                column.validate(full=True)
            except pa.ArrowInvalid:
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    raise DataError(f"{table.path}: column {one_line(batch.schema.names[at])} is damaged") from None
                raw = column.cast(pa.large_binary()).to_pylist()
                texts = [None if value is None else value.decode("utf-8", "replace") for value in raw]
                batch = batch.set_column(at, batch.schema.field(at), pa.array(texts, column.type))
        yield batch


def numeric(name: str, schema: Any) -> Value | None:
    """Return a column of numbers (`duration` follows from others); None where it is something else."""
    try:
        value = column_of(name, schema)
    except DataError:  # no such column, or a type that has no order, such as a list
        return None
    return value if value.kind == NUMBER else None


def rows_at(table: Table, positions: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows at ascending positions, read in one pass."""
    import numpy as np

    rows: list[dict[str, Any]] = []
    wanted, start = np.asarray(positions, dtype=np.int64), 0
    for batch in batches(table, columns):
        here = wanted[(wanted >= start) & (wanted < start + batch.num_rows)] - start
        rows += batch.take(here).to_pylist()
        start += batch.num_rows
    return rows


def spread(total: int, count: int) -> list[int]:
    """Return up to `count` positions of `total`, evenly spread over them and away from the ends."""
    if count >= total:
        return list(range(total))
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]
