"""Lists of captions made elsewhere: what the known formats hold, recognised by their columns or keys.

    id, caption                           a caption a clip; `clip_id` will do, and a file's name in it
    path (file, video, ...), caption      a caption a file: of a clip, or of a source video, then for all its clips
    source, caption                       a caption a source video, for all its clips
    source, caption, start_*, end_*       a caption a span: frames (half-open) or seconds since the source's start
    path, cap                             Open-Sora-Plan (JSON): a list of captions a video
    videoid, name, ...                    WebVid: a caption a video
    videoID, timestamp, caption, ...      Panda-70M: lists of spans and captions a video
    {video: {clip: {..., scene_split}}}   HD-VG-130M (JSON): a caption a scene, named and within a span of the video

CSV and Parquet, JSON (a list of objects, an object by id, or a table) and JSON lines; capitals in column names do not
count, and `text` and some others will do for `caption`. Of a list of captions the first that is not empty is taken.
Rows that concern no clip at hand are passed over, so a list may be far larger than memory (JSON is read whole).
Everything in them is somebody else's text: nothing is evaluated.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from opensora_repro.data.caption.names import forms_of, is_named
from opensora_repro.data.caption_values import CAPTION_KEYS, scene_span, span_of, texts_in, written_literal
from opensora_repro.data.csv_tables import as_written, csv_names, csv_rows, inert
from opensora_repro.data.tables import Table, in_batches, is_missing, open_table
from opensora_repro.errors import DataError
from opensora_repro.files import one_line, writing

FRAME, TIME = "frame", "time"
SUFFIXES = (".csv", ".tsv", ".parquet", ".json", ".jsonl")
IDS = ("id", "clip_id")
FILES = ("path", "file", "filename", "file_name", "filepath", "file_path", "clip")
VIDEOS = ("source", "video", "video_name", "video_path", "video_id", "videoid", "image")
TEMPLATE_COLUMNS = ("id", "path", "source", "shows", "caption")
FORMATS = "id, caption; source, caption (and a span); or those of WebVid, Panda-70M or HD-VG-130M"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A caption and the part of its source that it describes, in the list's unit."""

    row: int  # counted from 1, for messages
    caption: str  # "" where the list has none
    start: float = 0.0
    end: float = float("inf")


class Entries(Protocol):
    """Entries by keys, such as a dictionary of them."""

    def setdefault(self, key: str, entry: Entry, /) -> Entry: ...


