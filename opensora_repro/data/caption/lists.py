"""Lists of captions made elsewhere: what the known formats hold, recognised by their columns or keys.

    id, caption                           a caption a clip
    clip_id, caption                      the same, by the clip's id or its file's name
    source, caption, start_*, end_*       a caption a span: frames (half-open) or seconds since the source's start
    videoid, name, ...                    WebVid: a caption a video
    videoID, timestamp, caption, ...      Panda-70M: lists of spans and captions a video
    {video: {clip: {..., scene_split}}}   HD-VG-130M (JSON): a caption a scene, named and within a span of the video

CSV and Parquet, JSON (a list of objects, or an object by id) and JSON lines; `text` will do for `caption`. Rows that
concern no clip at hand are passed over, so a list may be far larger than memory (JSON is read whole). Everything in
them is somebody else's text: nothing is evaluated.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from opensora_repro.data.files import one_line
from opensora_repro.data.manifest import DataError, is_missing, read_names, reading

CHUNK = 1 << 15  # rows
LONGEST_LITERAL = 1 << 22  # characters of a list of spans or captions
FRAME, TIME = "frame", "time"
SUFFIXES = (".csv", ".parquet", ".json", ".jsonl")
FORMATS = "id, caption; source, caption and a span; or those of WebVid, Panda-70M or HD-VG-130M"
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A caption and the part of its source that it describes, in the list's unit."""

    row: int  # counted from 1, for messages
    caption: str  # "" where the list has none
    start: float = 0.0
    end: float = float("inf")


@dataclass
class CaptionList:
    """The entries that concern the clips at hand."""

    path: Path
    by_id: dict[str, Entry] = field(default_factory=dict)
    by_name: dict[str, Entry] = field(default_factory=dict)  # id, or a file's name without folder and suffix
    by_source: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    spans: bool = False  # the list is one of spans
    unit: str = TIME  # of the spans
    stems: bool = False  # sources are named without folder and suffix: a video's id

    def add(self, entries: dict[str, Entry], key: str, entry: Entry) -> None:
        """Add a caption for a key; DataError if it has another one already."""
        first = entries.setdefault(key, entry)
        if first.caption != entry.caption:
            rows = f"rows {first.row} and {entry.row}"
            raise DataError(f"{self.path}: {rows} give id {key!r} different captions")


@dataclass(frozen=True)
class Wanted:
    """What the clips at hand are called in lists."""

    ids: frozenset[str]
    stems: frozenset[str]  # of their files and of their sources
    sources: frozenset[str]  # file names

    @staticmethod
    def of(clips: Iterable[Row]) -> Wanted:
        ids, stems, sources = set(), set(), set()
        for clip in clips:
            ids.add(clip["id"])
            sources.add(PurePosixPath(source_of(clip)).name)
            stems |= {stem(clip["path"]), stem(source_of(clip))}
        return Wanted(frozenset(ids), frozenset(stems), frozenset(sources))

    def named(self, key: str) -> bool:
        return key in self.ids or key in self.stems


def source_of(clip: Row) -> str:
    """Return what a clip was cut from; a manifest without that column lists whole files."""
    source = clip.get("source")
    return clip["path"] if is_missing(source) else str(source)


def stem(name: str) -> str:
    return PurePosixPath(name).stem


