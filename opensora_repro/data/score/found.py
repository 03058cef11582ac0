"""What was found of clips, as columns of their manifest: numbers, and the groups that look the same.

Of a clip some numbers are held; rows and records are read one after the other, embeddings lie in a file.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_repro.data.embeddings import KIND, write_embeddings
from opensora_repro.data.manifest import Rebase, rejects_writer
from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates
from opensora_repro.data.progress import progress
from opensora_repro.data.score.duplicates import CODE_WORDS, groups_of, near_codes, num_crowded
from opensora_repro.data.score.measure import CODE, code_of
from opensora_repro.data.tables import BATCH, Row, Table, in_batches, set_column, table_writer

SIZES = ("height", "width", "num_frames")
FEW = 1000  # clips of which it is not told how they are compared
Record = dict[str, Any]


@dataclass
class Found:
    """What was found of clips: which of them there is something of, and of those the rest.

    `codes` are of how they look, zeros for none; `vectors` [M, D] their embeddings, `embedded` [M] of which of them.
    """

    good: np.ndarray  # bool [clips]
    columns: dict[str, Any]  # arrays of float64
    codes: np.ndarray  # uint16 [good clips, CODE_WORDS]
    vectors: np.ndarray
    embedded: np.ndarray

    @classmethod
    def of(cls, records: Iterable[Record]) -> Found:
        """Gather records: columns, or "error"."""
        good, codes = [np.empty(0, bool)], [np.empty((0, CODE_WORDS), np.uint16)]
        columns = dict[str, list[Any]]()
        for batch in in_batches(records):
            good.append(np.array(["error" not in record for record in batch]))
            some = [record for record in batch if "error" not in record]
            codes.append(np.array([_code(record) for record in some], np.uint16).reshape(-1, CODE_WORDS))
            for name in columns or [name for record in some[:1] for name in record if name not in (CODE, "embedding")]:
                columns.setdefault(name, []).append(pa.array([record[name] for record in some], pa.float64()))
        joined = {name: pa.concat_arrays(arrays) for name, arrays in columns.items()}
        return cls(np.concatenate(good), joined, np.concatenate(codes), np.empty((0, 1), KIND), np.empty(0, np.int64))

    def add(self, records: Iterable[Record], folder: Path) -> None:
        """Add what models say of the clips that there is something of; their embeddings go to a file of `folder`.

        It goes with this process.
        """
        more = Found.of(records)
        kept = pa.array(more.good)
        self.columns = {name: values.filter(kept) for name, values in self.columns.items()} | more.columns
        self.codes = self.codes[more.good]
        self.good[self.good] = more.good
        some = (record for record in records if "error" not in record)
        self.vectors, self.embedded = _gathered((record.get("embedding") or "" for record in some), folder)


def _code(record: Record) -> np.ndarray:
    return code_of(record[CODE]) if record.get(CODE) else np.zeros(CODE_WORDS, np.uint16)


def _gathered(embeddings: Iterator[str], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings, of which "" is none, as an array that lies in a file, and whose they are."""
    whose, size = list[np.ndarray](), 0
    with tempfile.TemporaryFile(dir=folder) as file:
        first = 0
        for batch in in_batches(embeddings):
            whose.append(first + np.flatnonzero([bool(text) for text in batch]))
            for text in filter(None, batch):
                file.write(data := base64.b64decode(text))
                size = len(data) // KIND.itemsize
            first += len(batch)
        file.flush()
        rows = np.concatenate(whose) if whose else np.empty(0, np.int64)
        return (np.memmap(file, KIND, "r", shape=(len(rows), size)) if size else np.empty((0, 1), KIND)), rows


def packed(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype(KIND).tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=KIND)


def write_embeddings_of(ids: Iterable[str], records: Iterable[Record], path: Path) -> None:
    """Write the embeddings of the clips that have one; where none has, no file."""
    known = (
        (name, unpacked(record["embedding"]))
        for name, record in zip(ids, records, strict=True)
        if "embedding" in record
    )
    if first := next(known, None):
        write_embeddings(path, chain([first], known), len(first[1]))


