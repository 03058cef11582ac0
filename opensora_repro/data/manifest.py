"""The manifest: one row a clip, in Parquet or CSV, with the clip's caption, size and lineage.

Required columns: id, path, caption, num_frames, fps, height, width. Optional lineage: source, start_frame, end_frame
(half-open), start_time, end_time (seconds), resplit (true where a boundary is a length limit, not a scene cut). Other
columns are kept. Relative paths are relative to the manifest's folder, `~` is the home folder; addresses such as
s3://bucket/clip.mp4 stand for objects. An image is a clip of one frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from opensora_repro.config.prompts import is_blank
from opensora_repro.data.tables import (
    BATCH,
    Row,
    Table,
    in_batches,
    is_missing,
    is_text,
    open_table,
    rows_batch,
    schema_of,
    table_writer,
    write_rows,
    write_table,
)
from opensora_repro.errors import DataError
from opensora_repro.files import one_line
from opensora_repro.storage.addresses import AddressRefused, place, relative, within

MANIFEST = {
    "id": "string", "path": "string", "caption": "string", "num_frames": "int64", "fps": "double",
    "height": "int64", "width": "int64",
}  # fmt: skip
LINEAGE = {
    "source": "string", "start_frame": "int64", "end_frame": "int64", "start_time": "double", "end_time": "double",
}  # fmt: skip
FILMED_RATE = "(end_frame - start_frame) / (end_time - start_time)"  # as `filter` reads it; see filmed_rates
SLOW = 0.99  # of a rate asked for; NTSC's 24000/1001 for 24 repeats a frame in a thousand
REJECTS = {
    "id": "string", "path": "string", "source": "string", "stage": "string", "reason": "string",
    "start_frame": "int64", "end_frame": "int64",
}  # fmt: skip
BATCHES = 16  # of a file, that are a chunk of the table in memory


def read_manifest(path: str | Path, *, need_captions: bool = True) -> Any:
    """Read and check a manifest; return a pyarrow table with absolute paths.

    Texts are strings, counts int64, fps float64; other columns are as they are. Rows in messages are counted from 1,
    the header not counted. `need_captions=False` is for tools that fill captions in: missing ones become "". Clip files
    are not opened here. Raises DataError.
    """
    import pyarrow as pa

    table = _with_columns(place(path))
    checked = pa.concat_tables(map(_joined, in_batches(_checked(table, need_captions), BATCHES)))
    check_ids(table.path, checked["id"])
    return checked


def open_manifest(path: str | Path, *, need_captions: bool = True) -> Table:
    """Check a manifest as `read_manifest` does; return a table that reads the same rows whenever they are asked for."""
    import pyarrow as pa

    table, ids, schema = _with_columns(place(path)), list[Any](), None
    for batch in _checked(table, need_captions):
        ids.append(batch["id"])
        schema = batch.schema
    check_ids(table.path, pa.chunked_array(ids))
    return replace(table, schema=schema, batches=lambda: _checked(table, need_captions))


def _with_columns(path: Path) -> Table:
    table = open_table(path)
    missing = [name for name in MANIFEST if name not in table.schema.names]
    if missing:
        raise DataError(
            f"{path}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; "
            f"a manifest needs {', '.join(MANIFEST)} (has {', '.join(table.schema.names)})"
        )
    return table


def _checked(table: Table, need_captions: bool) -> Iterator[Any]:
    absolute, first = Absolute(table.path.absolute().parent), 1
    for batch in table.batches():
        try:
            yield absolute(_Rows(table.path, batch, first).checked(need_captions))
        except AddressRefused as error:
            raise DataError(f"{table.path}: column path: {error.filename} {error.strerror}") from None
        first += batch.num_rows


def _joined(batches: list[Any]) -> Any:
    """Return a table of one chunk of exactly its size: what decoding has asked for is up to twice what it used."""
    import pyarrow as pa

    table = pa.Table.from_batches(batches)
    try:
        return table.combine_chunks()
    except pa.ArrowInvalid:  # lists of more items than a chunk can have
        return table


def filmed_rates(table: Any) -> Any:
    """Return the frames a second that a clip's source has in its span, float [N]; infinite where no lineage tells.

    A clip of more has frames twice: `split --fps` takes for each moment what the source shows then.
    """
    import numpy as np
    from pyarrow.types import is_floating, is_integer

    columns = [table[name] for name in LINEAGE if name != "source" and name in table.column_names]
    if len(columns) < 4 or not all(is_integer(column.type) or is_floating(column.type) for column in columns):
        return np.full(len(table), np.inf)
    start, end, began, ended = (column.to_numpy().astype(float) for column in columns)  # missing: not a number
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = (end - start) / (ended - began)
    return np.where(rates > 0, rates, np.inf)


def write_manifest(table: Any, path: str | Path) -> None:
    """Write a manifest, whole or not at all; its paths become relative to its own folder."""
    import pyarrow as pa

    path = Path(path)
    rebase = Rebase(path.absolute().parent, path.absolute().parent)
    write_table(pa.Table.from_batches(map(rebase, table.to_batches()), table.schema), path)


class _Rows:
    """A batch of a manifest's rows, `first` being the number of the first one in messages."""

    def __init__(self, path: Path, batch: Any, first: int) -> None:
        self.path, self.batch, self.first = path, batch, first

    def checked(self, need_captions: bool) -> Any:
        """Return the batch with every required column of its type. Raises DataError."""
        import numpy as np
        import pyarrow as pa

        self._set("id", self._ids())
        for column, needed in (("path", True), ("caption", need_captions)):
            self._set(column, self._texts(column, needed))
        for column in (name for name, kind in MANIFEST.items() if kind == "int64"):
            numbers = self._numbers(column)
            with np.errstate(invalid="ignore"):  # of NaN and infinity, which are unlike what they become
                counts = numbers.astype("int64")
            self._check(column, (counts >= 1) & (counts == numbers), "a whole number of at least 1")
            self._set(column, pa.array(counts))
        numbers, still = self._numbers("fps"), self.batch["num_frames"].to_numpy() == 1
        numbers[still & (numbers != numbers)] = 0.0
        right = ((numbers > 0) | (still & (numbers == 0))) & (numbers != float("inf"))
        self._check("fps", right, "a number of frames a second above 0 (an image may have 0)")
        self._set("fps", pa.array(numbers))
        return self.batch

    def _set(self, column: str, values: Any) -> None:
        self.batch = self.batch.set_column(self.batch.schema.get_field_index(column), column, values)

    def _column(self, name: str) -> Any:
        import pyarrow as pa

        values = self.batch[name]
        values = values.dictionary_decode() if hasattr(values, "dictionary_decode") else values
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            return values
        try:
            return values.cast(pa.string())
        except pa.ArrowInvalid:
            raise DataError(f"{self.path}: column {name} holds bytes that are no UTF-8 text") from None

    def _ids(self) -> Any:
        import pyarrow as pa

        values = self._column("id")
        if not is_text(values.type):
            values = pa.array([None if is_missing(value) else str(value) for value in values.to_pylist()], pa.string())
        for row in _maybe_missing(values):
            if is_missing(values[row].as_py()):
                raise DataError(f"{self.path}: row {self.first + row}: id is empty")
        return values.cast(pa.string())

    def _texts(self, column: str, needed: bool) -> Any:
        """Return a column of text; what is missing becomes "" where it is not `needed`."""
        import pyarrow as pa

        values, empty = self._column(column), []
        for row in _maybe_missing(values) if is_text(values.type) else range(len(values)):
            value = values[row].as_py()
            where = f"{self.path}: row {self.first + row} (id {self.batch['id'][row].as_py()!r}): {column}"
            if is_missing(value) and needed:
                hint = "; data_tools.caption writes captions" if column == "caption" else ""
                raise DataError(f"{where} is empty or NaN{hint}")
            if is_missing(value):
                empty.append(row)
            elif not isinstance(value, str):
                raise DataError(f"{where} is {value!r}, expected text")
        if empty:
            texts = values.to_pylist()
            for row in empty:
                texts[row] = ""
            values = pa.array(texts, pa.string())
        return values.cast(pa.string())

    def _numbers(self, column: str) -> Any:
        """Return a column as float64 [N], NaN for what is no number."""
        import pandas as pd
        from pyarrow import types

        values = self.batch[column]
        if types.is_integer(values.type) or types.is_floating(values.type):
            return values.cast("float64", safe=False).to_numpy(zero_copy_only=False).copy()
        return pd.to_numeric(values.to_pandas(), errors="coerce").to_numpy("float64", na_value=float("nan")).copy()

    def _check(self, column: str, right: Any, expected: str) -> None:
        if not right.all():
            row = int(right.argmin())
            found = self.batch[column][row].as_py()
            found = float("nan") if found is None else found
            raise DataError(
                f"{self.path}: row {self.first + row} (id {self.batch['id'][row].as_py()!r}): {column} is {found!r}, "
                f"expected {expected}"
            )


