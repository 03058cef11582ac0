"""Rows that belong together by a column's value, such as near-duplicates: counted, and a few shown as examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.report.rows import batches
from opensora_repro.data.tables import Table

KEPT = 20_000  # different values that are told apart


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
        entries = _counts(values.column(column))
        rows += sum(entries.values())
        for value, number in entries.items():
            if value in found or len(found) < KEPT:
                found[value] += number
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


def _counts(values: Any) -> dict[str, int]:
    import pyarrow.compute as pc

    return {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}


def _take(batch: Any, column: str, groups: dict[str, Group], members: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    open_groups = [value for value, group in groups.items() if len(group.rows) < members]
    if not open_groups:
        return
    wanted = batch.filter(pc.is_in(batch.column(column), pa.array(open_groups, pa.string())))
    for value in open_groups:
        group = groups[value]
        own = wanted.filter(pc.equal(wanted.column(column), value)).slice(0, members - len(group.rows))
        group.rows += own.to_pylist()
