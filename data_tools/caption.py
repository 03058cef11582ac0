"""Give the clips of a manifest their captions from a list made elsewhere, joined by key and never by order.

    python -m data_tools.caption MANIFEST --sidecar FILE --out DIR

FILE (CSV or Parquet) has either the columns `id, caption`, or `source, caption` with the span that each caption
describes: `start_frame, end_frame` (half-open) or `start_time, end_time` (seconds since the source's first frame). A
clip gets the caption whose span holds its middle. A clip without one, or that reaches into a second captioned span, is
left out of `DIR/manifest.parquet` and listed with the reason in `DIR/rejects.parquet`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from opensora_repro.data.manifest import DataError, is_missing, read_manifest, read_table, write_manifest, write_table

if TYPE_CHECKING:
    import pandas as pd

SPANS = (("start_frame", "end_frame"), ("start_time", "end_time"))
SLACK = 0.1  # share of a clip that may reach into a neighbouring span: cuts are found to within a frame or two
REJECT_COLUMNS = ("id", "path", "source", "start_frame", "end_frame", "reason")


@dataclass(frozen=True)
class Captioned:
    """One row of the list: a caption and the part of the source it describes."""

    row: int  # counted from 1, for messages
    start: float
    end: float
    caption: str


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return join(Path(args.manifest), Path(args.sidecar), Path(args.out))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data_tools.caption", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("manifest", help="manifest of clips, Parquet or CSV")
    parser.add_argument("--sidecar", required=True, metavar="FILE", help="captions by id, or by source and span")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for manifest.parquet and rejects.parquet")
    return parser


def join(manifest: Path, sidecar: Path, out: Path) -> int:
    """Write the captioned manifest and the rejects; returns the exit status."""
    if out.resolve() == manifest.resolve().parent:
        raise DataError(f"--out {out}: is the manifest's own folder; choose another, or its clips would be overwritten")
    clips = read_manifest(manifest, need_captions=False)
    table = read_table(sidecar)
    if "caption" not in table.columns:
        raise DataError(f"{sidecar}: column caption missing")
    found = by_id(sidecar, table, clips) if "id" in table.columns else by_span(sidecar, table, clips)
    captions = [caption for caption, _ in found]
    reasons = [reason for _, reason in found]
    good = [not reason for reason in reasons]
    write_result(out, clips.assign(caption=captions)[good], clips.assign(reason=reasons)[[not g for g in good]])
    print(f"{sum(good)} of {len(clips)} clips captioned, {len(clips) - sum(good)} rejected: {out}")
    if not any(good):
        raise DataError(f"{sidecar}: no clip found its caption; the reasons are in {out / 'rejects.parquet'}")
    return 0


def by_id(sidecar: Path, table: pd.DataFrame, clips: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (caption, "") or ("", reason) of each clip."""
    captions: dict[str, tuple[int, Any]] = {}
    for row, (key, caption) in enumerate(zip(table["id"], table["caption"], strict=True), start=1):
        if is_missing(key):
            raise DataError(f"{sidecar}: row {row}: id is empty")
        first, known = captions.setdefault(str(key), (row, caption))
        if first != row and known != caption:
            raise DataError(f"{sidecar}: rows {first} and {row} give id {str(key)!r} different captions")
    listed = (captions.get(key) for key in clips["id"])
    return [checked(entry[1], entry[0]) if entry else ("", "no caption for this id") for entry in listed]


def checked(caption: object, row: int) -> tuple[str, str]:
    if is_missing(caption):
        return "", f"its caption (row {row} of the list) is empty"
    return str(caption).strip(), ""


def by_span(sidecar: Path, table: pd.DataFrame, clips: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (caption, "") or ("", reason) of each clip."""
    columns = next((pair for pair in SPANS if set(pair) <= set(table.columns)), None)
    if "source" not in table.columns or columns is None:
        raise DataError(f"{sidecar}: expected the columns id, or source with start_frame and end_frame (or times)")
    absent = [name for name in ("source", *columns) if name not in clips.columns]
    if absent:
        raise DataError(f"the manifest has no column {absent[0]}, so captions can only be joined by id")
    listed = read_spans(sidecar, table, columns)
    names = {name: resolve(name, listed) for name in clips["source"].astype(str).unique()}
    spans = zip(clips["source"].astype(str), clips[columns[0]], clips[columns[1]], strict=True)
    return [match(listed.get(names[source] or "", []), float(start), float(end)) for source, start, end in spans]


def read_spans(sidecar: Path, table: pd.DataFrame, columns: tuple[str, str]) -> dict[str, list[Captioned]]:
    """Return the list's entries by source."""
    listed: dict[str, list[Captioned]] = defaultdict(list)
    rows = zip(table["source"], table[columns[0]], table[columns[1]], table["caption"], strict=True)
    for row, (source, start, end, caption) in enumerate(rows, start=1):
        if is_missing(source):
            raise DataError(f"{sidecar}: row {row}: source is empty")
        try:
            entry = Captioned(row, float(start), float(end), "" if is_missing(caption) else str(caption))
        except (TypeError, ValueError):
            raise DataError(f"{sidecar}: row {row}: {columns[0]}, {columns[1]} are {start!r}, {end!r}") from None
        if not entry.start < entry.end:
            raise DataError(f"{sidecar}: row {row}: {columns[0]} {start} is not before {columns[1]} {end}")
        listed[str(source)].append(entry)
    return listed


def resolve(source: str, listed: dict[str, list[Captioned]]) -> str | None:
    """Return the list's name of a source: the same, or else the only one with the same file name."""
    if source in listed:
        return source
    same_name = [name for name in listed if PurePosixPath(name).name == PurePosixPath(source).name]
    return same_name[0] if len(same_name) == 1 else None


def match(entries: list[Captioned], start: float, end: float) -> tuple[str, str]:
    """Return (caption, "") of the entry that holds the clip's middle, or ("", reason)."""
    middle = (start + end) / 2
    holding = [e for e in entries if e.start <= middle < e.end]
    touched = [e for e in entries if min(e.end, end) - max(e.start, start) > SLACK * (end - start)]
    if not entries:
        return "", "no caption for this source"
    if not holding:
        return "", "no caption's span holds its middle"
    if len(holding) > 1 or len(touched) > 1:
        rows = sorted({e.row for e in holding + touched})
        return "", f"reaches over several captioned spans (rows {', '.join(map(str, rows))} of the list)"
    return checked(holding[0].caption, holding[0].row)


def write_result(out: Path, captioned: pd.DataFrame, rejected: pd.DataFrame) -> None:
    write_manifest(captioned.reset_index(drop=True), out / "manifest.parquet")
    write_table(rejected.reindex(columns=list(REJECT_COLUMNS)).reset_index(drop=True), out / "rejects.parquet")


if __name__ == "__main__":
    sys.exit(main())
