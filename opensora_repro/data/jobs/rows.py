"""A Ray actor's part of the work: chunks of rows, each row in a process that may crash or hang, to Parquet parts."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.course import record_name
from opensora_repro.data.jobs.workers import DISK_TROUBLE, Done, Task, Worker, one_reason, surroundings, wait
from opensora_repro.data.tables import in_batches
from opensora_repro.files import digest, read_json

FLUSH = 20.0  # seconds after which finished rows are a part, whatever else their chunk has to do
DEATHS = 2  # of workers, or of their whole node, that a row may cost
BUNDLE = "opensora_repro.data.jobs.rows:do_rows"
Row = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """What all actors of a plan do. `todo` holds their chunks, `folder` gets the parts."""

    work: str
    folder: Path
    todo: Path
    run: int
    rows: int = 64  # that their process gets at a time, where they take none
    threads: int = 1
    one_a_file: bool = False
    by_name: bool = False  # whether index.npy in `todo` tells where results lie by their files' contents
    group: int = 0  # rows that the work takes at a time, as {"items": [...], **options}; 0: one, by itself
    options: Row = field(default_factory=dict)


def do_rows(args: Row) -> list[list[Any]]:
    """Job: do several rows; return for each whether its result is final, and the result as JSON."""
    module, name = args["work"].split(":")
    work = getattr(importlib.import_module(module), name)
    results = []
    for row in args["rows"]:
        try:
            results.append([True, json.dumps(work(row))])
        except OSError as error:
            if error.errno in DISK_TROUBLE:
                raise
            results.append([False, json.dumps({"error": one_reason(error)})])
        except (Exception, SystemExit) as error:
            results.append([False, json.dumps({"error": one_reason(error)})])
    return results


class Rows:
    """Works on the chunks that Ray Data gives it; what ends the whole run comes back as `trouble`.

    A chunk that was begun before, by an actor that is gone, goes on after its finished rows. A row that kills its
    process is tried once more; one that twice was under way when the whole actor died is not tried again.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.schema = parts.schema_of_parts(order.one_a_file)
        self.worker: Worker | None = None
        self.index: Any = None
        if order.by_name:
            import numpy as np

            self.index = np.load(order.todo / "index.npy", mmap_mode="r")
            self.parts = json.loads((order.todo / "parts.json").read_text(encoding="utf-8"))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        counts, trouble = [], ""
        for number in batch["chunk"].tolist():
            try:
                counts.append(self._chunk(int(number)))
            except (OSError, RuntimeError) as error:
                trouble = f"{type(error).__name__} {error}"
                counts.append(0)
        return {"rows": counts, "trouble": [trouble] * len(counts)}

    def _chunk(self, number: int) -> int:
        """Do what is left of a chunk; return how many rows it has."""
        rows = parts.read_part(self.order.todo / f"{number:07d}.parquet").to_pylist()
        stem = digest([self.order.run, *(row["quick"].hex() for row in rows)])
        finished, count = set[bytes](), 0
        while (part := self.order.folder / f"{stem}-{count}.parquet").exists():
            finished.update(parts.read_part(part, ["quick"])["quick"].to_pylist())
            count += 1
        left = [row for row in rows if row["quick"] not in finished]
        tries = _Tries(self.order.todo / f"{number:07d}.json")
        waiting, last = list[Row](), time.monotonic()
        for done in self._results(left, tries):
            waiting.append(done)
            if time.monotonic() - last > FLUSH:
                parts.write_part(self.order.folder / f"{stem}-{count}.parquet", waiting, self.schema)
                waiting, last, count = [], time.monotonic(), count + 1
        if waiting:
            parts.write_part(self.order.folder / f"{stem}-{count}.parquet", waiting, self.schema)
        return len(rows)

    def _results(self, rows: Sequence[Row], tries: _Tries) -> Iterator[Row]:
        """Yield rows of the parts, in any order."""
        if tries.again:
            yield from (self._lost(row) for row in rows if tries.is_hopeless(row["quick"].hex()))
            rows = [row for row in rows if not tries.is_hopeless(row["quick"].hex())]
        elif self.order.group:
            groups, rows = in_batches(rows, self.order.group), []
            for group in groups:
                done = dict(self._group(group))
                rows += [row for row in group if row["quick"] not in done]
                yield from (self._row(row, row["key"], done[row["quick"]]) for row in group if row["quick"] in done)
        elif all(row["seconds"] is None and not row["files"] for row in rows):
            bundles, rows = in_batches(rows, self.order.rows), []
            for bundle in bundles:
                found = self._work([json.loads(row["args"]) for row in bundle], None, twice=False)
                if len(found) == len(bundle):
                    yield from (self._row(row, row["key"], done) for row, done in zip(bundle, found, strict=True))
                else:  # the process died
                    rows += bundle
        for row in rows:
            tries.under_way(row["quick"].hex())
            if not self.order.group:
                yield self._alone(row)
                continue
            done = dict(self._group([row]))
            yield self._row(row, row["key"], done[row["quick"]])

    def _row(self, row: Row, name: str, done: Done) -> Row:
        named = row["quick"] if name == row["key"] and not row["files"] else parts.named_hash(name)
        return {"quick": row["quick"], "named": named, "name": name, "text": done.text, "final": done.final,
                "run": self.order.run}  # fmt: skip

    def _lost(self, row: Row) -> Row:
        return self._row(row, row["key"], Done.failed(f"its worker was lost {DEATHS} times with its node", final=False))

    def _group(self, rows: Sequence[Row]) -> Iterator[tuple[bytes, Done]]:
        """Give rows to a model together; of a batch that fails nothing comes, of a row alone what it failed of."""
        items = [{"key": row["key"], **json.loads(row["args"])} for row in rows]
        (done,) = self._work([{"items": items, **self.order.options}], None, twice=len(rows) == 1)
        result = json.loads(done.text)
        clips = result.get("clips", {})
        for row in rows:
            if row["key"] in clips:
                yield row["quick"], Done(json.dumps(clips[row["key"]]), done.final)
            elif len(rows) == 1:
                yield row["quick"], done

    def _alone(self, row: Row) -> Row:
        """Do one row: find out what its files contain, then the work, unless it is known what comes of these."""
        args, contents = json.loads(row["args"]), list[str]()
        if row["files"]:
            told = self._ask(Task("", {}, row["seconds"], tuple(row["files"])), twice=True)
            contents = json.loads(told.text)
            if isinstance(contents, dict):  # the process was lost, or out of time
                return self._row(row, row["key"], Done(told.text, False))
            args["contents"] = contents
        name = record_name(row["key"], contents)
        known = None if row["anew"] or not contents else self._known(name)
        if known is not None:
            return self._row(row, name, Done(known))
        (done,) = self._work([args], row["seconds"], twice=True)
        return self._row(row, name, done)

    def _known(self, name: str) -> str | None:
        """Return the result that was made of the same contents at another place or time."""
        (located,) = parts.find(self.index, parts.as_hashes(parts.named_hash(name))).tolist()
        if located < 0:
            return None
        with suppress(OSError):
            column = parts.read_part(self.order.folder / self.parts[located >> 32], ["text"])["text"]
            return str(column[located & 0xFFFFFFFF].as_py())
        return None

    def _work(self, args: list[Row], seconds: float | None, *, twice: bool) -> list[Done]:
        """Return what became of the rows with these arguments: of several whose process died, one failure."""
        done = self._ask(Task("", {"work": self.order.work, "rows": args}, seconds), twice=twice)
        results = json.loads(done.text)
        if isinstance(results, list):
            return [Done(text, final) for final, text in results]
        if self.worker is not None and not self.worker.dead:
            raise RuntimeError(f"{self.order.work} cannot be imported by a worker: {results['error']}")
        return [done]

    def _ask(self, task: Task, *, twice: bool) -> Done:
        """Let the process do a task; `twice`, also where that kills it. What takes too long is asked for once."""
        if self.worker is None or self.worker.dead:
            self.worker = Worker(BUNDLE, surroundings(threads=self.order.threads))
        worker, done = self.worker, None
        try:
            worker.give(task)
            while done is None:
                if wait([worker]):
                    done = worker.take()
        except BaseException:
            worker.kill()
            raise
        again = twice and worker.dead and worker.deadline > time.monotonic()
        return self._ask(task, twice=False) if again else done


class _Tries:
    """What a chunk's file tells of actors that died over it: how often, and which row was under way."""

    def __init__(self, path: Path) -> None:
        self.path, self.again = path, path.exists()
        told = read_json(path)
        self.deaths: dict[str, int] = told.get("deaths", {})
        if row := told.get("row"):
            self.deaths[row] = self.deaths.get(row, 0) + 1
        self._note("")

    def is_hopeless(self, row: str) -> bool:
        return self.deaths.get(row, 0) >= DEATHS

    def under_way(self, row: str) -> None:
        """Note a row, from the second try on: until then none has to wait for that."""
        if self.again:
            self._note(row)

    def _note(self, row: str) -> None:
        self.path.write_text(json.dumps({"row": row, "deaths": self.deaths}), encoding="utf-8")