def _maybe_missing(values: Any) -> list[int]:
    """Return the rows of a text column that `is_missing` has to look at: few of a million."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Most texts begin with something that can be seen; there are few first letters, whatever the language.
    letters = pc.dictionary_encode(pc.utf8_slice_codeunits(values, 0, 1))
    plain = pa.array([not is_blank(letter) for letter in letters.dictionary.to_pylist()], pa.bool_())
    known = pc.and_not(plain.take(letters.indices), pc.starts_with(values, "nan", ignore_case=True))
    return pc.indices_nonzero(pc.invert(pc.fill_null(known, False))).to_pylist()  # type: ignore[no-any-return]


def check_ids(path: Path, ids: Any) -> None:
    """Raise DataError for an id that two rows have."""
    import numpy as np
    import pyarrow.compute as pc

    # Eight bytes an id rather than a table of them all; those of the same hash alone are compared.
    texts = (chunk.to_numpy(zero_copy_only=False) for chunk in ids.chunks)
    hashes = np.concatenate([np.fromiter(map(hash, chunk), np.int64, len(chunk)) for chunk in texts])
    ordered = np.sort(hashes)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    seen = set()
    for row in np.flatnonzero(np.isin(hashes, again)) if len(again) else ():
        name = ids[row].as_py()
        if name in seen:
            rows = [str(row + 1) for row in pc.indices_nonzero(pc.equal(ids, name)).to_pylist()[:5]]
            raise DataError(f"{path}: id {name!r} is used by rows {', '.join(rows)}; ids must be unique")
        seen.add(name)


# ---- its paths


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
        moved = relative(within(self.old, name), self.new)
        return "" if moved == "." else f"{moved}/"


class Absolute(Rebase):
    """Makes the relative paths of one folder's manifest absolute, for readers that know of no folder."""

    def __init__(self, old: Path) -> None:
        super().__init__(old, old)

    def folder(self, name: str) -> str:
        """Return a folder of the old manifest's from the root on, with its last slash."""
        return os.path.join(os.path.normpath(within(self.old.absolute(), name)), "")


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


