"""CSV files of any length, a block at a time: what types their columns have, and how to pass over them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora_repro.data.csv_rows import check_csv
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

BLOCK = 1 << 24  # bytes that are parsed at a time; no row may be longer
TEXTS = ("id", "path", "caption", "text", "source", "url", "sha256", "md5")  # text, even where all values are numbers
KINDS = ("int64", "double", "bool")  # what other columns may be, the narrowest first


def csv_schema(path: Path, names: Sequence[str] | None) -> tuple[Any, int]:
    """Return the columns with their types, which only the last row tells, and the number of rows. Raises DataError.

    The first block's types are tried on all of the file; where they do not fit, values are looked at one by one.
    `names` are the columns of a file without a header. An empty field is null.
    """
    import pyarrow as pa

    if _holds(path, b'\\"'):  # pyarrow would read such quotes as something else
        check_csv(path)
    with _readable(path), _open(path, names, {}, None) as reader:
        first = reader.schema
    found = first.names
    if repeated := sorted({name for name in found if found.count(name) > 1}):
        raise DataError(f"{path}: column {one_line(repeated[0])} is there twice")
    others = [name for name in found if name not in TEXTS]
    guess = {name: _plain(first.field(name).type) for name in others or found[:1]}
    with _readable(path):
        try:
            num_rows = sum(batch.num_rows for batch in _shown(path, names, guess))
        except pa.ArrowInvalid:  # a later block is of another type than the first; or is no CSV at all
            guess, num_rows = _scan(path, names, dict.fromkeys(guess, pa.string()))
    types = {name: pa.float64() if kind == pa.null() else kind for name, kind in guess.items() if name in others}
    return pa.schema([(name, types.get(name, pa.string())) for name in found]), num_rows


def _holds(path: Path, wanted: bytes) -> bool:
    """Whether a file holds some bytes anywhere."""
    last = b""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            if wanted in last + block:
                return True
            last = block[1 - len(wanted) :]
    return False


def _plain(kind: Any) -> Any:
    """Return the type of the first block, or text for the dates and times among them."""
    import pyarrow as pa

    return kind if kind in (pa.int64(), pa.float64(), pa.bool_(), pa.null()) else pa.string()


def _scan(path: Path, names: Sequence[str] | None, texts: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Read columns as text and return the types that hold all of their values, and how many rows there are."""
    import pyarrow as pa

    kinds, num_rows = dict.fromkeys(texts, ""), 0
    for batch in _shown(path, names, texts):
        num_rows += batch.num_rows
        for name, kind in kinds.items():
            if kind != "string":
                kinds[name] = _wider(kind, _kind(batch.column(name)))
    return {name: pa.type_for_alias(kind or "null") for name, kind in kinds.items()}, num_rows


def _shown(path: Path, names: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Any]:
    """Yield the batches of the columns that `types` names, with progress: a long table takes a while."""
    import pyarrow as pa

    done = 0
    with (
        pa.OSFile(os.fspath(path)) as file,
        progress(f"reading {path.name}", file.size() >> 20, "MB") as bar,
        _open(file, names, types, list(types)) as reader,
    ):
        for batch in reader:
            yield batch
            read = file.tell() >> 20
            bar(read - done)
            done = read


def stream_csv(path: Path, schema: Any, names: Sequence[str] | None, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yield record batches of some columns (default: all) of `schema`. Raises DataError."""
    types = dict(zip(schema.names, schema.types, strict=True))
    with _readable(path), _open(path, names, types, columns) as reader:
        yield from reader


def _open(file: Any, names: Sequence[str] | None, types: dict[str, Any], columns: Sequence[str] | None) -> Any:
    """Return pyarrow's reader of a path or an open file."""
    from pyarrow import csv

    return csv.open_csv(
        file,
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
        check_csv(path)  # tells the row, where it can
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
