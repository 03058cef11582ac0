"""Panda-70M and HD-VG-130M: captions of parts of videos that are still to be downloaded.

One row a part: id, url, caption, source (the video's own id), start_time and end_time in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opensora_repro.data.caption_values import scene_span, span_of, written_literal
from opensora_repro.data.convert.source import Refuse, refusal
from opensora_repro.data.tables import Row, open_table
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

COLUMNS = {
    "id": "string", "url": "string", "caption": "string", "source": "string", "start_time": "double",
    "end_time": "double", "matching_score": "double",
}  # fmt: skip
PANDA_COLUMNS = ("videoID", "url", "timestamp", "caption")  # and matching_score
CHUNK = 1 << 22  # characters


def panda_rows(path: Path, refuse: Refuse) -> Iterator[Row]:
    """Yield the parts of a Panda-70M table: a row a video, with lists written as Python does. Raises DataError."""
    table = open_table(path)
    if missing := [name for name in PANDA_COLUMNS if name not in table.schema.names]:
        raise DataError(f"{path}: column {missing[0]} missing; Panda-70M has {', '.join(PANDA_COLUMNS)}")
    number = 0
    for batch in table.batches():
        for row in batch.to_pylist():
            number += 1
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
