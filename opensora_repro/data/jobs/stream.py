"""A run over a cluster, of which this process holds a few numbers a row: what is left, the plan, results in order."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.cluster import Place, Resources, run_plan
from opensora_repro.data.jobs.course import CONTENTS, Job, Keeping, memo_of, record_name
from opensora_repro.data.jobs.rows import Order, files_of
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import in_batches

BATCH = 8192  # rows that are looked up at a time
SPREAD = 64  # chunks that little work is spread over, where it has fewer than full ones
GROW, LARGEST = 256, 4  # after so many chunks they are twice as large, and so on, so many times at most: within SPREAD
ROUNDS = 3  # plans of a run: a second one for results that no longer hold, a third for what was lost twice


@dataclass(frozen=True)
class Table:
    """Rows that may be read again and again, in batches: their `quick` hashes, 16 bytes each, and their jobs.

    A job is made of a row only where that is to be done.
    """

    batches: Callable[[], Iterator[Any]]  # lists, or anything with a length
    hashes: Callable[[Any], bytes]
    jobs: Callable[[Any, Sequence[int]], Iterable[Job]]  # of some of a batch's rows

    @classmethod
    def of_jobs(cls, jobs: Iterable[Job]) -> Table:
        """`jobs` is a list, or gives a new iterator every time it is asked for one."""

        def hashes(batch: list[Job]) -> bytes:
            return b"".join(map(parts.quick_hash, batch))

        return cls(lambda: in_batches(jobs, BATCH), hashes, lambda batch, places: [batch[at] for at in places])


class Results:
    """The results of a run in the order of its jobs, as often as they are asked for; read when they are."""

    def __init__(self, index: parts.Index, order: IO[bytes]) -> None:
        self.index, self.order = index, order

    def __len__(self) -> int:
        return os.fstat(self.order.fileno()).st_size // 16

    def texts(self) -> Iterator[list[str]]:
        """Yield results as JSON, some thousand at a time."""
        for start in range(0, len(self), BATCH):
            self.order.seek(16 * start)
            yield self.index.texts(self.index.find(parts.as_hashes(self.order.read(16 * BATCH))))

    def __iter__(self) -> Iterator[Any]:
        for texts in self.texts():
            yield from map(json.loads, texts)


def run_streamed(
    work: str,
    table: Table,
    keeping: Keeping,
    *,
    resources: Resources,
    place: Place,
    label: str,
    unit: str = "file",
    group: int = 0,
    options: dict[str, Any] | None = None,
) -> Results:
    """Do what has no result yet; return the results of all rows. See `run_jobs`, and `Order` for `group`.

    Raises OSError and RuntimeError for what stops all of the work, and where results of it are not found.
    """
    parts.from_records(keeping)
    run = Run(table, keeping, resources.rows if not group else max(1, resources.rows // group) * group)
    for number in range(ROUNDS + 1):
        chunks, left = run.write_todo(anew=number > 0)
        if not left:
            run.sweep()
            return Results(run.index, run.order)
        if number == ROUNDS:
            break
        order = run.order_of(work, threads=max(1, int(resources.cpus)), group=group, options=options or {})
        with progress(label, left, unit) as bar:
            for told in run_plan(order, chunks, resources, place):
                bar(told["counts"][0][0])
    why = f"{left} results are not here or no longer hold after {ROUNDS} tries"
    raise OSError(f"{run.folder}: {why}; do all nodes share this folder?")


class Run:
    """The files of one run: chunks of what is left, and the order in which results are asked for."""

    def __init__(self, table: Table, keeping: Keeping, rows: int) -> None:
        self.table, self.keeping, self.rows = table, keeping, rows
        self.folder = parts.folder_of(keeping.records, keeping.kind)
        self.todo, self.began = self.folder / "todo", time.time_ns()
        self.order: IO[bytes] = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - is gone with this process
        self.taken_over = keeping.records.num_taken_over(keeping.kind)
        self.memo = memo_of(keeping.records) if any(True for _ in keeping.records.texts(CONTENTS)) else None
        self.index = parts.Index(self.folder, self.began)
        self.num_files = 0

    def sweep(self) -> None:
        """Leave nothing but results."""
        shutil.rmtree(self.todo)
        parts.remove_unfinished(self.folder)

    def write_todo(self, *, anew: bool) -> tuple[int, int]:
        """Write chunks of the rows that are left; return how many chunks and rows. `anew`: whatever is known."""
        if anew:
            del self.index  # before the next one is in memory
            self.index = parts.Index(self.folder, self.began)
        shutil.rmtree(self.todo, ignore_errors=True)
        self.todo.mkdir(parents=True)
        self.order.truncate(0)
        self.order.seek(0)
        chunks, left, waiting = 0, 0, _Waiting()
        for batch in self.table.batches():
            hashes = bytearray(self.table.hashes(batch))
            places, spoilt = self._left_in(batch, hashes, anew)
            jobs = self.table.jobs(batch, places) if places else ()
            for at, job in zip(places, jobs, strict=True):
                waiting.add(job, hashes[16 * at : 16 * at + 16], anew or at in spoilt)
                self.num_files += len(job.files)
                if len(waiting) == self.rows * SPREAD:
                    chunks = self._write(chunks, waiting, self.rows << min(chunks // GROW, LARGEST))
            left += len(places)
            self.order.write(hashes)
        self.order.flush()
        return self._write(chunks, waiting, max(1, min(self.rows, -(-left // SPREAD)))), left

    def _left_in(self, batch: Any, hashes: bytearray, anew: bool) -> tuple[list[int], set[int]]:
        """Return the rows that have no result, twins once, and among them those with one that no longer holds.

        `hashes` are made those of what was found.
        """
        import numpy as np

        located = self.index.find(parts.as_hashes(bytes(hashes)))
        if self.memo:
            self._find_named(batch, hashes, located, self._name)
        if self.taken_over:
            self._find_named(batch, hashes, located, lambda job: job.earlier)
        spoilt = set[int]()
        if self.keeping.holds:
            there = np.flatnonzero(located >= 0)
            jobs, texts = self.table.jobs(batch, there.tolist()), self.index.texts(located[there])
            for at, job, text in zip(there.tolist(), jobs, texts, strict=True):
                result = json.loads(text)
                failed = anew and "error" in result  # in this run
                if not failed and not self.keeping.holds(job, result):
                    located[at] = -1
                    spoilt.add(at)
        left = np.flatnonzero(located < 0).tolist()
        once = {bytes(hashes[16 * at : 16 * at + 16]): at for at in reversed(left)}
        return sorted(once.values()), spoilt

    def _find_named(self, batch: Any, hashes: bytearray, located: Any, name: Callable[[Job], str]) -> None:
        """Find what is not found yet by a name of its record, "" where it has none."""
        import numpy as np

        left = np.flatnonzero(located < 0).tolist()
        told = {at: found for at, job in zip(left, self.table.jobs(batch, left), strict=True) if (found := name(job))}
        names = b"".join(map(parts.named_hash, told.values()))
        for number, (at, place) in enumerate(zip(told, self.index.find(parts.as_hashes(names)).tolist(), strict=True)):
            if place >= 0:
                located[at], hashes[16 * at : 16 * at + 16] = place, names[16 * number : 16 * number + 16]

    def _name(self, job: Job) -> str:
        """Return the record's name where this machine remembers what the files contain."""
        assert self.memo is not None
        contents = [self.memo.recall(file) for file in job.files]
        return record_name(job.key, [text for text in contents if text]) if contents and None not in contents else ""

    def _write(self, chunks: int, waiting: _Waiting, size: int) -> int:
        """Write the waiting rows in chunks of this size, the first of which has this number; return the next's."""
        import pyarrow.parquet as pq

        table = waiting.take()
        for start in range(0, table.num_rows, size):
            path = self.todo / f"{chunks:07d}.parquet"
            pq.write_table(table.slice(start, size), path, compression="zstd")
            chunks += 1
        return chunks

    def order_of(self, work: str, *, by_name: bool = False, **more: Any) -> Order:
        """Return what the actors are to do. They are told what is known by files' contents, if any row has files."""
        import numpy as np

        if by_name := by_name or self.num_files > 0:
            np.save(self.todo / "index.npy", self.index.entries)
            names = json.dumps([part.name for part in self.index.parts])
            (self.todo / "parts.json").write_text(names, encoding="utf-8")
        return Order(
            work, self.folder.absolute(), self.todo.absolute(), time.time_ns(), rows=self.rows,
            one_a_file=self.keeping.one_a_file, by_name=by_name, **more,
        )  # fmt: skip


class _Waiting:
    """Rows of chunks that are not written yet, by column."""

    def __init__(self) -> None:
        self.columns: tuple[list[Any], ...] = ([], [], [], [], [], [])

    def __len__(self) -> int:
        return len(self.columns[0])

    def add(self, job: Job, quick: bytearray, anew: bool) -> None:
        row = (bytes(quick), job.key, json.dumps(job.args), job.seconds, files_of(job), anew)
        for column, value in zip(self.columns, row, strict=True):
            column.append(value)

    def take(self) -> Any:
        """Return the rows as a table, and forget them."""
        import pyarrow as pa

        schema = pa.schema(
            [("quick", pa.binary(16)), ("key", pa.string()), ("args", pa.string()), ("seconds", pa.float64()),
             ("files", pa.string()), ("anew", pa.bool_())]
        )  # fmt: skip
        table = pa.table(list(self.columns), schema)
        for column in self.columns:
            column.clear()
        return table
