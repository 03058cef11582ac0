"""Tables of clips, with a `path` or as Open-Sora's CSVs without a header, and of parts of videos not yet downloaded.

The latter are Panda-70M's CSV and HD-VG-130M's JSON. One row a part: id, url, caption, source (the video's own id),
start_time and end_time in seconds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_repro.data.caption_values import scene_span, span_of, written_literal
from opensora_repro.data.convert.source import InputRows, Refuse, refusal
from opensora_repro.data.manifest import LINEAGE, MANIFEST
from opensora_repro.data.tables import Row, Table, open_table, schema_of
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

# Open-Sora 1.0 writes the first three; its successors write all of them, under a header.
OPENSORA_COLUMNS = ("path", "caption", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution")
OPENSORA_WIDTHS = (2, 3, len(OPENSORA_COLUMNS))
COLUMNS = {
    "id": "string", "url": "string", "caption": "string", "source": "string", "start_time": "double",
    "end_time": "double", "matching_score": "double",
}  # fmt: skip
PANDA_COLUMNS = ("videoID", "url", "timestamp", "caption")  # and matching_score
CHUNK = 1 << 22  # characters


def open_clip_table(path: Path) -> InputRows:
    """Open a table with at least a `path` column; `text` stands in for a missing `caption`. Raises DataError."""
    table = open_table(path)
    if "path" not in table.schema.names:
        raise DataError(f"{path}: column path missing (has {', '.join(map(one_line, table.schema.names))})")
    return _source(table, "text" if "caption" not in table.schema.names else "caption")


def open_opensora_csv(path: Path) -> InputRows:
    """Open a CSV without a header: path, caption, and what may follow. Raises DataError."""
    width = len(first_record(path))
    if width not in OPENSORA_WIDTHS:
        names = ", ".join(OPENSORA_COLUMNS)
        raise DataError(f"{path}: {width} columns, expected 2, 3 or {len(OPENSORA_COLUMNS)} without a header: {names}")
    return _source(open_table(path, names=OPENSORA_COLUMNS[:width]), "caption")


def first_record(path: Path) -> list[str]:
    """Return the first line's fields, [] for an empty file. Raises DataError for what is no text."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as csv: {one_line(error)}") from error


def _source(table: Table, caption: str) -> InputRows:
    import pyarrow as pa

    known = {**MANIFEST, **{name: kind for name, kind in LINEAGE.items() if name in table.schema.names}}
    others = [field for field in table.schema if field.name not in (*known, caption)]
    schema = pa.schema([*schema_of(known), *others])

    def batches(refuse: Refuse) -> Iterator[Any]:
        seen = 0
        for batch in table.batches():
            yield _with_paths(_typed(table.path, batch, schema, known, caption), seen, refuse)
            seen += batch.num_rows

    return InputRows(table.path.absolute().parent, schema, batches, table.num_rows)


def _typed(path: Path, batch: Any, schema: Any, known: dict[str, str], caption: str) -> Any:
    """Return the batch with the columns of `schema`; those it lacks are null. Raises DataError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for field in schema:
        name = caption if field.name == "caption" else field.name
        at = batch.schema.get_field_index(name)
        if at < 0:
            column = pa.nulls(batch.num_rows, field.type)
            columns.append(column.fill_null("") if field.name == "caption" else column)
            continue
        column = batch.column(at)
        try:
            column = column.cast(field.type) if field.name in known else column
        except pa.ArrowException as error:
            raise DataError(f"{path}: column {name}, expected {field.type}: {one_line(error)}") from error
        if field.name in ("id", "caption"):
            column = pc.utf8_trim_whitespace(column)
        columns.append(pc.fill_null(column, "") if field.name == "caption" else column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _with_paths(batch: Any, before: int, refuse: Refuse) -> Any:
    """Leave out the rows without a path."""
    import pyarrow.compute as pc

    paths = batch.column("path")
    good = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(paths), ""), False)
    if pc.all(good).as_py() is not False:
        return batch
    for at in pc.indices_nonzero(pc.invert(good)).to_pylist():
        refuse(refusal(batch.column("id")[at].as_py() or "", f"row {before + at + 1}: path is empty"))
    return batch.filter(good)


# ---- parts of videos that are still to be downloaded


def panda_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Yield the parts of a Panda-70M table: a row a video, with lists written as Python does. Raises DataError."""
    table = open_table(path)
    if missing := [name for name in PANDA_COLUMNS if name not in table.schema.names]:
        raise DataError(f"{path}: column {missing[0]} missing; Panda-70M has {', '.join(PANDA_COLUMNS)}")
    for number, row in enumerate(table.rows(), start=1):
        video = str(row["videoID"] or "")
        try:
            yield from _panda_parts(video, row)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            refuse(refusal(video, f"row {number}: {error}"))


