"""CSV of any length: typed columns a block at a time, and rows of text as people and spreadsheets write them.

Row by row, fields are parted by commas, semicolons or tabs, whichever the header has most of; text is UTF-8, with or
without a byte order mark, or UTF-16 with one. What would shift or swallow a field is told with its row.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

BLOCK = 1 << 24  # bytes that are parsed at a time; no row may be longer
TEXTS = ("id", "path", "caption", "text", "source", "url", "sha256", "md5")  # text, even where all values are numbers
KINDS = ("int64", "double", "bool")  # what other columns may be, the narrowest first
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LONGEST_FIELD = 1 << 22  # characters; more are taken for a quote that is not closed
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for the start of one
HOW = "save it as CSV UTF-8"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte
_ESCAPED = re.compile(r'\\(?:"")*"(?!["\s,;]|$)')  # a backslash before an odd number of quotes within a field


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
    check_names(path, found)
    if len(found) == 1 and not names:
        _check_commas(path)
    others = [name for name in found if name not in TEXTS]
    guess = {name: _plain(first.field(name).type) for name in others or found[:1]}
    with _readable(path):
        try:
            num_rows = sum(batch.num_rows for batch in _shown(path, names, guess))
        except pa.ArrowInvalid:  # a later block is of another type than the first; or is no CSV at all
            guess, num_rows = _scan(path, names, dict.fromkeys(guess, pa.string()))
    types = {name: pa.float64() if kind == pa.null() else kind for name, kind in guess.items() if name in others}
    return pa.schema([(name, types.get(name, pa.string())) for name in found]), num_rows


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError for a name that two columns have."""
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: column {one_line(repeated[0])} is there twice")


def _check_commas(path: Path) -> None:
    """Raise DataError where a table of one column is one of several in another spelling."""
    with _lines_of(path) as lines:
        if len(_header(lines, iter(lines))) > 1:
            raise DataError(f"{path}: fields are parted by {DELIMITERS[lines.delimiter]}, expected commas; {HOW}")


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file holds some bytes anywhere."""
    last = b""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            if content in last + block:
                return True
            last = block[1 - len(content) :]
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


# ---- row by row


def csv_names(path: Path) -> list[str]:
    """Return the columns' names. Raises DataError."""
    with _lines_of(path) as lines:
        return next(_records(lines))[1]


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield some columns of every row that is not blank. Raises DataError for a row that is not as the header says."""
    with _lines_of(path) as lines:
        records = _records(lines)
        names = next(records)[1]
        if repeated := next((name for name in columns if names.count(name) > 1), None):
            raise DataError(f"{path}: column {one_line(repeated)} is there twice")
        places = [names.index(name) for name in columns]
        for number, (line, fields) in enumerate(records, start=1):
            if len(fields) > len(names) and any(fields[len(names) :]):
                raise lines.wrong(number, line, _too_many(len(fields), len(names), lines.delimiter))
            if len(fields) <= max(places):
                lacking = next(name for name, at in zip(columns, places, strict=True) if at >= len(fields))
                reason = f"{_fields(len(fields))}, the header has {len(names)}: {one_line(lacking)} is missing"
                raise lines.wrong(number, line, reason)
            yield tuple(fields[at] for at in places)


def check_csv(path: Path) -> None:
    """Raise DataError for a row with more fields than the header, which other readers shift or cut, and bad quotes."""
    with _lines_of(path, ",") as lines:
        if lines.wide:
            raise DataError(f"{path}: is UTF-16 text; {HOW}")
        records = _records(lines)
        width = len(next(records, (0, []))[1])
        for number, (line, fields) in enumerate(records, start=1):
            if len(fields) > width:
                raise lines.wrong(number, line, _too_many(len(fields), width, ","))


def _too_many(found: int, width: int, delimiter: str) -> str:
    return f"{_fields(found)}, the header has {width}: put a caption with {DELIMITERS[delimiter]} in quotes"


def _fields(count: int) -> str:
    return f"{count} field{'s' if count != 1 else ''}"


class _Lines:
    """A file's lines; those of the record that is being read are kept for messages."""

    def __init__(self, path: Path, file: IO[str], delimiter: str, wide: bool) -> None:
        self.path, self.file, self.wide = path, file, wide
        self.delimiter, self.lenient = delimiter, not delimiter  # other readers know commas alone, and no spaces
        self.number = 0
        self.record: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for line in self.file:
            self.number += 1
            if not line.isascii() and _NOT_UTF8.search(line):
                raise DataError(f"{self.path}: line {self.number} is no UTF-8 text; {HOW}")
            self.record.append(line)
            yield line

    def wrong(self, row: int, line: int, reason: str) -> DataError:
        return DataError(f"{self.path}: row {row} (line {line}): {reason}")


@contextmanager
def _lines_of(path: Path, delimiter: str = "") -> Iterator[_Lines]:
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
        wide = head.startswith((b"\xff\xfe", b"\xfe\xff"))
        if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
            raise DataError(f"{path}: is a spreadsheet or an archive, no text; {HOW}")
        if b"\0" in head and not wide:
            raise DataError(f"{path}: is no UTF-8 text; {HOW}")
        how = {"encoding": "utf-16"} if wide else {"encoding": "utf-8-sig", "errors": "surrogateescape"}
        with open(path, newline="", **how) as text:  # type: ignore[call-overload]
            yield _Lines(path, text, delimiter, wide)
    except UnicodeError as error:
        raise DataError(f"{path}: cannot be read as csv: no UTF-16 text; {HOW}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read as csv: {error.strerror}") from error


def _records(lines: _Lines) -> Iterator[tuple[int, list[str]]]:
    """Yield the header, then every row that is not blank, each with the line it begins in."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    source = iter(lines)
    header = _header(lines, source)
    yield lines.number, header
    reader = csv.reader(source, delimiter=lines.delimiter, strict=True, skipinitialspace=lines.lenient)
    row = 0
    while True:
        lines.record.clear()
        line = lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise lines.wrong(row + 1, line, _quoting(lines)) from None
        if any(field and not field.isspace() for field in fields):
            row += 1
            if any("\\" in text for text in lines.record) and _ESCAPED.search("".join(lines.record)):
                raise lines.wrong(row, line, _quoting(lines))
            yield line, fields


def _header(lines: _Lines, source: Iterator[str]) -> list[str]:
    """Return the columns' names; sets the delimiter, which a spreadsheet may give in a line `sep=;` before them."""
    first = next((line for line in source if not line.isspace()), "")
    told = re.fullmatch(r'"?sep=([,;\t])"?\s*', first)
    if told:
        first = next(source, "")
    if not first.strip():
        raise DataError(f"{lines.path}: cannot be read as csv: it is empty")
    tried = {mark: next(csv.reader([first], delimiter=mark, skipinitialspace=True)) for mark in DELIMITERS}
    most = max(tried, key=lambda mark: len(tried[mark]))
    lines.delimiter = lines.delimiter or (told[1] if told else most)
    return [name.strip() for name in tried[lines.delimiter]]


def _quoting(lines: _Lines) -> str:
    if any('\\"' in text for text in lines.record):
        return 'quotes are escaped by backslashes (\\"); write each quote within a field twice ("")'
    return 'a quote is not closed or text follows it; put the whole field in quotes, those within it twice ("")'


def inert(text: str) -> str:
    """Return a field that no spreadsheet computes; `as_written` is the way back."""
    return f"'{text}" if text.lstrip("'").startswith(FORMULA) else text


def as_written(text: str) -> str:
    """Return what `inert` was given."""
    return text[1:] if text.startswith("'") and text.lstrip("'").startswith(FORMULA) else text
