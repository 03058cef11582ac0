"""The list of captions to be filled in by hand: a CSV that a spreadsheet opens, a row a clip."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_repro.data.caption.lists import source_of
from opensora_repro.data.csv_rows import inert
from opensora_repro.data.manifest import is_missing
from opensora_repro.errors import DataError
from opensora_repro.files import one_line, writing

COLUMNS = ("id", "path", "source", "shows", "caption")


def write_template(path: Path, clips: Sequence[dict[str, Any]]) -> int:
    """Write the list, with the captions that there are already; returns how many are still empty. Raises DataError."""
    if path.suffix.lower() != ".csv":
        raise DataError(f"--template {one_line(path)}: expected the name of a .csv file")
    if path.exists():
        reason = "is there already, perhaps filled in: pass it to --sidecar, or choose another name"
        raise DataError(f"--template {one_line(path)}: {reason}")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    folder = path.absolute().parent
    for clip in clips:
        place = os.path.relpath(clip["path"], folder)
        row = (clip["id"], place, source_of(clip), shown(clip), " ".join(clip["caption"].split()))
        writer.writerow([inert(str(value)) for value in row])
    with writing(path) as file:
        file.write(text.getvalue().encode("utf-8-sig", "backslashreplace"))  # without the mark Excel takes another code
    return sum(not clip["caption"].strip() for clip in clips)


def shown(clip: dict[str, Any]) -> str:
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
