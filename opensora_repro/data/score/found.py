"""What was found of clips, as columns of their manifest: numbers, embeddings, and the groups that look the same."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_repro.data.embeddings import write_embeddings
from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates
from opensora_repro.data.progress import progress
from opensora_repro.data.score.duplicates import groups_of, near_codes, num_crowded
from opensora_repro.data.score.measure import CODE, code_of
from opensora_repro.data.tables import in_batches, set_column

FEW = 1000  # clips of which it is not told how they are compared
Record = dict[str, Any]


@dataclass
class Found:
    """What was found of clips: why there is nothing of each ("": there is), and of the others numbers by column."""

    reasons: list[str]
    columns: Any  # table of float64
    codes: list[str]  # of how they look, "" for none
    embeddings: list[str]  # likewise

    @classmethod
    def of(cls, records: Iterable[Record]) -> Found:
        """Gather records: columns, or "error"."""

        reasons, codes, embeddings = list[str](), list[str](), list[str]()
        tables, names = list[Any](), list[str]()
        for batch in in_batches(records):
            reasons += [record.get("error", "") for record in batch]
            good = [record for record in batch if "error" not in record]
            codes += [record.get(CODE) or "" for record in good]
            embeddings += [record.get("embedding") or "" for record in good]
            names = names or [name for record in good[:1] for name in record if name not in (CODE, "embedding")]
            columns = {name: pa.array([record[name] for record in good], pa.float64()) for name in names}
            if good:
                tables.append(pa.table({"": pa.nulls(len(good)), **columns}))  # has a length without a column, too
        return cls(reasons, pa.concat_tables(tables) if tables else pa.table({"": pa.nulls(0)}), codes, embeddings)

    def add(self, records: Sequence[Record]) -> None:
        """Add what models say of the clips that there is something of."""
        more = Found.of(records)
        kept = [not reason for reason in more.reasons]
        left = iter(more.reasons)
        self.reasons = [reason or next(left) for reason in self.reasons]
        self.columns = self.columns.filter(kept)
        for name in more.columns.column_names[1:]:
            self.columns = self.columns.append_column(name, more.columns[name])
        self.codes, self.embeddings = list(compress(self.codes, kept)), more.embeddings


def packed(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f2")


def write_embeddings_of(ids: Sequence[str], records: list[Record], path: Path) -> None:
    """Write the embeddings of the clips that have one; where none has, no file."""
    known = [(name, record["embedding"]) for name, record in zip(ids, records, strict=True) if "embedding" in record]
    if known:
        write_embeddings(path, ((name, unpacked(text)) for name, text in known), len(unpacked(known[0][1])))


def with_columns(clips: Any, found: Found, cosine: float | None) -> Any:
    """Return the clips with what was found of them, and the groups that look the same.

    `cosine`: from which on embeddings look the same; None: no groups are asked for.
    """

    for name in found.columns.column_names[1:]:
        clips = set_column(clips, name, found.columns[name])
    if cosine is not None:
        best = best_alike(clips, found, cosine)
        sizes = Counter(best)
        ids = clips["id"].to_pylist()
        groups = [ids[row] if sizes[row] > 1 else None for row in best]
        clips = set_column(clips, "duplicate_group", pa.array(groups, pa.string()))
        clips = set_column(clips, "duplicate", pa.array([row != number for number, row in enumerate(best)], pa.bool_()))
    return clips


def best_alike(clips: Any, found: Found, cosine: float) -> list[int]:
    """Return for each clip the row of the best that looks the same: the largest, then longest, then first."""

    pixels = clips["height"].to_numpy() * clips["width"].to_numpy()
    order = np.lexsort((-clips["num_frames"].to_numpy(), -pixels))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))

    def pairs() -> Iterator[tuple[int, int]]:
        coded = [row for row, code in enumerate(found.codes) if code]
        embedded = [int(row) for row in order if found.embeddings[row]]
        if len(coded) > 1:
            codes = np.stack([code_of(found.codes[row]) for row in coded])
            if crowded := num_crowded(codes):
                print(f"{crowded:,} clips share part of their code with more than others can be compared: see --embed")
            yield from ((coded[a], coded[b]) for a, b in near_codes(codes))
        if len(embedded) > 1:
            yield from near_embeddings(embedded, np.stack([unpacked(found.embeddings[row]) for row in embedded]))

    def near_embeddings(rows: list[int], vectors: np.ndarray) -> Iterator[tuple[int, int]]:
        if len(rows) > FEW:
            print(cells_note(len(rows)), flush=True)
        with progress("comparing", len(rows), "clip") as advance:
            alike = find_near_duplicates(vectors, np.arange(len(rows)), cosine=cosine, advance=advance)
        yield from ((row, rows[better]) for row, better in zip(rows, alike.better.tolist(), strict=True) if better >= 0)

    return groups_of(len(found.codes), pairs(), rank.tolist())
