"""A filter as a step of a line: which rows its rules keep, where each row tells that by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from opensora_repro.data.filter.expressions import compile_expression, split_conjunction
from opensora_repro.data.jobs.steps import NeedsAllRows
from opensora_repro.data.tables import Row, Value, rows_batch, schema_of
from opensora_repro.errors import DataError

Columns = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FilterStep:
    """Rules that are true or false of a row with these columns, whatever the others are."""

    name: str
    rules: tuple[str, ...]
    columns: Columns

    def keeps(self, row: Row) -> bool:
        schema, checks = _compiled(self.rules, self.columns)
        batch = rows_batch([row], schema)
        return all(check.array(batch)[0].as_py() for check in checks)


def filter_step(name: str, rules: Iterable[tuple[str, str]], columns: Mapping[str, str]) -> FilterStep:
    """Return the step of a filter's rules, (kind, text) each. Raises NeedsAllRows for one that a row cannot tell.

    How a manifest writes paths depends on its folder, so none may name `path`.
    """
    told = tuple((column, kind) for column, kind in columns.items() if column != "path")
    step = FilterStep(name, tuple(text for _, text in rules), told)
    for kind, text in rules:
        try:
            if kind == "percentile":
                raise DataError(text)
            _compiled((text,), step.columns)
        except DataError:
            raise NeedsAllRows(f"{name} ({' '.join(text.split())})") from None
    return step


@lru_cache(maxsize=64)
def _compiled(rules: tuple[str, ...], columns: Columns) -> tuple[Any, Sequence[Value]]:
    schema = schema_of(dict(columns))
    return schema, [compile_expression(part, schema) for text in rules for part in split_conjunction(text)]