def write_scored(
    clips: Table, found: Found, reasons: Iterable[str], groups: tuple[np.ndarray, np.ndarray] | None, out: Path
) -> None:
    """Write OUT/rejects.parquet, then OUT/manifest.parquet: the clips with what was found of them, row by row.

    `reasons` are those of the clips that there is nothing of, in their order; `groups` are of `groups_alike`.
    """
    rebase = Rebase(out.absolute(), out.absolute())
    names = _names_of(clips, found, groups[0]) if groups else {}
    why, row, place = iter(reasons), 0, 0
    empty = _with_columns(pa.RecordBatch.from_pylist([], clips.schema), found, groups, names, 0)
    with (
        table_writer(out / "manifest.parquet", empty.schema) as write,
        rejects_writer(out / "rejects.parquet") as refuse,
    ):
        for batch in clips.batches():
            good = found.good[row : row + batch.num_rows]
            kept = batch.filter(pa.array(good))
            write(rebase(_with_columns(kept, found, groups, names, place)))
            for refused in batch.filter(pa.array(~good)).to_pylist():
                refuse(refused | {"stage": "score", "reason": next(why)})
            row, place = row + batch.num_rows, place + kept.num_rows


def _with_columns(
    batch: Any, found: Found, groups: tuple[np.ndarray, np.ndarray] | None, names: dict[int, str], place: int
) -> Any:
    """Return a batch of clips with what was found of them, `place` being that of the first."""
    rows = slice(place, place + batch.num_rows)
    for name, values in found.columns.items():
        batch = set_column(batch, name, values[rows])
    if groups:
        best, grouped = (of[rows] for of in groups)
        named = [names[one] if some else None for one, some in zip(best.tolist(), grouped.tolist(), strict=True)]
        batch = set_column(batch, "duplicate_group", pa.array(named, pa.string()))
        batch = set_column(batch, "duplicate", pa.array(best != np.arange(rows.start, rows.stop), pa.bool_()))
    return batch


def good_rows(clips: Table, good: np.ndarray, columns: Iterable[str]) -> Iterator[Row]:
    """Yield some columns of the clips that are good, bool [clips]."""
    row, told = 0, list(columns)
    for batch in clips.batches():
        kept = batch.select(told).filter(pa.array(good[row : row + batch.num_rows]))
        for start in range(0, kept.num_rows, BATCH):
            yield from kept.slice(start, BATCH).to_pylist()
        row += batch.num_rows


def _names_of(clips: Table, found: Found, best: np.ndarray) -> dict[int, str]:
    """Return the ids of those that others look like."""
    named = {*best[best != np.arange(len(best))].tolist()}
    return {place: row["id"] for place, row in enumerate(good_rows(clips, found.good, ["id"])) if place in named}


def groups_alike(clips: Table, found: Found, cosine: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for each good clip the place of the best that looks the same, and whether others do.

    The best is the largest, then longest, then first. `cosine`: from which on embeddings look the same.
    """
    sizes = ((row["height"] * row["width"], row["num_frames"]) for row in good_rows(clips, found.good, SIZES))
    pixels, frames = np.fromiter(sizes, np.dtype((np.int64, 2)), int(found.good.sum())).T
    order = np.lexsort((-frames, -pixels))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    best = np.array(groups_of(len(order), _pairs(found, rank, cosine), rank.tolist()), np.int64)
    return best, np.bincount(best, minlength=len(best))[best] > 1


def _pairs(found: Found, rank: np.ndarray, cosine: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs of clips that look the same, by their codes and by their embeddings."""
    coded = np.flatnonzero(found.codes.any(axis=1))
    if len(coded) > 1:
        codes = found.codes[coded]
        if crowded := num_crowded(codes):
            print(f"{crowded:,} clips share part of their code with more than others can be compared: see --embed")
        yield from ((int(coded[a]), int(coded[b])) for a, b in near_codes(codes))
    if (count := len(found.embedded)) > 1:
        if count > FEW:
            print(cells_note(count), flush=True)
        order = np.argsort(rank[found.embedded])  # best first
        with progress("comparing", count, "clip") as advance:
            better = find_near_duplicates(found.vectors, order, cosine=cosine, advance=advance).better
        rows, worse = found.embedded[order], np.flatnonzero(better >= 0)
        yield from zip(rows[worse].tolist(), rows[better[worse]].tolist(), strict=True)
