"""Results of work over a cluster: Parquet parts that workers write, in which a row is found by what it was made of.

A row has two names, of 16 bytes each: `quick`, of its job and its files' places, sizes and times, for which nothing is
read; and `named`, of its record's name, which holds the files' contents. Without files they are the same.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.tables import in_batches
from opensora_repro.files import digest, place_of, remove_folder, size_and_time, writing

if TYPE_CHECKING:
    import numpy as np

PARTS = "parts"  # the folder beside the records; within it one for each kind
FULL, LARGEST = 1 << 16, 64 << 20  # rows and bytes of a part that is not merged with others
SMALL_PARTS = 64  # that stay as they are: reading them takes no time
ONE_A_FILE = b"one_a_file"
Row = dict[str, Any]


def folder_of(records: Records, kind: str) -> Path:
    return records.path.parent / PARTS / kind


def named_hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def quick_hash(job: Job) -> bytes:
    if not job.files:
        return named_hash(job.key)
    told = [job.key, *(text for file in job.files for text in (place_of(file), *map(str, size_and_time(file))))]
    return named_hash("\0".join(told))


def schema_of_parts(one_a_file: bool = False) -> Any:
    import pyarrow as pa

    columns = {"quick": pa.binary(16), "named": pa.binary(16), "name": pa.string(), "text": pa.string()}
    return pa.schema(
        [*columns.items(), ("final", pa.bool_()), ("run", pa.int64())], {ONE_A_FILE: b"1"} if one_a_file else None
    )


def part_of(rows: Sequence[Row], schema: Any) -> Any:
    """Return rows as a table of a part."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema)