@dataclass
class CaptionList:
    """The entries that concern the clips at hand."""

    path: Path
    whole: Any = field(default_factory=dict)  # `Entries`, by a clip's id, or a clip's or a source's name
    spans: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))  # by a source's name
    unit: str = TIME  # of the spans
    keyed_by: str = "id"  # for messages
    first_of_several: int = 0  # rows with more than one caption

    def add(self, key: str, entry: Entry) -> None:
        """Add a caption for a key; DataError if it has another one already."""
        first = self.whole.setdefault(key, entry)
        if first.caption != entry.caption:
            rows = f"rows {first.row} and {entry.row}"
            raise DataError(f"{self.path}: {rows} give {self.keyed_by} {one_line(repr(key))} different captions")

    def text(self, value: Any, row: int) -> str:
        """Return a row's caption, the first that is not empty where it has several. Raises DataError."""
        try:
            texts = [text for text in texts_in(value) if text.strip()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: row {row}: its caption is {one_line(error)}, expected text") from error
        self.first_of_several += len(texts) > 1
        return as_written(texts[0]) if texts else ""


@dataclass(frozen=True)
class ClipKeys:
    """What the clips at hand are called in lists."""

    ids: frozenset[str]
    forms: frozenset[str]  # of the names of their files and of their sources, and of their ids

    @staticmethod
    def of(clips: Iterable[Row]) -> ClipKeys:
        ids, names = set(), set()
        for clip in clips:
            ids.add(clip["id"])
            names |= {clip["path"], source_of(clip)}
        return ClipKeys(frozenset(ids), frozenset(form for name in ids | names for form in forms_of(name)))

    def named(self, key: str) -> bool:
        return key in self.ids or is_named(key, self.forms)

    def entries(self) -> Entries:
        return {}


class IdEntries:
    """The clips at hand by their ids alone, and the entries for them in a file: ids and 24 bytes a clip are held."""

    def __init__(self, clips: Iterable[Row]) -> None:
        import numpy as np
        import pyarrow as pa

        batches = [pa.array([clip["id"] for clip in batch], pa.string()) for batch in in_batches(clips)]
        self.ids = pa.chunked_array(batches, pa.string())
        hashes = np.fromiter((hash(name) for batch in batches for name in batch.to_pylist()), np.int64, len(self.ids))
        self.order = np.argsort(hashes)
        self.hashes = hashes[self.order]
        self.places = np.full(len(self.ids), -1)
        self.num_found = 0
        self.file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - is gone with this process

    def named(self, key: str) -> bool:
        return self._number(key) >= 0

    def entries(self) -> Entries:
        return self

    def setdefault(self, key: str, entry: Entry) -> Entry:
        number = self._number(key)
        if self.places[number] >= 0:
            self.file.flush()
            return self._read(number)
        self.places[number], self.num_found = self.file.tell(), self.num_found + 1
        text = json.dumps([entry.row, entry.caption]).encode()
        self.file.write(len(text).to_bytes(4, "little") + text)
        return entry

    def __iter__(self) -> Iterator[Entry]:
        """Yield the clips' entries in their order, all of which are there."""
        self.file.flush()
        return map(self._read, range(len(self.ids)))

    def _number(self, key: str) -> int:
        """Return the number of the clip with an id, -1 where there is none."""
        hashed = hash(key)
        at = int(self.hashes.searchsorted(hashed))
        while at < len(self.hashes) and self.hashes[at] == hashed:
            number = int(self.order[at])
            if self.ids[number].as_py() == key:
                return number
            at += 1
        return -1

    def _read(self, number: int) -> Entry:
        handle, place = self.file.fileno(), int(self.places[number])
        length = int.from_bytes(os.pread(handle, 4, place), "little")
        return Entry(*json.loads(os.pread(handle, length, place + 4)))


Ours = ClipKeys | IdEntries


def source_of(clip: Row) -> str:
    """Return what a clip was cut from; a manifest without that column lists whole files."""
    source = clip.get("source")
    return clip["path"] if is_missing(source) else str(source)


def lists_ids(path: Path) -> bool:
    """Whether a table has a column of clips' ids."""
    kind = path.suffix.lower()
    names = csv_names(path) if kind in (".csv", ".tsv") else open_table(path).schema.names if kind == ".parquet" else ()
    return not set(IDS).isdisjoint(map(_plain_name, names))


def read_list(path: Path, ours: Ours) -> CaptionList:
    """Read what a list says of the known clips. Raises DataError for a list of no known format, or a wrong row."""
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        reason = f"expected a folder, or a list ({' '.join(SUFFIXES)}); save a spreadsheet as CSV UTF-8"
        raise DataError(f"{one_line(path)}: {reason}")
    if kind in (".csv", ".tsv"):
        return _read(path, csv_names(path), lambda columns: csv_rows(path, columns), ours)
    if kind == ".parquet":
        table = open_table(path)
        return _read(path, table.schema.names, lambda columns: _table_rows(table, columns), ours)
    content = _read_json(path)
    if isinstance(content, dict) and any(isinstance(v, dict) and _is_hd_vg(v) for v in content.values()):
        return _hd_vg(path, content, ours)
    rows = _objects(path, content)
    names = sorted({name for row in rows for name in row})
    return _read(path, names, lambda columns: ([row.get(name) for name in columns] for row in rows), ours)


Rows = Callable[[Sequence[str]], Iterable[Sequence[Any]]]


def _plain_name(column: str) -> str:
    return "_".join(column.casefold().replace("-", " ").split())


def _read(path: Path, names: Sequence[str], rows: Rows, ours: Ours) -> CaptionList:
    """Choose the reader by the columns, whose names may be written with capitals and spaces."""
    known = {_plain_name(name): name for name in reversed(names)}

    def take(*columns: str) -> Iterable[Sequence[Any]]:
        return rows([known[name] for name in columns])

    if {"videoid", "name"} <= set(known) and "caption" not in known:
        return _by_key(path, take("name", "videoid"), ours, "source")
    caption = next((name for name in (*CAPTION_KEYS, "cap") if name in known), None)
    if caption is None:
        raise DataError(f"{path}: column caption missing (has {one_line(', '.join(names)) or 'none'})")
    if {"videoid", "timestamp"} <= set(known):
        return _panda(path, take("videoid", "timestamp", caption), ours)
    files, videos = ([name for name in names if name in known] for names in (FILES, VIDEOS))
    if identity := next((name for name in IDS if name in known), None):
        return _by_key(path, take(caption, identity, *files, *videos), ours, "id", 1 + len(files))
    spans = {unit: {f"start_{unit}", f"end_{unit}"} & set(known) for unit in (FRAME, TIME)}
    if "source" in known and any(spans.values()):
        unit = next((unit for unit, columns in spans.items() if len(columns) == 2), None)
        if unit is None:
            raise DataError(f"{path}: expected the columns id, or source with both ends of a span: {FORMATS}")
        return _by_span(path, take("source", f"start_{unit}", f"end_{unit}", caption), ours, unit)
    if not files and not videos:
        raise DataError(f"{path}: expected the columns id, or source with its caption: {FORMATS}")
    return _by_key(path, take(caption, *files, *videos), ours, "file" if files else "source")


# ---- formats


def _by_key(path: Path, rows: Iterable[Sequence[Any]], ours: Ours, keyed_by: str, of_clips: int = 0) -> CaptionList:
    """Read rows of a caption and keys, of which the first that is there counts.

    Of the first `of_clips` keys it is the first that is known here: a spreadsheet may spoil an id of digits.
    """
    found = CaptionList(path, ours.entries(), keyed_by=keyed_by)
    for number, (caption, *values) in enumerate(rows, start=1):
        names = [as_written(_name(path, number, value)) for value in values]
        keys = [name for name in names[:of_clips] if name] or [name for name in names[of_clips:] if name][:1]
        if not keys:
            raise DataError(f"{path}: row {number}: {keyed_by} is empty")
        if key := next((key for key in keys if ours.named(key)), None):
            found.add(key, Entry(number, found.text(caption, number)))
    return found


def _by_span(path: Path, rows: Iterable[Sequence[Any]], ours: Ours, unit: str) -> CaptionList:
    """Read captions of spans; one without a span is of all its source."""
    found = CaptionList(path, unit=unit, keyed_by="source")
    for number, (value, start, end, caption) in enumerate(rows, start=1):
        source = as_written(_name(path, number, value))
        if not source:
            raise DataError(f"{path}: row {number}: source is empty")
        if not ours.named(source):
            continue
        text = found.text(caption, number)
        if is_missing(start) and is_missing(end):
            found.add(source, Entry(number, text))
            continue
        try:
            entry = Entry(number, text, float(start), float(end))
        except (TypeError, ValueError):
            ends = one_line(f"{start!r}, {end!r}")
            raise DataError(f"{path}: row {number}: start_{unit}, end_{unit} are {ends}, no numbers") from None
        if not entry.start < entry.end:
            raise DataError(f"{path}: row {number}: start_{unit} {start} is not before end_{unit} {end}")
        found.spans[source].append(entry)
    return found


def _panda(path: Path, rows: Iterable[Sequence[Any]], ours: Ours) -> CaptionList:
    found = CaptionList(path, keyed_by="source")
    for number, (value, spans, captions) in enumerate(rows, start=1):
        video = _name(path, number, value)
        if not ours.named(video):
            continue
        spans, captions = written_literal(spans), written_literal(captions)
        if spans is None or captions is None or len(spans) != len(captions):
            raise DataError(f"{path}: row {number}: timestamp and caption are no lists of one length")
        for span, caption in zip(spans, captions, strict=True):
            start, end = _span(path, number, span)
            found.spans[video].append(Entry(number, found.text(caption, number), start, end))
    return found


def _is_hd_vg(video: dict[str, Any]) -> bool:
    return isinstance(video.get("clip"), dict)


def _hd_vg(path: Path, videos: dict[str, Any], ours: Ours) -> CaptionList:
    """Scenes by their name and by their place in the video: frames within a clip, which has a span of the video.

    A video's row is its number in the file; the end -1 stands for the clip's own.
    """
    found = CaptionList(path, keyed_by="source")
    for number, (video, content) in enumerate(videos.items(), start=1):
        try:
            for clip in content["clip"].values():
                span = _span(path, number, clip["span"]) if "span" in clip else None
                for scene in clip["scene_split"]:
                    entry, name = Entry(number, found.text(scene["caption"], number)), str(scene["clip_id"])
                    if ours.named(name):
                        found.add(name, entry)
                    if ours.named(video) and span is not None:
                        times = scene_span(span, scene["scene_cut"], float(clip["fps"]))
                        found.spans[video].append(Entry(number, entry.caption, *times))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, DataError):
                raise
            where = f"{path}: row {number} (video {one_line(video)})"
            raise DataError(f"{where}: is not as HD-VG-130M's ({type(error).__name__}: {one_line(error)})") from None
    return found


