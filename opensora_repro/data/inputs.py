"""What INPUT means, for every dataset tool: a folder, a file, a glob pattern, or a table with a `path` column.

Names are somebody else's: they may start with a dash, hold quotes, commas and line breaks, or be no text at all.
"""

from __future__ import annotations

import glob
import itertools
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora_repro.data.tables import in_batches, is_missing, open_table
from opensora_repro.errors import DataError
from opensora_repro.files import one_line
from opensora_repro.storage.addresses import AddressRefused, address_of, redacted, within
from opensora_repro.storage.objects import is_object, objects_below, objects_matching, reason_missing

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv",
     ".3gp", ".3g2", ".asf", ".f4v", ".vob", ".mxf")
)  # fmt: skip
TABLE_SUFFIXES = frozenset((".csv", ".parquet"))
CHUNK = 1024  # items that are in memory at a time


@dataclass(frozen=True)
class Item:
    """One input file. `name` tells it apart from the others: its path from INPUT on, with /."""

    path: Path
    name: str
    row: dict[str, Any] | None = None  # of a table: all of its columns
    reason: str = ""  # why it cannot be used, where that is known already


class Items:
    """Input files in their order, made whenever they are asked for: there may be millions. Their names are held.

    `root` is what the names are relative to.
    """

    def __init__(self, found: Iterable[Item], root: Path, *, ordered: bool = False) -> None:
        import pyarrow as pa

        schema = pa.schema([("name", pa.string()), ("path", pa.binary()), ("reason", pa.string())])
        batches = [pa.table(_columns(batch), schema) for batch in in_batches(found, CHUNK)]
        self.root, self.held = root, pa.concat_tables(batches) if batches else schema.empty_table()
        if ordered:
            self.held = self.held.sort_by("name")

    def __len__(self) -> int:
        return int(self.held.num_rows)

    def __iter__(self) -> Iterator[Item]:
        for batch in self.held.to_batches(max_chunksize=CHUNK):
            for name, path, reason in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Item(Path(os.fsdecode(path)) if path is not None else self.root / name, name, None, reason)

    def first(self) -> Item:
        return next(iter(self))


def _columns(items: list[Item]) -> list[list[Any]]:
    """Return names, paths of those that may be called otherwise (a name that is no text), and reasons."""
    paths = [os.fsencode(item.path) if item.reason else None for item in items]
    return [[item.name for item in items], paths, [item.reason for item in items]]


class TableItems(Items):
    """A table's rows, read whenever they are asked for. What is known of them from the first time is held."""

    def __init__(self, table: Path) -> None:
        import pyarrow as pa

        self.table = open_table(table)
        if "path" not in self.table.schema.names:
            raise DataError(f"{one_line(table)}: column path missing (has {', '.join(self.table.schema.names)})")
        told = (_with_reason(item) for item in self._rows())
        self.reasons = pa.chunked_array([pa.array([i.reason for i in b], pa.string()) for b in in_batches(told, CHUNK)])

    def __len__(self) -> int:
        return self.table.num_rows

    def __iter__(self) -> Iterator[Item]:
        reasons = (reason for chunk in self.reasons.chunks for reason in chunk.to_pylist())
        for item, reason in zip(self._rows(), reasons, strict=True):
            yield replace(item, reason=reason) if reason else item

    def _rows(self) -> Iterator[Item]:
        table = self.table.path
        folder = table.absolute().parent
        for number, row in enumerate(self.table.rows(), start=1):
            if not isinstance(row["path"], str) or is_missing(row["path"]):
                raise DataError(f"{one_line(table)}: row {number}: path is {row['path']!r}, expected text")
            whole = is_missing(row.get("start_frame")) and isinstance(row.get("source"), str)
            name = row["source"] if whole else row["path"]
            try:
                yield Item(Path(os.path.normpath(within(folder, row["path"]))), name, row)
            except AddressRefused as error:
                told = {**row, "path": "", **({"source": ""} if whole else {})}
                yield Item(Path(), redacted(name), told, f"{error.filename}: {error.strerror}")


@dataclass(frozen=True)
class Inputs:
    """What INPUT holds, sorted by name (a table's rows keep their order), and how many files were passed over."""

    items: Items
    others: int = 0


