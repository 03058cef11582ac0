"""Which caption of a list, or of the files beside, belongs to which clip: by key or by span, never by order."""

from __future__ import annotations

import json
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath

from opensora_repro.data.caption.lists import (
    FRAME,
    CaptionList,
    ClipKeys,
    Entry,
    IdEntries,
    Row,
    lists_ids,
    read_list,
    source_of,
)
from opensora_repro.data.caption.names import SHOWN, Found, NameIndex
from opensora_repro.data.caption.text import EMPTY, Caption, judged
from opensora_repro.data.caption_values import CAPTION_KEYS, texts_in
from opensora_repro.data.tables import Again, is_missing
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

SLACK = 0.1  # share of a clip that may reach into a neighbouring span: cuts are found to within a frame or two
TEXT_FILES = (".txt", ".json")  # the first that is there
LARGEST_FILE = 1 << 20  # bytes


def captions_of(sidecar: Path, clips: Iterable[Row]) -> Iterable[Caption]:
    """Return every clip's caption, or the reason why it has none. Raises DataError.

    Neither clips nor captions are held, and of a table that has the ids of all clips no names; of other lists what
    concerns the clips is, and of a folder the names.
    """
    if sidecar.is_dir():
        return from_files(sidecar, clips)
    if not sidecar.exists():
        raise DataError(f"{one_line(sidecar)}: no such file or folder")
    if lists_ids(sidecar):
        entries = IdEntries(clips)
        listed = read_list(sidecar, entries)
        if entries.num_found == len(entries.ids):
            _note(listed)
            return Again(lambda: map(checked, entries))
        del entries, listed
    listed = read_list(sidecar, ClipKeys.of(clips))
    _note(listed)
    return from_list(listed, clips)


def _note(listed: CaptionList) -> None:
    if listed.first_of_several:
        print(
            f"note: {listed.first_of_several} rows have several captions; the first of each is taken", file=sys.stderr
        )


def without(reason: str) -> Caption:
    return Caption(reason=reason)


def namer(clips: Iterable[Row], index: NameIndex) -> Callable[[Row], Found]:
    """Return what tells of a clip the name that means it, or the doubt: its id's, its file's, or its source's."""
    ways = [(name_of, index.find(map(name_of, clips))) for name_of in (_id_of, _path_of, source_of)]

    def named(clip: Row) -> Found:
        tried = [found.get(name_of(clip), Found()) for name_of, found in ways]
        return next((found for found in tried if found.clear), None) or max(tried, key=lambda f: f != Found())

    return named


def _id_of(clip: Row) -> str:
    return str(clip["id"])


def _path_of(clip: Row) -> str:
    return str(clip["path"])


# ---- lists


def from_list(listed: CaptionList, clips: Iterable[Row]) -> Iterable[Caption]:
    """Return every clip's caption: of its own key, else by its span of the source."""
    named_of = namer(clips, NameIndex(listed.whole))
    spans = NameIndex(listed.spans).find(map(source_of, clips))
    spans_of = cache(lambda name: Spans(listed.spans[name]))

    def caption_of(clip: Row) -> Caption:
        named, source = named_of(clip), spans.get(source_of(clip), Found())
        entry = listed.whole.get(clip["id"]) or listed.whole.get(named.name)
        if entry and (named.clear or clip["id"] in listed.whole):
            return checked(entry)
        if source.clear:
            return of_span(clip, spans_of(source.name), listed.unit)
        return without(doubt_of(named) or doubt_of(source) or f"no caption for this {listed.keyed_by}")

    return Again(lambda: map(caption_of, clips))


def doubt_of(found: Found) -> str:
    """Return why it is not clear what a list says of a clip, "" where it says nothing."""
    if found.several:
        return f"the list has several that could be it: {one_line(', '.join(found.several))}"
    if found.rivals:
        who = one_line(", ".join(found.rivals[:SHOWN]))
        return f"{one_line(found.name)} could be any of {len(found.rivals)} videos ({who}); name it with its folder"
    return ""


def checked(entry: Entry) -> Caption:
    caption = judged(entry.caption)
    if caption.flag == EMPTY:
        return Caption(flag=EMPTY, reason=f"its caption (row {entry.row} of the list) is empty")
    return caption