def path_from(out: Path, path: Path) -> str:
    """Return a manifest's way of naming a file: relative to the manifest's folder, with /; see `relative`."""
    path = path.absolute()
    folder = _folder_from(str(out.absolute()), str(path.parent))
    return path.name if folder == "." else f"{folder}/{path.name}"


@lru_cache(maxsize=64)
def _folder_from(out: str, folder: str) -> str:
    return relative(Path(folder), Path(out))


# ---- what a tool leaves behind


def reject(identity: str, source: str, stage: str, reason: str, **more: Any) -> Row:
    """Return a row of rejects.parquet; `more` may be path, start_frame and end_frame."""
    return {"id": identity, "source": source, "stage": stage, "reason": one_line(reason), **more}


def write_outcome(out: Path, rows: Iterable[Row], rejects: Iterable[Row], columns: Mapping[str, str]) -> None:
    """Write OUT/rejects.parquet, then OUT/manifest.parquet: where a manifest is, its work is done.

    Each whole or not at all, and left untouched if equal. `columns` are the manifest's, with pyarrow's names of their
    types; what a row lacks is null, what it has besides is left out. Both are read once and never held whole.
    """
    write_rows(out / "rejects.parquet", rejects, REJECTS)
    write_rows(out / "manifest.parquet", rows, columns)


def write_parted(
    out: Path, rows: Callable[[Callable[[Row], None]], Iterable[Row]], columns: Mapping[str, str]
) -> tuple[int, int]:
    """As `write_outcome`, of rows that are told apart as they are read; return how many rows and rejects there are.

    `rows` is given a function that takes the rejects among them.
    """
    schema, kept, refused = schema_of(columns), 0, 0
    with (
        table_writer(out / "manifest.parquet", schema) as write,
        rejects_writer(out / "rejects.parquet") as add,
    ):

        def refuse(row: Row) -> None:
            nonlocal refused
            refused += 1
            add(row)

        for batch in in_batches(rows(refuse)):
            kept += len(batch)
            write(rows_batch(batch, schema))
    return kept, refused


@contextmanager
def rejects_writer(path: Path) -> Iterator[Callable[[Row], None]]:
    """Yield a function that takes rejects one at a time; the file is there at the end of the block, or is not."""
    waiting: list[Row] = []
    with table_writer(path, schema_of(REJECTS)) as write:

        def refuse(row: Row) -> None:
            waiting.append(row)
            if len(waiting) >= BATCH:
                flush()

        def flush() -> None:
            write(rows_batch(waiting, schema_of(REJECTS)))
            waiting.clear()

        yield refuse
        flush()