def read_list(path: Path, wanted: Wanted) -> CaptionList:
    """Read what a list says of the wanted clips. Raises DataError for a list of no known format, or a wrong row."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{one_line(path)}: expected a folder, or a list ({' '.join(SUFFIXES)})")
    if path.suffix.lower() in (".json", ".jsonl"):
        content = _read_json(path)
        if isinstance(content, dict) and any(isinstance(v, dict) and "clip" in v for v in content.values()):
            return _hd_vg(path, content, wanted)
        rows = _objects(path, content)
        names = sorted({name for row in rows for name in row})
        return _read(path, names, lambda columns: ([row.get(name) for name in columns] for row in rows), wanted)
    return _read(path, read_names(path), lambda columns: _table_rows(path, columns), wanted)


Rows = Callable[[Sequence[str]], Iterable[Sequence[Any]]]


def _read(path: Path, names: Sequence[str], rows: Rows, wanted: Wanted) -> CaptionList:
    """Choose the reader by the columns."""
    if {"videoid", "name"} <= set(names) and "caption" not in names:
        return _web_vid(path, rows, wanted)
    caption = next((name for name in ("caption", "text") if name in names), None)
    if caption is None:
        raise DataError(f"{path}: column caption missing (has {one_line(', '.join(names)) or 'none'})")
    if {"videoID", "timestamp"} <= set(names):
        return _panda(path, rows, wanted)
    for name, by_file in (("id", False), ("clip_id", True)):
        if name in names:
            return _by_key(path, rows((name, caption)), wanted, by_file)
    for unit in (FRAME, TIME):
        columns = ("source", f"start_{unit}", f"end_{unit}")
        if set(columns) <= set(names):
            return _by_span(path, rows((*columns, caption)), wanted, unit)
    raise DataError(f"{path}: expected the columns id, or source with start_frame and end_frame (or times): {FORMATS}")


# ---- formats


def _by_key(path: Path, rows: Iterable[Sequence[Any]], wanted: Wanted, by_file: bool) -> CaptionList:
    found = CaptionList(path)
    for number, (key, caption) in enumerate(rows, start=1):
        if is_missing(key):
            raise DataError(f"{path}: row {number}: id is empty")
        if str(key) in wanted.ids or (by_file and wanted.named(str(key))):
            found.add(found.by_name if by_file else found.by_id, str(key), Entry(number, _text(caption)))
    return found


def _by_span(path: Path, rows: Iterable[Sequence[Any]], wanted: Wanted, unit: str) -> CaptionList:
    found = CaptionList(path, spans=True, unit=unit)
    for number, (source, start, end, caption) in enumerate(rows, start=1):
        if is_missing(source):
            raise DataError(f"{path}: row {number}: source is empty")
        if PurePosixPath(str(source)).name in wanted.sources:
            try:
                entry = Entry(number, _text(caption), float(start), float(end))
            except (TypeError, ValueError):
                text = one_line(f"{start!r}, {end!r}")
                raise DataError(f"{path}: row {number}: start_{unit}, end_{unit} are {text}, no numbers") from None
            if not entry.start < entry.end:
                raise DataError(f"{path}: row {number}: start_{unit} {start} is not before end_{unit} {end}")
            found.by_source[str(source)].append(entry)
    return found


def _web_vid(path: Path, rows: Rows, wanted: Wanted) -> CaptionList:
    found = CaptionList(path, stems=True)
    for number, (video, caption) in enumerate(rows(("videoid", "name")), start=1):
        if wanted.named(str(video)):
            entry = Entry(number, _text(caption))
            found.add(found.by_name, str(video), entry)
            found.by_source[str(video)] = [entry]
    return found


def _panda(path: Path, rows: Rows, wanted: Wanted) -> CaptionList:
    found = CaptionList(path, spans=True, stems=True)
    for number, (video, spans, captions) in enumerate(rows(("videoID", "timestamp", "caption")), start=1):
        if str(video) not in wanted.stems:
            continue
        spans, captions = _literal(spans), _literal(captions)
        if not isinstance(spans, list) or not isinstance(captions, list) or len(spans) != len(captions):
            raise DataError(f"{path}: row {number}: timestamp and caption are no lists of one length")
        for span, caption in zip(spans, captions, strict=True):
            start, end = _seconds(path, number, span)
            found.by_source[str(video)].append(Entry(number, _text(caption), start, end))
    return found


def _hd_vg(path: Path, videos: dict[str, Any], wanted: Wanted) -> CaptionList:
    """Scenes by their name and by their place in the video: frames within a clip, which has a span of the video.

    A video's row is its number in the file; the end -1 stands for the clip's own.
    """
    found = CaptionList(path, spans=True, stems=True)
    for number, (video, content) in enumerate(videos.items(), start=1):
        try:
            for clip in content["clip"].values():
                start, end = _seconds(path, number, clip["span"]) if "span" in clip else (None, None)
                for scene in clip["scene_split"]:
                    first, last = (float(frame) for frame in scene["scene_cut"])
                    entry = Entry(number, _text(scene["caption"]))
                    name = stem(str(scene["clip_id"])) if str(scene["clip_id"]).endswith(".mp4") else scene["clip_id"]
                    if wanted.named(str(name)):
                        found.add(found.by_name, str(name), entry)
                    if video in wanted.stems and start is not None and end is not None:
                        fps = float(clip["fps"])
                        spans = (start, end) if last < 0 else (start + first / fps, start + last / fps)
                        found.by_source[video].append(Entry(number, entry.caption, *spans))
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            if isinstance(error, DataError):
                raise
            where = f"{path}: row {number} (video {one_line(video)})"
            raise DataError(f"{where}: is not as HD-VG-130M's ({type(error).__name__}: {one_line(error)})") from None
    return found


# ---- reading


def _text(value: object) -> str:
    return "" if is_missing(value) else str(value)


def _table_rows(path: Path, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    """Yield the rows of a CSV, all its fields as text, or of a Parquet file, some at a time."""
    import pandas as pd
    import pyarrow.parquet as pq

    with reading(path) as kind:
        if kind == "csv":
            text: dict[str, Any] = {"dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig"}
            for chunk in pd.read_csv(path, usecols=list(columns), chunksize=CHUNK, **text):
                yield from zip(*(chunk[name].tolist() for name in columns), strict=True)
            return
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=CHUNK, columns=list(columns)):
                yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {one_line(error)}") from error


def _objects(path: Path, content: Any) -> list[Row]:
    """Return rows: a list of objects as it is, an object of captions by id as rows of id and caption."""
    if isinstance(content, dict):
        content = [value | {"id": key} if isinstance(value, dict) else {"id": key, "caption": value}
                   for key, value in content.items()]  # fmt: skip
    if not isinstance(content, list) or not content or not all(isinstance(row, dict) for row in content):
        raise DataError(f"{path}: expected a list of objects, or an object of captions by id")
    return content


def _literal(value: Any) -> Any:
    """Return a list that is written as Python writes it; None for what is none."""
    if not isinstance(value, str):
        return value
    if len(value) > LONGEST_LITERAL:
        return None
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _seconds(path: Path, number: int, span: Any) -> tuple[float, float]:
    """Return a span of two times, each H:M:S or seconds."""
    try:
        start, end = (_one_time(time) for time in span)
    except (TypeError, ValueError):
        start = end = 0.0
    if not start < end:
        raise DataError(f"{path}: row {number}: a span is {one_line(str(span)[:80])}, expected two times, H:M:S")
    return start, end


def _one_time(time: Any) -> float:
    seconds = 0.0
    for part in str(time).split(":"):
        seconds = seconds * 60 + float(part)
    return seconds
