"""The manifest: one row a clip, in Parquet or CSV, with the clip's caption, size and lineage.

Required columns: id, path, caption, num_frames, fps, height, width. Optional lineage: source, start_frame, end_frame
(half-open), start_time, end_time (seconds), resplit (true where a boundary is a length limit, not a scene cut). Other
columns are kept. Relative paths are relative to the manifest's folder, `~` is the home folder. An image is a clip of
one frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_repro.config.prompts import is_blank
from opensora_repro.data.tables import Absolute, Rebase, Table, in_batches, is_text, open_table, write_table
from opensora_repro.errors import DataError

COUNT_COLUMNS = ("num_frames", "height", "width")
REQUIRED_COLUMNS = ("id", "path", "caption", "num_frames", "fps", "height", "width")
BATCHES = 16  # of a file, that are a chunk of the table in memory


def read_manifest(path: str | Path, *, need_captions: bool = True) -> Any:
    """Read and check a manifest; return a pyarrow table with absolute paths.

    Texts are strings, counts int64, fps float64; other columns are as they are. Rows in messages are counted from 1,
    the header not counted. `need_captions=False` is for tools that fill captions in: missing ones become "". Clip files
    are not opened here. Raises DataError.
    """
    import pyarrow as pa

    path = Path(path)
    table = open_table(path)
    missing = [name for name in REQUIRED_COLUMNS if name not in table.schema.names]
    if missing:
        raise DataError(
            f"{path}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; "
            f"a manifest needs {', '.join(REQUIRED_COLUMNS)} (has {', '.join(table.schema.names)})"
        )
    # Long chunks, of exactly their size: what a batch's decoding has asked for is up to twice as much as it used.
    parts = in_batches(_checked(table, need_captions), BATCHES)
    checked = pa.concat_tables([pa.Table.from_batches(part).combine_chunks() for part in parts])
    _check_ids(path, checked["id"])
    return checked


def _checked(table: Table, need_captions: bool) -> Iterator[Any]:
    absolute, first = Absolute(table.path.absolute().parent), 1
    for batch in table.batches():
        yield absolute(_Rows(table.path, batch, first).checked(need_captions))
        first += batch.num_rows


def write_manifest(table: Any, path: str | Path) -> None:
    """Write a manifest, whole or not at all; its paths become relative to its own folder."""
    import pyarrow as pa

    path = Path(path)
    rebase = Rebase(path.absolute().parent, path.absolute().parent)
    write_table(pa.Table.from_batches([rebase(batch) for batch in table.to_batches()], table.schema), path)


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
        for column in COUNT_COLUMNS:
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
        values = self.batch[name]
        return values.dictionary_decode() if hasattr(values, "dictionary_decode") else values

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
                raise DataError(f"{where} is empty or NaN")
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


def _check_ids(path: Path, ids: Any) -> None:
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


def is_missing(value: object) -> bool:
    """True for None, NaN, text of which nothing can be seen, and the word "nan" that a NaN leaves in a CSV."""
    if isinstance(value, str):
        return is_blank(value) or value.strip().lower() == "nan"
    return value is None or str(value) in ("nan", "<NA>", "NaT")