# ---- reading


def _name(path: Path, row: int, value: object) -> str:
    """Return an id or a name as text, "" for none; of an object its path, as `datasets` has it. Raises DataError."""
    if isinstance(value, dict):
        value = next((value[name] for name in FILES if isinstance(value.get(name), str)), value)
    if isinstance(value, dict | list):
        raise DataError(f"{path}: row {row}: its key is {one_line(str(value)[:80])}, expected text")
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(f"{path}: row {row}: its key is no UTF-8 text") from None
    return "" if is_missing(value) else str(value).strip()


def _table_rows(table: Table, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    for batch in table.batches(list(columns)):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _read_json(path: Path) -> Any:
    """Return a JSON file's content, of lines of JSON a list. In a text, control characters may stand as they are."""
    try:
        data = path.read_bytes()
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if wide else "utf-8-sig")
        with suppress(json.JSONDecodeError):  # one value, or one a line, whatever the file is called
            content = json.loads(text, strict=False)
            return [content] if path.suffix.lower() == ".jsonl" and isinstance(content, dict) else content
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {one_line(error)}") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # other line breaks may stand in a caption
        try:
            rows += [json.loads(line, strict=False)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: line {number}: cannot be read as JSON: {one_line(error)}") from error
    return rows


def _objects(path: Path, content: Any) -> list[Row]:
    """Return rows: a list of objects as it is, an object of captions by id as rows of id and caption.

    Of an object that holds lists of objects, such as {"data": [...]}, it is the one that names and captions videos. An
    object may also be a table: of columns, or of rows that it only counts.
    """
    if isinstance(content, dict):
        content = next((rows for rows in content.values() if _names_and_captions(rows)), content)
    if isinstance(content, dict):
        content = _of_columns(content) if _knows_both(content) else content
    if isinstance(content, dict) and list(content) == list(map(str, range(len(content)))):
        content = list(content.values()) if all(_knows_both(value) for value in content.values()) else content
    if isinstance(content, dict):
        content = [value | {"id": key} if isinstance(value, dict) else {"id": key, "caption": value}
                   for key, value in content.items()]  # fmt: skip
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path}: expected a list of objects, or an object of captions by id")
    return content


