"""CSV files of any length, a block at a time: what types their columns have, and how to pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora_repro.data.files import one_line
from opensora_repro.data.manifest import DataError

BLOCK = 1 << 24  # bytes that are parsed at a time; no row may be longer
TEXTS = ("id", "path", "caption", "text", "source", "url", "sha256", "md5")  # text, even where all values are numbers
KINDS = ("int64", "double", "bool")  # what other columns may be, the narrowest first


def csv_schema(path: Path, names: Sequence[str] | None) -> tuple[Any, int]:
    """Return the columns with their types, which only the last row tells, and the number of rows. Raises DataError.

    `names` are the columns of a file without a header. An empty field is null, as in `read_table`.
    """
    import pyarrow as pa

    with _readable(path), _open(path, names, {}, None) as reader:
        found = reader.schema.names
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise DataError(f"{path}: column {one_line(repeated[0])} is there twice")
    kinds = dict.fromkeys((name for name in found if name not in TEXTS), "")
    read = list(kinds) or found[:1]
    num_rows = 0
    with _readable(path), _open(path, names, dict.fromkeys(read, pa.string()), read) as reader:
        for batch in reader:
            num_rows += batch.num_rows
            for name, kind in kinds.items():
                if kind != "string":
                    kinds[name] = _wider(kind, _kind(batch.column(name)))
    types = {name: pa.type_for_alias(kind or "double") for name, kind in kinds.items()}
    return pa.schema([(name, types.get(name, pa.string())) for name in found]), num_rows


def stream_csv(path: Path, schema: Any, names: Sequence[str] | None, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yield record batches of some columns (default: all) of `schema`. Raises DataError."""
    types = dict(zip(schema.names, schema.types, strict=True))
    with _readable(path), _open(path, names, types, columns) as reader:
        yield from reader


def _open(path: Path, names: Sequence[str] | None, types: dict[str, Any], columns: Sequence[str] | None) -> Any:
    from pyarrow import csv

    return csv.open_csv(
        path,
        read_options=csv.ReadOptions(block_size=BLOCK, column_names=list(names) if names else None, use_threads=False),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=types,
            include_columns=list(columns) if columns else None,
            null_values=[""],  # "NA" or "None" may be somebody's id
            strings_can_be_null=True,
        ),
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ValueError as error:  # pyarrow's errors for what is no CSV derive from it
        raise DataError(f"{path}: cannot be read as csv: {one_line(str(error).splitlines()[0])}") from error


def _kind(column: Any) -> str:
    """Return the narrowest kind that holds all values of a text column; "" if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count == len(column):
        return ""
    trimmed = pc.utf8_trim_whitespace(column)
    for kind in KINDS:
        try:
            trimmed.cast(kind)
        except pa.ArrowInvalid:
            continue
        return kind
    return "string"


def _wider(one: str, other: str) -> str:
    """Return the kind that holds the values of both."""
    if one == other or not one or not other:
        return one or other
    return "double" if {one, other} == {"int64", "double"} else "string"
