"""Rows and columns of tables that may be anybody's, read in batches, and rows that a column's value groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.tables import NUMBER, Table, Value, column_of
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

KEPT = 20_000  # values of a column that are told apart


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
    indices, start = np.asarray(positions, dtype=np.int64), 0
    for batch in batches(table, columns):
        here = indices[(indices >= start) & (indices < start + batch.num_rows)] - start
        rows += batch.take(here).to_pylist()
        start += batch.num_rows
    return rows


def spread(total: int, count: int) -> list[int]:
    """Return up to `count` positions of `total`, evenly spread over them and away from the ends."""
    if count >= total:
        return list(range(total))
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


@dataclass
class Group:
    """The rows with one value: how many, and the first of them."""

    value: str
    count: int
    rows: list[dict[str, Any]]


@dataclass
class Groups:
    """All rows that have a value, and the largest groups."""

    rows: int
    different: int  # up to KEPT
    largest: list[Group]


def find_groups(
    table: Table, column: str, columns: list[str], advance: Callable[[int], None], *, count: int, members: int
) -> Groups:
    """Return the `count` largest groups of a column, with up to `members` rows of each; two passes over the table.

    Rows without a value, with empty text or with a false one belong to none. Of the rows `columns` are read.
    """
    found, rows = Counter[str](), 0
    for values in _valued(table, column, [column], advance):
        rows += values.num_rows
        for entry in values.column(column).value_counts().to_pylist():
            if entry["values"] in found or len(found) < KEPT:
                found[entry["values"]] += entry["counts"]
    largest = {v: Group(v, n, []) for v, n in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]}
    for values in _valued(table, column, columns, advance) if largest else ():
        _take(values, column, largest, members)
    return Groups(rows, len(found), list(largest.values()))


def _valued(table: Table, column: str, columns: list[str], advance: Callable[[int], None]) -> Any:
    """Yield batches of the rows that have a value, with the column as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in batches(table, list(dict.fromkeys([column, *columns]))):
        advance(batch.num_rows)
        at = batch.schema.get_field_index(column)
        text = batch.column(at).cast(pa.string())
        batch = batch.set_column(at, column, text)
        yield batch.filter(pc.invert(pc.is_in(text.fill_null(""), pa.array(["", "false"]))))


def _take(batch: Any, column: str, groups: dict[str, Group], members: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    open_groups = [value for value, group in groups.items() if len(group.rows) < members]
    if not open_groups:
        return
    matching = batch.filter(pc.is_in(batch.column(column), pa.array(open_groups, pa.string())))
    for value in open_groups:
        group = groups[value]
        own = matching.filter(pc.equal(matching.column(column), value)).slice(0, members - len(group.rows))
        group.rows += own.to_pylist()
