"""CSV as people and spreadsheets write it, a row at a time; what would shift or swallow a field is told with its row.

Fields are parted by commas, semicolons or tabs, whichever the header has most of; text is UTF-8, with or without a byte
order mark, or UTF-16 with one. All fields are text.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from opensora_repro.errors import DataError
from opensora_repro.files import one_line

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LONGEST_FIELD = 1 << 22  # characters; more are taken for a quote that is not closed
FORMULA = ("=", "+", "-", "@")  # what a spreadsheet takes for the start of one
HOW = "save it as CSV UTF-8"
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte
_ESCAPED = re.compile(r'\\(?:"")*"(?!["\s,;]|$)')  # a backslash before an odd number of quotes within a field


def csv_names(path: Path) -> list[str]:
    """Return the columns' names. Raises DataError."""
    with _open(path) as lines:
        return next(_records(lines))[1]


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield some columns of every row that is not blank. Raises DataError for a row that is not as the header says."""
    with _open(path) as lines:
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
    with _open(path, ",") as lines:
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

    def __init__(self, path: Path, file: IO[str], delimiter: str) -> None:
        self.path, self.file = path, file
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
def _open(path: Path, delimiter: str = "") -> Iterator[_Lines]:
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
            yield _Lines(path, text, delimiter)
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
