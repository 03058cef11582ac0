"""Which caption of a list, or of the files beside, belongs to which clip: by key or by span, never by order."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from opensora_repro.data.caption.lists import FRAME, CaptionList, Entry, Row, Wanted, read_list, source_of, stem
from opensora_repro.data.caption.text import EMPTY, Caption, judged
from opensora_repro.data.files import one_line
from opensora_repro.data.manifest import DataError, is_missing

SLACK = 0.1  # share of a clip that may reach into a neighbouring span: cuts are found to within a frame or two
TEXT_FILES = (".txt", ".json")  # the first that is there
LARGEST_FILE = 1 << 20  # bytes
KEYS = ("caption", "text", "description", "captions", "texts")  # of a JSON object, the first that is there


def captions_of(sidecar: Path, clips: Sequence[Row]) -> list[Caption]:
    """Return every clip's caption, or the reason why it has none. Raises DataError."""
    if sidecar.is_dir():
        files = SidecarFiles(sidecar, clips)
        return [files.caption(clip) for clip in clips]
    if not sidecar.exists():
        raise DataError(f"{one_line(sidecar)}: no such file or folder")
    listed = read_list(sidecar, Wanted.of(clips))
    return [caption_from(listed, clip) for clip in clips]


def without(reason: str) -> Caption:
    return Caption(reason=reason)


# ---- lists


def caption_from(listed: CaptionList, clip: Row) -> Caption:
    """Return a clip's caption from a list, by its key if the list has it, else by its span of the source."""
    entry = listed.by_id.get(clip["id"])
    for key in (clip["id"], stem(clip["path"])):
        entry = entry or listed.by_name.get(key)
    if entry:
        return checked(entry)
    if not listed.by_source:
        return without(f"no caption for this {'source' if listed.spans else 'id'}")
    entries = listed.by_source.get(resolve(clip, listed) or "", [])
    span = span_of(clip, listed.unit)
    if span is None:
        return without(f"the manifest has no start_{listed.unit} and end_{listed.unit} of it")
    return match(entries, *span)


def checked(entry: Entry) -> Caption:
    caption = judged(entry.caption)
    if caption.flag == EMPTY:
        return Caption(flag=EMPTY, reason=f"its caption (row {entry.row} of the list) is empty")
    return caption


def span_of(clip: Row, unit: str) -> tuple[float, float] | None:
    """Return the clip's part of its source, all of it for a whole file; None where the manifest does not tell."""
    start, end = clip.get(f"start_{unit}"), clip.get(f"end_{unit}")
    if not is_missing(start) and not is_missing(end):
        return float(start), float(end)  # type: ignore[arg-type]
    if stem(source_of(clip)) != stem(clip["path"]):
        return None
    return 0.0, clip["num_frames"] if unit == FRAME else clip["num_frames"] / (clip["fps"] or 1.0)


def resolve(clip: Row, listed: CaptionList) -> str | None:
    """Return the list's name of a clip's source: the same, or else the only one with the same file name."""
    source = source_of(clip)
    if listed.stems:
        return stem(source)
    if source in listed.by_source:
        return source
    same_name = [name for name in listed.by_source if os.path.basename(name) == os.path.basename(source)]
    return same_name[0] if len(same_name) == 1 else None


def match(entries: list[Entry], start: float, end: float) -> Caption:
    """Return the caption of the entry that holds the clip's middle."""
    middle = (start + end) / 2
    holding = [e for e in entries if e.start <= middle < e.end]
    touched = [e for e in entries if min(e.end, end) - max(e.start, start) > SLACK * (end - start)]
    if not entries:
        return without("no caption for this source")
    if not holding:
        return without("no caption's span holds its middle")
    if len(holding) > 1 or len(touched) > 1:
        rows = sorted({e.row for e in holding + touched})
        plural = f"rows {', '.join(map(str, rows))}" if len(rows) > 1 else f"row {rows[0]}"
        return without(f"reaches over several captioned spans ({plural} of the list)")
    return checked(holding[0])


# ---- a file a clip


class SidecarFiles:
    """Text and JSON files, each with one clip's caption.

    Looked for in this order: in the folder by the clip's id; in the folder at the place that the source has in INPUT
    (a whole file's); beside the clip; in the folder by the clip's file name, if no other clip has it. Names are looked
    up among the files that are there, so no id can lead out of the folder.
    """

    def __init__(self, folder: Path, clips: Sequence[Row]) -> None:
        self.folder = folder
        self.places: dict[str, Path] = {}  # by path from the folder, without suffix
        self.names: dict[str, list[str]] = defaultdict(list)  # the places, by name alone
        for suffix in TEXT_FILES:
            for path in sorted(folder.rglob(f"*{suffix}")):
                place = path.relative_to(folder).with_suffix("").as_posix()
                if self.places.setdefault(place, path) is path:
                    self.names[path.stem].append(place)
        self.clips_named = Counter(stem(clip["path"]) for clip in clips)

    def caption(self, clip: Row) -> Caption:
        """Return a clip's caption."""
        name = stem(clip["path"])
        whole = stem(source_of(clip)) == name
        place = (PurePosixPath(source_of(clip)).parent / name).as_posix() if whole else ""
        found = self.by_name(clip["id"]) or self.places.get(place) or beside_clip(clip["path"])
        if found is None and name in self.names and self.clips_named[name] > 1:
            return without(f"{self.clips_named[name]} clips are called {name}; name its sidecar file by its id")
        found = found or self.by_name(name)
        if found is None:
            several = self.names.get(clip["id"]) or self.names.get(name)
            if several:
                return without(f"several sidecar files for it: {', '.join(several[:3])}")
            return without(f"no file {name}.txt or {name}.json for it")
        return read_sidecar(found)

    def by_name(self, name: str) -> Path | None:
        places = self.names.get(name, [])
        return self.places[places[0]] if len(places) == 1 else None


def beside_clip(path: str) -> Path | None:
    folder, name = os.path.split(path)
    names = _names_in(folder)
    found = (f"{stem(name)}{suffix}" for suffix in TEXT_FILES)
    return next((Path(folder, candidate) for candidate in found if candidate in names), None)


@lru_cache(maxsize=16)
def _names_in(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def read_sidecar(path: Path) -> Caption:
    """Return the caption that a file holds."""
    try:
        if not path.is_file():
            return without(f"{path.name}: no regular file")
        if path.stat().st_size > LARGEST_FILE:
            return without(f"{path.name}: larger than a caption ({path.stat().st_size} bytes)")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return without(f"{path.name}: no UTF-8 text")
    except OSError as error:
        return without(f"{path.name}: {error.strerror}")
    if path.suffix == ".json":
        try:
            text = _in_json(json.loads(text))
        except (ValueError, RecursionError):
            return without(f"{path.name}: no JSON, or none of the keys {', '.join(KEYS)} in it")
    caption = judged(text)
    return Caption(flag=EMPTY, reason=f"its caption ({path.name}) is empty") if caption.flag == EMPTY else caption


def _in_json(content: Any) -> str:
    """Return the caption of an object, text, or the first that is not empty of a list. Raises ValueError."""
    if isinstance(content, list):
        return next((text for text in map(_in_json, content) if text.strip()), "")
    if isinstance(content, dict):
        return _in_json(next((content[key] for key in KEYS if content.get(key)), _absent(content)))
    if not isinstance(content, str):
        raise ValueError("no text")
    return content


def _absent(content: dict[str, Any]) -> Any:
    return "" if any(key in content for key in KEYS) else None