def _panda_parts(video: str, row: Row) -> list[Row]:
    spans, captions = _list(row, "timestamp"), _list(row, "caption")
    scores = _list(row, "matching_score") if row.get("matching_score") else [None] * len(spans)
    if not video or not row["url"]:
        raise ValueError("videoID or url is empty")
    if not len(spans) == len(captions) == len(scores):
        raise ValueError(f"{len(spans)} timestamps, {len(captions)} captions, {len(scores)} scores")
    parts = []
    for span, caption, score in zip(spans, captions, scores, strict=True):
        part = _part(video, row["url"], str(caption), *span_of(span))
        parts.append({**part, "matching_score": None if score is None else float(score)})
    return parts


def _list(row: Row, name: str) -> list[Any]:
    found = written_literal(row[name])
    if found is None:
        raise ValueError(f"{name}: expected a list")
    return found


def hdvg_rows(paths: list[Path], refuse: Refuse) -> Iterator[Row]:
    """Yield the scenes of HD-VG-130M's JSON files: videos, their clips, and these clips' scenes. Raises DataError."""
    for path in paths:
        for number, video in enumerate(json_elements(path), start=1):
            if not isinstance(video, dict) or not isinstance(video.get("clip"), dict):
                raise DataError(f"{path}: entry {number}: expected a video with `url` and `clip`")
            for name, clip in video["clip"].items():
                try:
                    yield from _hdvg_scenes(name, clip, video["url"])
                except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
                    refuse(refusal(name, f"entry {number} of {path.name}: {type(error).__name__}: {error}"))


def _hdvg_scenes(name: str, clip: dict[str, Any], url: str) -> list[Row]:
    """Return a clip's scenes; their frames count from the clip's start, -1 is its end."""
    video = name.removesuffix(".mp4").rpartition(".")[0]
    span, scenes = span_of(clip["span"]), []
    for scene in clip["scene_split"]:
        times = span_of(scene_span(span, scene["scene_cut"], float(clip["fps"])))
        scenes.append({**_part(video, url, str(scene["caption"]), *times), "id": str(scene["clip_id"])})
    return scenes


def _part(video: str, url: str, caption: str, start: float, end: float) -> Row:
    identity = f"{video}-{round(1000 * start):08d}-{round(1000 * end):08d}"
    times = {"start_time": round(start, 6), "end_time": round(end, 6)}
    return {"id": identity, "url": str(url), "caption": caption, "source": video, **times}


def json_elements(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list, the values of a JSON object, or a value a line, one at a time. DataError."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        buffer, at, grow = file.read(CHUNK), 0, CHUNK
        opening = buffer.lstrip()[:1]
        nested = opening == "[" or (opening == "{" and not _is_lines(buffer))
        at = buffer.index(opening) + 1 if nested else 0
        while True:
            at = _skip(buffer, at, " \t\r\n,")
            try:
                if nested and buffer[at : at + 1] in ("]", "}"):
                    return
                start = at
                if nested and opening == "{":
                    _, start = decoder.raw_decode(buffer, at)
                    start = _skip(buffer, start, " \t\r\n:")
                value, end = decoder.raw_decode(buffer, start)
                if end == len(buffer) and nested:  # a number may go on in the next chunk
                    raise ValueError
            except (ValueError, RecursionError) as error:
                more = file.read(grow)
                if not more:
                    if not nested and at == len(buffer):
                        return
                    raise DataError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
                buffer, at, grow = buffer[at:] + more, 0, 2 * grow  # doubling: a long entry is not parsed over and over
                continue
            yield value
            at = end
            if grow > CHUNK or at > CHUNK:
                buffer, at, grow = buffer[at:], 0, CHUNK


def _is_lines(buffer: str) -> bool:
    """Whether the first line is an entry by itself."""
    try:
        return "clip" in json.loads(buffer.lstrip().split("\n", 1)[0])
    except ValueError:
        return False


def _skip(buffer: str, at: int, characters: str) -> int:
    while at < len(buffer) and buffer[at] in characters:
        at += 1
    return at
