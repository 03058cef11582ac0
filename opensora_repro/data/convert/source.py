"""What every reader of a format gives: rows in batches, and what it could not take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.outcome import MANIFEST, Row, in_batches, reject, rows_batch

Refuse = Callable[[Row], None]
STAGE = "convert"


@dataclass(frozen=True)
class Source:
    """The rows of an input, before their ids and sizes are looked at.

    `schema` (pyarrow) starts with the manifest's columns, which may be null; others follow.
    """

    folder: Path  # that relative paths are relative to
    schema: Any
    batches: Callable[[Refuse], Iterator[Any]]  # pyarrow record batches of that schema
    num_rows: int | None = None  # None where it is not known before


def source_of_rows(folder: Path, columns: dict[str, str], rows: Callable[[Refuse], Iterable[Row]]) -> Source:
    """Return a source whose reader yields rows; `columns` are those beside the manifest's, as in `write_rows`."""
    from opensora_repro.data.outcome import schema_of

    schema = schema_of({**MANIFEST, **columns})
    return Source(folder, schema, lambda refuse: (rows_batch(rows_, schema) for rows_ in in_batches(rows(refuse))))


def refusal(identity: str, reason: str, path: str = "") -> Row:
    """Return a row of rejects.parquet."""
    return reject(identity, path, STAGE, reason, path=path)
