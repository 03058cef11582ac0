"""The manifest: one row a clip, in Parquet or CSV, with the clip's caption, size and lineage.

Required columns: id, path, caption, num_frames, fps, height, width. Optional lineage: source, start_frame, end_frame
(half-open), start_time, end_time (seconds), resplit (true where a boundary is a length limit, not a scene cut). Other
columns are kept. Relative paths are relative to the manifest's folder. An image is a clip of one frame.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config.prompts import is_blank
from opensora_repro.errors import DataError
from opensora_repro.files import writing

if TYPE_CHECKING:
    import pandas as pd

TEXT_COLUMNS = ("id", "path", "caption")
COUNT_COLUMNS = ("num_frames", "height", "width")
REQUIRED_COLUMNS = ("id", "path", "caption", "num_frames", "fps", "height", "width")


def read_manifest(path: str | Path, *, need_captions: bool = True) -> pd.DataFrame:
    """Read and check a manifest; return a frame with absolute paths and a fresh index.

    Rows in messages are counted from 1, the header not counted. `need_captions=False` is for tools that fill captions
    in: missing ones become "". Clip files are not opened here. Raises DataError.
    """
    path = Path(path)
    frame = read_table(path)
    missing = [name for name in REQUIRED_COLUMNS if name not in frame.columns]
    if missing:
        raise DataError(
            f"{path}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing; "
            f"a manifest needs {', '.join(REQUIRED_COLUMNS)} (has {', '.join(map(str, frame.columns)) or 'none'})"
        )
    if frame.empty:
        raise DataError(f"{path}: the manifest is empty (a header but no rows)")
    frame = frame.reset_index(drop=True)
    _check_ids(path, frame)
    _check_texts(path, frame, need_captions)
    _check_numbers(path, frame)
    folder = os.fspath(path.absolute().parent)
    frame["path"] = [
        os.path.normpath(name if name.startswith("/") else f"{folder}/{name}") for name in frame["path"].tolist()
    ]
    return frame


def write_manifest(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a manifest, whole or not at all; its paths become relative to its own folder."""
    path = Path(path)
    folder = path.absolute().parent
    frame = frame.copy()
    if "path" in frame.columns:
        frame["path"] = [os.path.relpath(folder / name, folder) for name in frame["path"]]
    write_table(frame, path)


def read_table(path: Path) -> pd.DataFrame:
    """Read a Parquet or CSV file, by its extension; the text columns of a CSV stay text. Raises DataError."""
    import pandas as pd

    from opensora_repro.data.csv_rows import check_csv

    if table_kind(path) == "csv":
        check_csv(path)  # pandas shifts or cuts a first row that is too long
    with reading(path) as kind:
        if kind == "parquet":
            return pd.read_parquet(path, engine="pyarrow")
        text = dict.fromkeys((*TEXT_COLUMNS, "source"), str)
        # Only an empty field is missing: "NA" or "None" may be somebody's id.
        return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""], encoding="utf-8-sig")


def read_names(path: Path) -> list[str]:
    """Return the names of a table's columns without reading its rows. Raises DataError."""
    import pandas as pd
    import pyarrow.parquet as pq

    with reading(path) as kind:
        if kind == "parquet":
            return list(pq.read_schema(path).names)
        return [str(name) for name in pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns]


@contextmanager
def reading(path: Path) -> Iterator[str]:
    """Yield "parquet" or "csv"; whatever goes wrong in the block becomes a DataError that names the file."""
    kind = table_kind(path)
    try:
        yield kind
    except (OSError, ValueError) as error:  # pandas' and pyarrow's own errors derive from these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read as {kind}: {reason}") from error


def table_kind(path: Path) -> str:
    """Return "parquet" or "csv" for a table that is there, by its extension. Raises DataError."""
    kind = kind_by_name(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected a .parquet or .csv file")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    return kind


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as Parquet or CSV by the extension, whole or not at all; an equal file is left untouched."""
    kind = kind_by_name(path)
    with writing(path) as file:
        if kind == "parquet":
            frame.to_parquet(file, engine="pyarrow", index=False)
        else:
            file.write(frame.to_csv(index=False).encode("utf-8"))


def kind_by_name(path: Path) -> str:
    """Return "parquet" or "csv", by the extension alone. Raises DataError."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("parquet", "csv"):
        raise DataError(f"{path}: expected a .parquet or .csv file")
    return kind


def _check_ids(path: Path, frame: pd.DataFrame) -> None:
    for row, value in _not_plain(frame["id"].tolist()):
        if is_missing(value):
            raise DataError(f"{path}: row {row + 1}: id is empty")
    frame["id"] = frame["id"].astype(str)
    repeated = frame.index[frame["id"].duplicated()]
    if len(repeated):
        name = frame.at[repeated[0], "id"]
        rows = [str(i + 1) for i in frame.index[frame["id"] == name]]
        raise DataError(f"{path}: id {name!r} is used by rows {', '.join(rows[:5])}; ids must be unique")


def _check_texts(path: Path, frame: pd.DataFrame, need_captions: bool) -> None:
    for column in ("path", "caption"):
        values = frame[column].tolist()
        odd = _not_plain(values)
        for row, value in odd:
            where = f"{path}: row {row + 1} (id {frame.at[row, 'id']!r}): {column}"
            if not is_missing(value):
                raise DataError(f"{where} is {value!r}, expected text")
            if column == "path" or need_captions:
                raise DataError(f"{where} is empty or NaN")
            values[row] = ""
        if odd:
            frame[column] = values


def _not_plain(values: list[Any]) -> list[tuple[int, Any]]:
    """Return index and value of whatever is no text, or text that says that it is missing: few of a million."""
    # Most texts are known by their first letter: a manifest of a million rows is read in seconds.
    return [
        (row, value)
        for row, value in enumerate(values)
        if not isinstance(value, str) or ((not value[:1].isalnum() or value[0] in "nN") and is_missing(value))
    ]


def _check_numbers(path: Path, frame: pd.DataFrame) -> None:
    import pandas as pd

    for column in (*COUNT_COLUMNS, "fps"):
        numbers = pd.to_numeric(frame[column], errors="coerce").astype("float64")
        if column == "fps":
            numbers = numbers.mask(numbers.isna() & (frame["num_frames"] == 1), 0.0)
            wrong = ~((numbers > 0) | ((frame["num_frames"] == 1) & (numbers == 0))) | (numbers == float("inf"))
            wanted = "a number of frames a second above 0 (an image may have 0)"
        else:
            wrong = ~((numbers >= 1) & (numbers % 1 == 0))
            wanted = "a whole number of at least 1"
        if wrong.any():
            at = int(wrong.to_numpy().argmax())
            found = frame[column].tolist()[at]
            raise DataError(
                f"{path}: row {at + 1} (id {frame.at[at, 'id']!r}): {column} is {found!r}, expected {wanted}"
            )
        frame[column] = numbers if column == "fps" else numbers.astype("int64")


def is_missing(value: object) -> bool:
    """True for None, NaN, text of which nothing can be seen, and the word "nan" that a NaN leaves in a CSV."""
    if isinstance(value, str):
        return is_blank(value) or value.strip().lower() == "nan"
    return value is None or str(value) in ("nan", "<NA>", "NaT")