def write_part(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    with writing(path) as file:
        pq.write_table(table, file, compression="zstd")


def remove_unfinished(folder: Path) -> None:
    """Delete what workers left that are gone, on whichever node: one command at a time has the folder.

    One that is not gone yet, of a run that was killed, fails at what nobody waits for any more.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


class Index:
    """Where the result of every row lies that is final, or made `since`: 24 bytes a row in memory, 48 with files.

    Of several results the newest is found, of one run's a final one first. Where what is made of a file replaces
    what was made of it before, only the newest is there.
    """

    def __init__(self, folder: Path, since: int) -> None:
        import numpy as np

        self.parts = sorted(folder.glob("[!.]*.parquet"), key=lambda part: part.name)
        # Memory is taken where it is written to: as many rows as there can be are no cost where there are fewer
        most = 2 * sum(map(_num_rows, self.parts))
        entries, ranks, count = np.empty((3, most), np.uint64), np.empty(most, np.int64), 0
        replaced = _Replaced(self.parts)
        for number, part in enumerate(self.parts):
            table = read_part(part, ["quick", "named", "final", "run"])
            runs = table["run"].to_numpy()
            final = table["final"].to_numpy(zero_copy_only=False)
            kept = np.flatnonzero((final | (runs >= since)) & replaced.kept(part, runs))
            quick, named = (numbers_of(table[name])[kept] for name in ("quick", "named"))
            located = (np.uint64(number) << np.uint64(32)) | kept.astype(np.uint64)
            rank = (np.where(final, 0, 1) - 2 * runs)[kept]
            other = np.flatnonzero((quick != named).any(axis=1))  # those with files
            for names, rows in ((quick, slice(None)), (named, other)):
                end = count + len(located[rows])
                entries[:2, count:end], entries[2, count:end], ranks[count:end] = (
                    names[rows].T,
                    located[rows],
                    rank[rows],
                )
                count = end
        order = np.lexsort((ranks[:count], entries[0, :count]))
        del ranks
        for column in entries:
            column[:count] = column[order]
        self.entries = entries[:, :count]
        self._column = lru_cache(maxsize=4)(lambda number: read_part(self.parts[number], ["text"])["text"])

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return where the rows of `hashes` [n, 2] lie, int64 [n]; -1 for those that are not there."""
        return find(self.entries, hashes)

    def texts(self, located: np.ndarray) -> list[str]:
        """Return the results, as JSON, that lie there."""
        import numpy as np
        import pyarrow as pa

        found: list[str] = [""] * len(located)
        numbers = located >> 32
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            rows = pa.array(located[places] & 0xFFFFFFFF)
            for place, text in zip(places, self._column(int(number)).take(rows).to_pylist(), strict=True):
                found[place] = text
        return found


def find(entries: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """See `Index.find`; `entries`, uint64 [3, n], are sorted by their first numbers, and may lie in a file."""
    import numpy as np

    first, second, located = entries
    if not len(first):
        return np.full(len(hashes), -1, np.int64)
    at = np.minimum(np.searchsorted(first, hashes[:, 0]), len(first) - 1)
    hit = (first[at] == hashes[:, 0]) & (second[at] == hashes[:, 1])
    return np.where(hit, located[at].astype(np.int64), -1)


def as_hashes(data: bytes) -> np.ndarray:
    """Return 16 bytes a row as numbers, uint64 [n, 2]."""
    import numpy as np

    return np.frombuffer(data, "<u8").reshape(-1, 2)


def numbers_of(column: Any) -> np.ndarray:
    """Return a column of 16 bytes a row as numbers, uint64 [n, 2]."""
    import numpy as np

    chunks = [chunk for chunk in column.chunks if len(chunk)]
    parts = [as_hashes(chunk.buffers()[1])[chunk.offset : chunk.offset + len(chunk)] for chunk in chunks]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def read_part(part: Path, columns: Sequence[str] | None = None) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(part, memory_map=False) as file:
        return file.read(columns=columns, use_threads=False)


class _Replaced:
    """Which rows are no longer of value: made of a file of which something else has been made since."""

    def __init__(self, parts: Sequence[Path]) -> None:
        import numpy as np
        import pyarrow.parquet as pq

        one_a_file = bool(parts) and ONE_A_FILE in (pq.read_schema(parts[0]).metadata or {})
        found = [self._rows_of(part) for part in parts] if one_a_file else []
        joined = np.concatenate(found) if found else np.empty((0, 3), np.uint64)
        joined = joined[np.lexsort((joined[:, 2], joined[:, 0]))]
        self.latest = joined[np.append(joined[1:, 0] != joined[:-1, 0], True)] if len(joined) else joined

    @staticmethod
    def _rows_of(part: Path) -> np.ndarray:
        """Return for each row 8 bytes of its file's content, 8 of its record's name, and its run: uint64 [n, 3]."""
        import numpy as np

        table = read_part(part, ["named", "name", "run"])
        contents = b"".join(named_hash(name.partition("-")[0])[:8] for name in table["name"].to_pylist())
        runs = table["run"].to_numpy().astype(np.uint64)
        return np.column_stack([np.frombuffer(contents, "<u8"), numbers_of(table["named"])[:, 0], runs])

    def kept(self, part: Path, runs: np.ndarray) -> Any:
        import numpy as np

        if not len(self.latest):
            return np.full(len(runs), True)
        rows = self._rows_of(part)
        return self.latest[np.searchsorted(self.latest[:, 0], rows[:, 0]), 1] == rows[:, 1]


# ---- many small parts to few


def groups_to_merge(folder: Path) -> list[list[Path]]:
    """Return parts that are better one, none where there are few: a run of millions leaves one for every batch."""
    sizes = {part: part.stat().st_size for part in sorted(folder.glob("[!.]*.parquet"))}
    small = [part for part, size in sizes.items() if size < LARGEST // 4 and not part.name.startswith("merged-")]
    groups: list[list[Path]] = []
    if len(small) <= SMALL_PARTS:
        return groups
    room, rows = 0, 0
    for part in small:
        count = _num_rows(part)
        if not groups or room < sizes[part] or rows < count:
            groups.append([])
            room, rows = LARGEST // 4, FULL
        groups[-1].append(part)
        room, rows = room - sizes[part], rows - count
    return groups


def _num_rows(part: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(part).num_rows)


def merge(parts: Sequence[Path]) -> None:
    """Make one part of several. Killed in between, rows are there twice, which costs nothing; Ray tries it again."""
    import pyarrow as pa

    target = parts[0].with_name(f"merged-{digest([part.stem for part in parts])}.parquet")
    if not target.exists():
        write_part(target, pa.concat_tables([read_part(part) for part in parts]))
    for part in parts:
        part.unlink(missing_ok=True)


# ---- to and from the records of one machine


def to_records(keeping: Keeping) -> None:
    """Bring what a cluster has finished into the records, where work on this machine looks for it."""
    folder = folder_of(keeping.records, keeping.kind)
    if not folder.is_dir():
        return
    index = Index(folder, sys.maxsize)
    import numpy as np

    places = np.unique(index.entries[2])
    for number, part in enumerate(index.parts):
        rows = places[(places >> np.uint64(32)) == number] & np.uint64(0xFFFFFFFF)
        table = read_part(part, ["name", "text"]).take(rows)
        keeping.records.put(keeping.kind, dict(zip(table["name"].to_pylist(), table["text"].to_pylist(), strict=True)))
    remove_folder(folder)


def from_records(keeping: Keeping) -> None:
    """Bring what this machine has recorded into parts, where work over a cluster looks for it."""
    folder, records = folder_of(keeping.records, keeping.kind), keeping.records
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    schema, batch = schema_of_parts(keeping.one_a_file), list[Row]()
    for batch in in_batches(_rows_of(records.texts(keeping.kind)), FULL):
        write_part(folder / f"merged-{digest([row['name'] for row in batch])}.parquet", part_of(batch, schema))
    if batch:
        records.drop(keeping.kind, "")


def _rows_of(texts: Iterable[tuple[str, str]]) -> Iterator[Row]:
    began = time.time_ns()
    for name, text in texts:
        known = named_hash(name)
        yield {"quick": known, "named": known, "name": name, "text": text, "final": True, "run": began}