def _names_and_captions(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and _knows_both(rows[0])


def _knows_both(row: Any) -> bool:
    """Whether an object has a name of a video's and a caption among its keys."""
    return isinstance(row, dict) and not any(row.keys().isdisjoint(k) for k in (CAPTION_KEYS, {*IDS, *FILES, *VIDEOS}))


def _of_columns(columns: Row) -> Any:
    """Return the rows of an object of columns, lists or objects with the same keys; what is none as it is."""
    values = [list(c.values()) if isinstance(c, dict) else c for c in columns.values()]
    if not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return [columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _span(path: Path, number: int, span: Any) -> tuple[float, float]:
    try:
        return span_of(span)
    except (TypeError, ValueError):
        told = one_line(str(span)[:80])
        raise DataError(f"{path}: row {number}: a span is {told}, expected two times, H:M:S") from None


def write_template(path: Path, clips: Sequence[dict[str, Any]]) -> int:
    """Write a list to be filled in by hand, a CSV that a spreadsheet opens; returns how many captions are still empty.

    The captions that there are already stand in it. Raises DataError.
    """
    if path.suffix.lower() != ".csv":
        raise DataError(f"--template {one_line(path)}: expected the name of a .csv file")
    if path.exists():
        reason = "is there already, perhaps filled in: pass it to --sidecar, or choose another name"
        raise DataError(f"--template {one_line(path)}: {reason}")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(TEMPLATE_COLUMNS)
    folder = path.absolute().parent
    for clip in clips:
        place = os.path.relpath(clip["path"], folder)
        row = (clip["id"], place, source_of(clip), _shows(clip), " ".join(clip["caption"].split()))
        writer.writerow([inert(str(value)) for value in row])
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8-sig", "backslashreplace"))  # without the mark Excel takes another code
    return sum(not clip["caption"].strip() for clip in clips)


def _shows(clip: dict[str, Any]) -> str:
    """Return "0:01:04.0 to 0:01:09.5, 1280x720": what part of the source a clip is."""
    size = f"{clip['width']}x{clip['height']}"
    if clip["num_frames"] == 1:
        return f"picture, {size}"
    start, end = clip.get("start_time"), clip.get("end_time")
    if is_missing(start) or is_missing(end):
        return f"{clip['num_frames'] / (clip['fps'] or 1):.1f} seconds, {size}"
    return f"{_clock(float(start))} to {_clock(float(end))}, {size}"  # type: ignore[arg-type]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds, 1), 60)
    return f"{int(minutes) // 60}:{int(minutes) % 60:02d}:{seconds:04.1f}"