def of_span(clip: Row, spans: Spans, unit: str) -> Caption:
    span = span_of(clip, unit)
    if span is None:
        return without(f"the manifest has no start_{unit} and end_{unit} of it")
    return match(spans.around(*span), *span)


def span_of(clip: Row, unit: str) -> tuple[float, float] | None:
    """Return the clip's part of its source, all of it for a whole file; None where the manifest does not tell."""
    start, end = clip.get(f"start_{unit}"), clip.get(f"end_{unit}")
    if not is_missing(start) and not is_missing(end):
        return float(start), float(end)  # type: ignore[arg-type]
    if PurePosixPath(source_of(clip)).stem != PurePosixPath(clip["path"]).stem:
        return None
    return 0.0, clip["num_frames"] if unit == FRAME else clip["num_frames"] / (clip["fps"] or 1.0)


class Spans:
    """The entries of a source of hours, of which each clip meets few."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.start)
        self.starts = [entry.start for entry in self.entries]
        self.ends = list(accumulate((entry.end for entry in self.entries), max))  # the latest so far: ascending, too

    def around(self, start: float, end: float) -> list[Entry]:
        """Return those that may hold a part of a clip."""
        return self.entries[bisect_right(self.ends, start) : bisect_right(self.starts, end)]


def match(entries: list[Entry], start: float, end: float) -> Caption:
    """Return the caption of the entry that holds the clip's middle."""
    middle = (start + end) / 2
    holding = [e for e in entries if e.start <= middle < e.end]
    touched = [e for e in entries if min(e.end, end) - max(e.start, start) > SLACK * (end - start)]
    if not holding:
        return without("no caption's span holds its middle")
    if len(holding) > 1 or len(touched) > 1:
        rows = sorted({e.row for e in holding + touched})
        plural = f"rows {', '.join(map(str, rows))}" if len(rows) > 1 else f"row {rows[0]}"
        return without(f"reaches over several captioned spans ({plural} of the list)")
    return checked(holding[0])


# ---- a file a clip or a source


def from_files(folder: Path, clips: Iterable[Row]) -> Iterable[Caption]:
    """Return captions of text and JSON files, each named after a clip's id or file, or after the source of clips.

    A file's own ending may stay in the name: `a.mp4.txt` is as good as `a.txt`. Files in the folder come first, then
    those beside the clips. Names are looked up among the files that are there, so no id can lead out of the folder.
    """
    places: dict[str, Path] = {}  # by path from the folder, without suffix
    for suffix in TEXT_FILES:
        for path in sorted(folder.rglob(f"*{suffix}")):
            places.setdefault(path.relative_to(folder).as_posix().removesuffix(suffix), path)
    named_of = namer(clips, NameIndex(places))

    def caption_of(clip: Row) -> Caption:
        found = named_of(clip)
        return from_file(places[found.name] if found.clear else beside_clip(clip["path"]), found, clip)

    return Again(lambda: map(caption_of, clips))


def from_file(path: Path | None, found: Found, clip: Row) -> Caption:
    """Return the caption that a clip's file holds, or why there is no such file."""
    if path:
        return read_sidecar(path)
    if found.several:
        return without(f"several sidecar files for it: {', '.join(found.several)}")
    if found.rivals:
        what = f"{len(found.rivals)} clips are called {PurePosixPath(found.name).name}"
        return without(f"{what}; name its sidecar file by its id")
    stem = PurePosixPath(clip["path"]).stem
    return without(f"no file {stem}.txt or {stem}.json for it")


def beside_clip(path: str) -> Path | None:
    folder, name = os.path.split(path)
    names = _names_in(folder)
    stems = (PurePosixPath(name).stem, name)
    found = (f"{stem}{suffix}" for suffix in TEXT_FILES for stem in stems)
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
            text = next((text for text in texts_in(json.loads(text, strict=False)) if text.strip()), "")
        except (ValueError, RecursionError):
            return without(f"{path.name}: no JSON, or none of the keys {', '.join(CAPTION_KEYS)} in it")
    caption = judged(text)
    return Caption(flag=EMPTY, reason=f"its caption ({path.name}) is empty") if caption.flag == EMPTY else caption
