"""A run over a cluster, of which this process holds a few numbers a row: what is left, the plan, results in order."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.cluster import Needs, Place, run_plan
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.rows import Order
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import in_batches
from opensora_repro.files import remove_leftovers

BATCH = 8192  # rows that are looked up at a time
SPREAD = 64  # chunks that little work is spread over, where it has fewer than full ones
GROW, LARGEST = 256, 4  # after so many chunks they are twice as large, and so on, so many times at most
ROUNDS = 3  # plans of a run: a second one for results that no longer hold, a third for what was lost twice


@dataclass(frozen=True)
class Table:
    """Rows that may be read again and again, in batches: their `quick` hashes, 16 bytes each, and their jobs.

    A job is made of a row only where that is to be done.
    """

    batches: Callable[[], Iterator[Any]]  # lists, or anything with a length
    hashes: Callable[[Any], bytes]
    job: Callable[[Any, int], Job]

    @classmethod
    def of_jobs(cls, jobs: Iterable[Job]) -> Table:
        """`jobs` is a list, or gives a new iterator every time it is asked for one."""

        def hashes(batch: list[Job]) -> bytes:
            return b"".join(map(parts.quick_hash, batch))

        return cls(lambda: in_batches(jobs, BATCH), hashes, lambda batch, at: batch[at])


class Results:
    """The results of a run in the order of its jobs, as often as they are asked for; read when they are."""

    def __init__(self, index: parts.Index, order: Path) -> None:
        self.index, self.order = index, order

    def __len__(self) -> int:
        return self.order.stat().st_size // 16

    def texts(self) -> Iterator[list[str]]:
        """Yield results as JSON, some thousand at a time."""
        with self.order.open("rb") as file:
            while data := file.read(16 * BATCH):
                yield self.index.texts(self.index.find(parts.as_hashes(data)))

    def __iter__(self) -> Iterator[Any]:
        for texts in self.texts():
            yield from map(json.loads, texts)


def run_streamed(
    work: str,
    table: Table,
    keeping: Keeping,
    *,
    needs: Needs,
    place: Place,
    label: str,
    unit: str = "file",
    group: int = 0,
    options: dict[str, Any] | None = None,
) -> Results:
    """Do what has no result yet; return the results of all rows. See `run_jobs`, and `Order` for `group`."""
    parts.from_records(keeping)
    run = _Run(table, keeping, needs.rows if not group else max(1, needs.rows // group) * group)
    for number in range(ROUNDS):
        chunks, left = run.write_todo(anew=number > 0)
        if not left:
            shutil.rmtree(run.todo)
            return Results(run.index, run.order)
        by_name = run.write_index()
        order = Order(
            work, run.folder.absolute(), run.todo.absolute(), run.began, rows=run.rows, threads=max(1, int(needs.cpus)),
            one_a_file=keeping.one_a_file, by_name=by_name, group=group, options=options or {},
        )  # fmt: skip
        with progress(label, left, unit) as bar:
            for count in run_plan(order, chunks, needs, place):
                bar(count)
    raise RuntimeError(f"{run.folder}: holds no result for some of the work, as if it was not shared by all nodes")


class _Run:
    """The files of one run: chunks of what is left, and the order in which results are asked for."""

    def __init__(self, table: Table, keeping: Keeping, rows: int) -> None:
        self.table, self.keeping, self.rows = table, keeping, rows
        self.folder = parts.folder_of(keeping.records, keeping.kind)
        self.todo, self.order, self.began = self.folder / "todo", self.folder / "order", time.time_ns()
        self.taken_over = keeping.records.num_taken_over(keeping.kind)
        self.index: parts.Index
        self.num_files = 0
        remove_leftovers(self.folder)

    def write_todo(self, *, anew: bool) -> tuple[int, int]:
        """Write chunks of the rows that are left; return how many chunks and rows. `anew`: whatever is known."""
        self.index = parts.Index(self.folder, self.began)
        shutil.rmtree(self.todo, ignore_errors=True)
        self.todo.mkdir(parents=True)
        chunks, left = 0, 0
        waiting: list[dict[str, Any]] = []
        with self.order.open("wb") as order:
            for batch in self.table.batches():
                hashes = bytearray(self.table.hashes(batch))
                for at, spoilt in self._left_in(batch, hashes, anew):
                    quick = bytes(hashes[16 * at : 16 * at + 16])
                    waiting.append(self._row(self.table.job(batch, at), quick, anew or spoilt))
                    left += 1
                order.write(hashes)
                while len(waiting) >= self.rows * SPREAD:
                    size = self.rows << min(chunks // GROW, LARGEST)
                    self._write(chunks, waiting[:size])
                    del waiting[:size]
                    chunks += 1
        size = max(1, min(self.rows, -(-left // SPREAD)))
        for rows in in_batches(waiting, size):
            self._write(chunks, rows)
            chunks += 1
        return chunks, left

    def _left_in(self, batch: Any, hashes: bytearray, anew: bool) -> Iterator[tuple[int, bool]]:
        """Yield the rows that have no result, or (True) one that no longer holds; twins once.

        `hashes` are made those of what was found.
        """
        import numpy as np

        keys = parts.as_hashes(bytes(hashes))
        located = self.index.find(keys)
        if self.taken_over:
            for at in np.flatnonzero(located < 0).tolist():
                if earlier := self.table.job(batch, at).earlier:
                    name = parts.named_hash(earlier)
                    if (place := self.index.find(parts.as_hashes(name))[0]) >= 0:
                        located[at], hashes[16 * at : 16 * at + 16] = place, name
        spoilt = set[int]()
        if self.keeping.holds:
            there = np.flatnonzero(located >= 0)
            for at, text in zip(there.tolist(), self.index.texts(located[there]), strict=True):
                result = json.loads(text)
                failed = anew and "error" in result  # in this run
                if not failed and not self.keeping.holds(self.table.job(batch, at), result):
                    located[at] = -1
                    spoilt.add(at)
        seen = set[bytes]()
        for at in np.flatnonzero(located < 0).tolist():
            key = bytes(hashes[16 * at : 16 * at + 16])
            if key not in seen:
                seen.add(key)
                yield at, at in spoilt

    def _row(self, job: Job, quick: bytes, anew: bool) -> dict[str, Any]:
        self.num_files += len(job.files)
        files = [os.path.abspath(file) for file in job.files]
        return {"quick": quick, "key": job.key, "args": json.dumps(job.args), "seconds": job.seconds,
                "files": files, "anew": anew}  # fmt: skip

    def _write(self, number: int, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [("quick", pa.binary(16)), ("key", pa.string()), ("args", pa.string()), ("seconds", pa.float64()),
             ("files", pa.list_(pa.string())), ("anew", pa.bool_())]
        )  # fmt: skip
        pq.write_table(pa.Table.from_pylist(rows, schema), self.todo / f"{number:07d}.parquet", compression="zstd")

    def write_index(self) -> bool:
        """Leave to the workers what is known by files' contents, if any of the rows has files."""
        import numpy as np

        if not self.num_files:
            return False
        np.save(self.todo / "index.npy", self.index.entries)
        (self.todo / "parts.json").write_text(json.dumps([part.name for part in self.index.parts]), encoding="utf-8")
        return True
