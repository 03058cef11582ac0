"""What captioning leaves behind: the manifest with its captions, the rejects with their reasons, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from opensora_repro.data.caption.text import REJECTED, Caption, judge
from opensora_repro.data.manifest import Rebase, reject, rejects_writer
from opensora_repro.data.tables import BATCH, Row, Table, set_column, table_writer

CAPTIONS = {"caption": "string", "caption_flag": "string"}  # what a clip has then


@dataclass
class Counts:
    """Clips with a caption and all of them, captions by their flags, and those that something was cut around."""

    captioned: int = 0
    clips: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    unwrapped: int = 0


def write_captioned(
    clips: Table, captions: Iterable[Caption], short: Iterable[Caption] | None, out: Path, *, keep_flagged: bool
) -> Counts:
    """Write OUT/rejects.parquet, then OUT/manifest.parquet; `short` are the captions before they were rewritten.

    Clips and captions are read once, some thousand at a time.
    """
    import pyarrow as pa

    counts, found, first = Counts(), iter(captions), iter(short) if short is not None else None
    rebase = Rebase(out.absolute(), out.absolute())
    empty = pa.RecordBatch.from_pylist([], clips.schema)
    schema = _with_captions(empty, [], [] if first else None).schema
    with (
        table_writer(out / "manifest.parquet", schema) as write,
        rejects_writer(out / "rejects.parquet") as refuse,
    ):
        for batch in _slices(clips):
            own = list(islice(found, batch.num_rows))
            reasons = [reason_of(caption, keep_flagged) for caption in own]
            good = [not reason for reason in reasons]
            captioned = _with_captions(batch, own, list(islice(first, batch.num_rows)) if first else None)
            write(rebase(captioned.filter(pa.array(good))))
            for row, reason in zip(_without(batch, good), filter(None, reasons), strict=True):
                refuse(row | reject(row["id"], row.get("source"), "caption", reason))
            counts.captioned, counts.clips = counts.captioned + sum(good), counts.clips + batch.num_rows
            counts.flags.update(caption.flag for caption, kept in zip(own, good, strict=True) if kept and caption.flag)
            counts.unwrapped += sum(caption.unwrapped for caption in own)
    return counts


def _slices(clips: Table) -> Iterable[Any]:
    return (batch.slice(start, BATCH) for batch in clips.batches() for start in range(0, batch.num_rows, BATCH))


def _with_captions(batch: Any, captions: Sequence[Caption], short: Sequence[Caption] | None) -> Any:
    import pyarrow as pa

    columns = {"caption_original": [caption.text for caption in short]} if short is not None else {}
    columns["caption"] = [caption.text for caption in captions]
    columns["caption_flag"] = [caption.flag for caption in captions]
    for name, texts in columns.items():
        batch = set_column(batch, name, pa.array(texts, pa.string()))
    return batch


def _without(batch: Any, good: list[bool]) -> Any:
    import pyarrow as pa

    return batch.filter(pa.array([not kept for kept in good])).to_pylist()


def captioned(row: Row, record: dict[str, Any], *, keep_flagged: bool) -> list[Row]:
    """Return a clip's row for the next step of a line, none where it is left out."""
    found = judge(record)
    return [] if reason_of(found, keep_flagged) else [{**row, "caption": found.text, "caption_flag": found.flag}]


def reason_of(found: Caption, keep_flagged: bool) -> str:
    """Return why a clip is left out, "" if it is not."""
    if found.flag and keep_flagged:
        return ""
    if found.reason or found.flag not in REJECTED:
        return found.reason
    return f"{REJECTED[found.flag]}: {found.text[:100]}" if found.text else REJECTED[found.flag]