def find_inputs(given: str | Path, *, out: Path, suffixes: Collection[str] = VIDEO_SUFFIXES) -> Inputs:
    """Return what `given` stands for.

    A folder is searched with its subfolders, linked ones too, for names that end in `suffixes`; hidden files and
    folders and `out` are left out. A folder or a dangling link with such a name is listed: opening it tells the reason.
    A file or a pattern's matches (`**` for any depth) are taken whatever their names. A table's paths are relative to
    its folder; a row's name is its `source` if it is a whole file (no `start_frame`), else its path.
    The same holds for the path of an address (see storage/addresses.py). Raises DataError.
    """
    path = Path(given)
    if address_of(path):
        inputs = _of_store(path, out, suffixes)
    elif path.is_dir():
        inputs = _of_folder(path, out, suffixes)
    elif path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        inputs = Inputs(TableItems(path))
    elif os.path.lexists(path):
        inputs = Inputs(Items([_item(path, path.name)], path.parent))
    elif glob.has_magic(os.fspath(given)):
        inputs = Inputs(_of_pattern(os.fspath(given), out, suffixes))
    else:
        raise DataError(f"{one_line(given)}: no such file or folder")
    return inputs


def _item(path: Path, name: str) -> Item:
    return _with_reason(Item(path, name))


def _with_reason(item: Item) -> Item:
    """Return an item with the reason why it cannot be used, if it can be told without opening it."""
    path, name = item.path, item.name
    try:
        name.encode()
        os.fspath(path).encode()
    except UnicodeEncodeError:  # no table can hold such a path
        readable = os.fsencode(name).decode("utf-8", "backslashreplace")
        return replace(item, name=readable, reason="its name is not valid UTF-8; rename it")
    if not item.reason and not address_of(path) and path.exists() and not (path.is_file() or path.is_dir()):
        return replace(item, reason="is no regular file")  # opening a pipe would wait for its other end
    return item


def _of_store(path: Path, out: Path, suffixes: Collection[str]) -> Inputs:
    """Return what an address stands for. Of a web server, which has no lists, it is one file."""
    address, told = address_of(path), one_line(path)
    if is_object(path):
        if path.suffix.lower() in TABLE_SUFFIXES:
            return Inputs(TableItems(path))
        return Inputs(Items([_item(path, path.name)], path.parent))
    if address.startswith("http"):
        raise DataError(f"{told}: no such file")
    if glob.has_magic(address):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [one for one in objects_matching(path) if out not in one.parents]
        if not found:
            raise DataError(f"{told}: {reason_missing(root) or 'no object matches this pattern'}")
        return Inputs(Items((_item(one, one.relative_to(root).as_posix()) for one in found), root))
    return _of_folder(path, out, suffixes)


def _below_address(root: Path, out: Path) -> Iterator[Path]:
    for path in objects_below(root):
        if out not in path.parents and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


def _of_folder(root: Path, out: Path, suffixes: Collection[str]) -> Inputs:
    inputs = files_below(root, out, suffixes)
    if not inputs.items:
        reason = reason_missing(root) if address_of(root) else ""
        looked_for = f"no video in this folder (looked for {' '.join(sorted(suffixes))})"
        raise DataError(f"{one_line(root)}: {reason or looked_for}")
    return inputs


def files_below(root: Path, out: Path, suffixes: Collection[str]) -> Inputs:
    """Return what `find_inputs` finds in a folder, where nothing is no mistake."""
    if out.resolve() == root.resolve():
        raise DataError(f"--out {one_line(out)}: is INPUT itself; choose another folder")
    others = 0

    def found() -> Iterator[Item]:
        nonlocal others
        below = ((path, False) for path in _below_address(root, out)) if address_of(root) else _walk(root, out)
        for path, is_folder in below:
            if path.suffix.lower() in suffixes:
                yield _item(path, path.relative_to(root).as_posix())
            else:
                others += not is_folder

    items = Items(found(), root, ordered=True)
    return Inputs(items, others)


def _walk(root: Path, out: Path) -> Iterator[tuple[Path, bool]]:
    """Yield everything below `root` with whether it is a folder; no folder is entered twice, so links cannot circle."""
    left_out, entered = out.resolve(), set()

    def told(error: OSError) -> None:
        print(f"warning: {one_line(error.filename)}: {error.strerror}; left out", file=sys.stderr)

    for parent, folders, files in os.walk(root, followlinks=True, onerror=told):
        status = os.stat(parent)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(parent, f).resolve() != left_out)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        yield from ((Path(parent, name), True) for name in folders)
        yield from ((Path(parent, name), False) for name in files if not name.startswith("."))


def _of_pattern(pattern: str, out: Path, suffixes: Collection[str]) -> Items:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, within = Path(*parts[:fixed]), out.absolute()
    found = (Path(name) for name in sorted(set(glob.glob(pattern, recursive=True))))
    paths = [p for p in found if not p.is_dir() or p.suffix.lower() in suffixes]
    if within not in root.absolute().parents and within != root.absolute():
        paths = [p for p in paths if within not in p.absolute().parents]
    if not paths:
        raise DataError(f"{one_line(pattern)}: no file matches this pattern")
    return Items((_item(path, path.relative_to(root).as_posix()) for path in paths), root)
