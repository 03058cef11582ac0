"""Tables of any length, Parquet or CSV: the one reader and the one writer, a pyarrow batch at a time.

Rows of Python's go in and out by `rows_batch` and `to_pylist`. A column's typed values are a `Value`: numbers, text or
truth values, a missing one being null, whichever way the table spells it; `duration` may follow from other columns.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from opensora_repro.config.prompts import is_blank
from opensora_repro.data.csv_tables import check_names, csv_names, csv_schema, stream_csv
from opensora_repro.errors import DataError
from opensora_repro.files import one_line, writing
from opensora_repro.storage.addresses import address_of
from opensora_repro.storage.scratch import fetched

BATCH_ROWS = 1 << 16
BATCH = 16384  # rows of Python objects that are in memory at a time
GROUP_ROWS = 1 << 17  # of a written file's row groups: what a writer holds in memory

NUMBER, TEXT, TRUTH, NULL = "a number", "text", "a truth value", "always missing"

Item = TypeVar("Item")
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table on disk: its pyarrow schema, its length, and how to pass over it."""

    path: Path
    schema: Any
    num_rows: int
    batches: Callable[..., Iterator[Any]]  # batches(columns: list of names, default all) -> pyarrow record batches

    def rows(self) -> Iterator[Row]:
        """Yield every row, a batch of them being in memory."""
        for batch in self.batches():
            for start in range(0, batch.num_rows, BATCH):
                yield from batch.slice(start, BATCH).to_pylist()


def open_table(path: Path, *, names: Sequence[str] | None = None) -> Table:
    """Open a Parquet or CSV table; `names` are the columns of a CSV without a header. Raises DataError.

    A CSV is read once here, for its types and its length, and never held whole.
    """
    import pyarrow.parquet as pq

    if table_kind(path) == "csv":
        schema, num_rows = csv_schema(path, names)
        table = Table(path, schema, num_rows, lambda columns=None: _slices(path, schema, names, columns))
    else:
        with _readable(path), pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
            check_names(path, schema.names)
        table = Table(path, schema, num_rows, lambda columns=None: _stream(path, columns))
    if not num_rows:
        raise EmptyTableError(f"{path}: the table is empty (a header but no rows)")
    return table


def read_names(path: Path) -> list[str]:
    """Return the names of a table's columns without reading its rows. Raises DataError."""
    import pyarrow.parquet as pq

    if table_kind(path) == "csv":
        return csv_names(path)
    with _readable(path):
        return list(pq.read_schema(path).names)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a Parquet file is read becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors for damaged content derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read as parquet: {reason}") from error


