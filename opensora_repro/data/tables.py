"""Tables of any length as pyarrow has them, read and written a batch of rows at a time: Parquet or CSV."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from opensora_repro.data.csv_rows import csv_names
from opensora_repro.data.csv_tables import csv_schema, stream_csv
from opensora_repro.errors import DataError
from opensora_repro.files import one_line, writing

BATCH_ROWS = 1 << 16
BATCH = 16384  # rows of Python objects that are in memory at a time
GROUP_ROWS = 1 << 17  # of a written file's row groups: what a writer holds in memory

Item = TypeVar("Item")


@dataclass(frozen=True)
class Table:
    """A table on disk: its pyarrow schema, its length, and how to pass over it."""

    path: Path
    schema: Any
    num_rows: int
    batches: Callable[..., Iterator[Any]]  # batches(columns: list of names, default all) -> pyarrow record batches


def open_table(path: Path, *, names: Sequence[str] | None = None) -> Table:
    """Open a Parquet or CSV table; `names` are the columns of a CSV without a header. Raises DataError.

    A CSV is read once here, for its types and its length, and never held whole.
    """
    table = _open(path, names)
    if not table.num_rows:
        raise EmptyTableError(f"{path}: the manifest is empty (a header but no rows)")
    return table


def _open(path: Path, names: Sequence[str] | None = None) -> Table:
    import pyarrow.parquet as pq

    if table_kind(path) == "csv":
        schema, num_rows = csv_schema(path, names)
        return Table(path, schema, num_rows, lambda columns=None: _slices(path, schema, names, columns))
    with readable(path), pq.ParquetFile(path) as file:
        schema, num_rows = file.schema_arrow.remove_metadata(), file.metadata.num_rows
    return Table(path, schema, num_rows, lambda columns=None: _stream(path, schema, columns))


def read_table(path: Path) -> Any:
    """Return a whole Parquet or CSV file as a pyarrow table, even one without rows. Raises DataError."""
    import pyarrow as pa

    table = _open(path)
    return pa.Table.from_batches(table.batches(), table.schema)


def read_names(path: Path) -> list[str]:
    """Return the names of a table's columns without reading its rows. Raises DataError."""
    import pyarrow.parquet as pq

    if table_kind(path) == "csv":
        return csv_names(path)
    with readable(path):
        return list(pq.read_schema(path).names)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a Parquet file is read becomes a DataError that names it."""
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's errors for damaged content derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read as parquet: {reason}") from error


def table_kind(path: Path) -> str:
    """Return "parquet" or "csv" for a table that is there, by its extension. Raises DataError."""
    kind = kind_by_name(path)
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


class EmptyTableError(DataError):
    """A table without rows."""


def _slices(path: Path, schema: Any, names: Sequence[str] | None, columns: Sequence[str] | None) -> Iterator[Any]:
    for batch in stream_csv(path, schema, names, columns):
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def _stream(path: Path, schema: Any, columns: Sequence[str] | None) -> Iterator[Any]:
    """Read a Parquet file in order; without pre-buffering, which would hold whole row groups."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, memory_map=False, buffer_size=1 << 20) as file:
        batches = file.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False)
        while True:
            with readable(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.replace_schema_metadata()


def num_rows(path: Path) -> int:
    """Return the rows of a Parquet file."""
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def set_column(table: Any, name: str, values: Any) -> Any:
    """Return a pyarrow table with a column of this name: in the place of the one that has it, else as the last."""
    at = table.schema.get_field_index(name)
    return table.append_column(name, values) if at < 0 else table.set_column(at, name, values)


def write_table(table: Any, path: Path) -> None:
    """Write a pyarrow table as Parquet or CSV, by the extension; as `table_writer` does."""
    with table_writer(path, table.schema.remove_metadata()) as write:
        for batch in table.to_batches():
            write(batch.replace_schema_metadata())


@contextmanager
def table_writer(path: Path, schema: Any, *, header: bool = True) -> Iterator[Callable[[Any], None]]:
    """Yield a function that appends record batches to a Parquet or CSV file, by its extension.

    The file appears whole at the end of the block or not at all; an equal one is left untouched. Raises DataError.
    """
    with (
        writing(path) as file,
        _csv(file, path, schema, header) if kind_by_name(path) == "csv" else _parquet(file, schema) as add,
    ):
        yield add


@contextmanager
def _parquet(file: BinaryIO, schema: Any) -> Iterator[Callable[[Any], None]]:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(file, schema) as writer:
        groups = _Groups(writer, schema)
        yield groups.add
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


class Rebase:
    """Makes the relative paths of one folder's manifest relative to another folder; absolute ones become so too."""

    def __init__(self, old: Path, new: Path) -> None:
        self.old, self.new = old, new

    def __call__(self, batch: Any) -> Any:
        """Return the batch with its `path` column rewritten; a batch without one as it is."""
        import pyarrow as pa
        import pyarrow.compute as pc

        at = batch.schema.get_field_index("path")
        if at < 0 or not batch.num_rows or not is_text(batch.schema.field(at).type):
            return batch
        folders, names = _split(batch.column(at).cast(pa.string()))
        moved = pa.array([self.folder(name) for name in folders.dictionary.to_pylist()], pa.string())
        joined = pc.binary_join_element_wise(moved.take(folders.indices), names, "")
        return batch.set_column(at, batch.schema.field(at), joined.cast(batch.schema.field(at).type))

    def folder(self, name: str) -> str:
        """Return a folder of the old manifest's, with its last slash, as the new manifest has it."""
        moved = os.path.relpath(self.old / os.path.expanduser(name), self.new)
        return "" if moved == "." else f"{moved}/"


class Absolute(Rebase):
    """Makes the relative paths of one folder's manifest absolute, for readers that know of no folder."""

    def __init__(self, old: Path) -> None:
        super().__init__(old, old)

    def folder(self, name: str) -> str:
        """Return a folder of the old manifest's from the root on, with its last slash."""
        return os.path.join(os.path.normpath(self.old.absolute() / os.path.expanduser(name)), "")


def _split(paths: Any) -> tuple[Any, Any]:
    """Return the paths' folders with their last slash, as a dictionary array since clips share few, and the names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    first = paths[0].as_py() or ""
    folder = first[: first.rfind("/") + 1]
    same = pc.and_(pc.starts_with(paths, pattern=folder), pc.equal(pc.count_substring(paths, "/"), folder.count("/")))
    if pc.all(same, skip_nulls=False).as_py():  # one folder: several times as fast as the general way
        alike = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0), len(paths)), pa.array([folder]))
        return alike, pc.utf8_slice_codeunits(paths, len(folder))
    parts = pc.extract_regex(paths, r"(?s)^(?P<folder>(?:.*/)?)(?P<name>[^/]*)$")
    return pc.struct_field(parts, "folder").dictionary_encode(), pc.struct_field(parts, "name")


def is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)