def table_kind(path: Path) -> str:
    """Return "parquet" or "csv" for a table that is there, by its extension. Raises DataError."""
    kind = kind_by_name(path)
    try:
        fetched(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such object") from None
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected a .parquet or .csv file")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return kind


def kind_by_name(path: Path) -> str:
    """Return "parquet" or "csv", by the extension alone. Raises DataError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("parquet", "csv"):
        raise DataError(f"{path}: expected a .parquet or .csv file")
    return kind


def in_batches(items: Iterable[Item], size: int = BATCH) -> Iterator[list[Item]]:
    """Yield lists of `size` items; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


@dataclass(frozen=True)
class Again(Iterable[Item]):
    """Items that are made anew whenever they are asked for: of millions none is held."""

    make: Callable[[], Iterator[Item]]

    def __iter__(self) -> Iterator[Item]:
        return self.make()


class EmptyTableError(DataError):
    """A table without rows."""


def _slices(path: Path, schema: Any, names: Sequence[str] | None, columns: Sequence[str] | None) -> Iterator[Any]:
    for batch in stream_csv(fetched(path), schema, names, columns):
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _stream(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """Read a Parquet file in order; without pre-buffering, which would hold whole row groups."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(fetched(path), pre_buffer=False, memory_map=False, buffer_size=1 << 20) as file:
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False)
        while True:
            with _readable(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.replace_schema_metadata()


def num_rows(path: Path) -> int:
    """Return the rows of a Parquet file."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(fetched(path)).num_rows)


def set_column(table: Any, name: str, values: Any) -> Any:
    """Return a pyarrow table with a column of this name: in the place of the one that has it, else as the last."""
    at = table.schema.get_field_index(name)
    return table.append_column(name, values) if at < 0 else table.set_column(at, name, values)


def write_table(table: Any, path: Path) -> None:
    """Write a pyarrow table as Parquet or CSV, by the extension; as `table_writer` does."""
    with table_writer(path, table.schema.remove_metadata()) as write:
        for batch in table.to_batches(max_chunksize=BATCH_ROWS):
            write(batch.replace_schema_metadata())


@contextmanager
def table_writer(path: Path, schema: Any, *, header: bool = True) -> Iterator[Callable[[Any], None]]:
    """Yield a function that appends record batches to a Parquet or CSV file, by its extension.

    The file appears whole at the end of the block or not at all; an equal one is left untouched. Raises DataError.
    """
    with (
        writing(path) as file,
        _csv(file, path, schema, header) if kind_by_name(path) == "csv" else _parquet(file, path, schema) as add,
    ):
        yield add


@contextmanager
def _parquet(file: BinaryIO, path: Path, schema: Any) -> Iterator[Callable[[Any], None]]:
    import pyarrow.parquet as pq

    from opensora_repro.data.origin import recorded

    with pq.ParquetWriter(file, schema) as writer:
        groups = _Groups(writer, schema)
        with recorded(path, writer) as version:

            def add(batch: Any) -> None:
                if version is not None:
                    version.add(batch)
                groups.add(batch)

            yield add
            groups.flush()


@contextmanager
def _csv(file: BinaryIO, path: Path, schema: Any, header: bool) -> Iterator[Callable[[Any], None]]:
    import pyarrow as pa
    from pyarrow import csv

    fields = [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    for name, kind in fields:
        if pa.types.is_nested(kind):
            raise DataError(f"{path}: column {one_line(name)} holds {kind}, which CSV cannot; choose Parquet")
    flat = pa.schema(fields)
    with csv.CSVWriter(file, flat, write_options=csv.WriteOptions(include_header=header)) as writer:
        yield lambda batch: writer.write_batch(batch.cast(flat))


class _Groups:
    """Gathers batches, however few rows are left of each, into row groups of one size."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self.writer, self.schema = writer, schema
        self.waiting: list[Any] = []
        self.rows = 0

    def add(self, batch: Any) -> None:
        if batch.num_rows:
            self.waiting.append(batch)
            self.rows += batch.num_rows
        if self.rows >= GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        import pyarrow as pa

        if self.waiting:
            self.writer.write_table(pa.Table.from_batches(self.waiting, self.schema), row_group_size=self.rows)
        self.waiting, self.rows = [], 0


def is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def is_missing(value: object) -> bool:
    """True for None, NaN, text of which nothing can be seen, and the word "nan" that a NaN leaves in a CSV."""
    if isinstance(value, str):
        return is_blank(value) or value.strip().lower() == "nan"
    return value is None or str(value) in ("nan", "<NA>", "NaT")


# ---- rows of Python's


def write_rows(path: Path, rows: Iterable[Row], columns: Mapping[str, str]) -> int:
    """Write a Parquet file row by row, whole or not at all; an equal file is left untouched. Returns how many."""
    schema, count = schema_of(columns), 0
    with table_writer(path, schema) as write:
        for batch in in_batches(rows):
            count += len(batch)
            write(rows_batch(batch, schema))
    return count


def schema_of(columns: Mapping[str, str]) -> Any:
    """Return the pyarrow schema of columns that are given with pyarrow's names of their types."""
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])


def plain_columns(schema: Any) -> dict[str, str]:
    """Return a schema's columns whose values JSON can hold, with pyarrow's names of their types."""
    from pyarrow import types

    kinds = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return {field.name: str(field.type) for field in schema if any(is_kind(field.type) for is_kind in kinds)}


def rows_batch(rows: Sequence[Row], schema: Any) -> Any:
    """Return rows as a pyarrow record batch; what a row lacks is null, what it has besides is left out."""
    import pyarrow as pa

    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        values = [None if isinstance(v, float) and math.isnan(v) else v for v in values]  # pandas' null
        if field.type == pa.string():
            values = [v if v is None or isinstance(v, str) else str(v) for v in values]
        if field.name == "path":
            values = [(os.path.isabs(v) and address_of(v)) or v if isinstance(v, str) else v for v in values]
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


# ---- columns as typed values


@dataclass(frozen=True)
class Value:
    """A column, or what an expression makes of some; `of` computes it from a batch: an array, or one scalar."""

    kind: str
    of: Callable[[Any], Any]
    columns: frozenset[str] = frozenset()  # of the file, that it reads
    constant: Any = None  # of a literal

    def array(self, batch: Any) -> Any:
        """Return the values as a pyarrow array of the batch's length, also where they are one scalar; null: missing."""
        import pyarrow as pa

        values = self.of(batch)
        return pa.repeat(values, batch.num_rows) if isinstance(values, pa.Scalar) else values


def column_of(name: str, schema: Any) -> Value:
    """Return a column by name; `duration` (seconds) follows from others where there is no such column."""
    if name in schema.names:
        kind = _kind(schema.field(name).type)
        if kind is None:
            raise DataError(f"column {name} holds {schema.field(name).type}, which rules cannot use")
        return Value(kind, lambda batch: _cleaned(batch.column(name), kind), frozenset((name,)))
    if name == "duration" and (derived := _duration(schema)):
        return derived
    close = difflib.get_close_matches(name, [*schema.names, "duration"], n=1, cutoff=0.5)
    hint = f", did you mean {close[0]}?" if close else ""
    raise DataError(f"no column {name}{hint or ' (has ' + ', '.join(schema.names) + ')'}")


def _duration(schema: Any) -> Value | None:
    """Seconds: num_frames / fps, or else end_time - start_time; 0 for an image."""
    import pyarrow.compute as pc

    names = set(schema.names)
    parts: list[Value] = []
    if {"num_frames", "fps"} <= names:
        frames, fps = column_of("num_frames", schema), column_of("fps", schema)

        def played(batch: Any) -> Any:
            rate = fps.of(batch)
            return pc.if_else(pc.greater(rate, 0.0), pc.divide(frames.of(batch), rate), None)

        parts.append(Value(NUMBER, played, frames.columns | fps.columns))
    if {"start_time", "end_time"} <= names:
        start, end = column_of("start_time", schema), column_of("end_time", schema)
        parts.append(
            Value(NUMBER, lambda batch: pc.subtract(end.of(batch), start.of(batch)), start.columns | end.columns)
        )
    if "num_frames" in names:
        count = column_of("num_frames", schema)
        still = Value(NUMBER, lambda batch: pc.if_else(pc.equal(count.of(batch), 1.0), 0.0, None), count.columns)
        parts.append(still)
    if not names >= {"start_time", "end_time"} and not names >= {"num_frames", "fps"}:
        return None
    columns = frozenset[str]().union(*(part.columns for part in parts))
    return Value(NUMBER, lambda batch: pc.coalesce(*(part.of(batch) for part in parts)), columns)


def _kind(kind: Any) -> str | None:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _kind(kind.value_type)
    if types.is_boolean(kind):
        return TRUTH
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return NUMBER
    if types.is_string(kind) or types.is_large_string(kind):
        return TEXT
    return NULL if types.is_null(kind) else None


def _cleaned(array: Any, kind: str) -> Any:
    """Numbers as float64 with NaN as null (it is how tables made of floats spell a missing value); text as string."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if kind == NUMBER:
        array = array.cast(pa.float64())
        return pc.if_else(pc.is_nan(array), None, array)
    return array.cast(pa.string()) if kind == TEXT else array
