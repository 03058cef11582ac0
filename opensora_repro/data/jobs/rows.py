"""A Ray actor's part of the work: chunks of rows, each row in a process that may crash or hang, to Parquet parts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.course import Job, record_name
from opensora_repro.data.jobs.workers import (
    DISK_TROUBLE,
    Done,
    Task,
    Worker,
    named_function,
    one_reason,
    surroundings,
    wait,
)
from opensora_repro.data.tables import in_batches
from opensora_repro.files import content_of, read_json, replacing

FLUSH = 20.0  # seconds after which finished rows are a part, whatever else their chunk has to do
DEATHS = 2  # of workers, or of their whole node, that a row may cost
CONTENT = "content of its file"  # in a row that is handed out
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
    then: Following | None = None  # of a line: what is done at once with what a row gave


@dataclass(frozen=True)
class Following:
    """What is done with what a row gave. "module:function" name what makes rows of a job's arguments and its result,
    and of one of them and `options` the next step's job.
    """

    job: str
    options: Row
    order: Order | None  # None: the line ends with the filters, or `hands_out` rows to what is done elsewhere
    rows: str = ""
    filters: tuple[Any, ...] = ()  # that rows go through first, see filter/step.py
    hands_out: bool = False


def folders_of(order: Order) -> list[Path]:
    """Return where the parts of all steps of a line go."""
    return [order.folder, *(folders_of(order.then.order) if order.then and order.then.order else ())]


def files_of(job: Job) -> str | None:
    """Return a job's files as JSON: their names need be no text."""
    return json.dumps([os.path.abspath(file) for file in job.files]) if job.files else None


def is_reject(text: str) -> bool:
    """Whether nothing comes of a result, for those who look at the progress."""
    result = json.loads(text)
    return isinstance(result, dict) and ("error" in result or result.get("clips") == [])


def do_rows(args: Row) -> list[list[Any]]:
    """Job: do several rows, given as JSON; return which results are final, and the results as JSON."""
    work = named_function(args["work"])
    finals, texts = list[bool](), list[str]()
    for row in args["rows"]:
        try:
            texts.append(json.dumps(work(json.loads(row))))
            finals.append(True)
        except (Exception, SystemExit) as error:
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                raise
            texts.append(json.dumps({"error": one_reason(error)}))
            finals.append(False)
    return [finals, texts]


class Rows:
    """Works on the chunks that Ray Data gives it; what ends the whole run comes back as `trouble`.

    A chunk that was begun before, by an actor that is gone, goes on after its finished rows. A row that kills its
    process is tried once more; one that twice was under way when the whole actor died is not tried again.
    """

    def __init__(self, order: Order, process: _Process | None = None) -> None:
        self.order = order
        self.schema = parts.schema_of_parts(order.one_a_file)
        self.num_done = self.num_rejected = 0
        self.process = process or _Process(order.threads)
        self.then = _Then(order.then, self.process) if order.then else None
        self.index: Any = None
        if order.by_name:
            import numpy as np

            self.index = np.load(order.todo / "index.npy", mmap_mode="r")
            names = json.loads((order.todo / "parts.json").read_text(encoding="utf-8"))
            self.texts_of = lru_cache(maxsize=2)(lambda number: parts.read_part(order.folder / names[number], ["text"]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        trouble = ""
        try:
            for number in batch["chunk"].tolist():
                self.num_done += self._chunk(int(number))
        except (OSError, RuntimeError) as error:
            trouble = f"{type(error).__name__} {error}"
        told = {"counts": self.counts(), "rows": self.then.take_rows() if self.then else []}
        return {"told": [json.dumps(told)], "trouble": [trouble]}

    def counts(self) -> list[list[int]]:
        """Return what each step of the line has done since this was asked last: rows, and rejects among them."""
        found, self.num_done, self.num_rejected = [[self.num_done, self.num_rejected]], 0, 0
        return found + (self.then.counts() if self.then else [])

    def _chunk(self, number: int) -> int:
        """Do what is left of a chunk; return how many rows it has."""
        import pyarrow as pa

        todo = parts.read_part(self.order.todo / f"{number:07d}.parquet")
        # In the input's order, in which results are asked for: many small parts become few with neighbours in each
        content = hashlib.blake2b(parts.numbers_of(todo["quick"]).tobytes(), digest_size=8).hexdigest()
        stem, count, finished = f"{self.order.run:019d}-{number:07d}-{content}", 0, set[bytes]()
        while (part := self.order.folder / f"{stem}-{count:04d}.parquet").exists():
            finished.update(parts.read_part(part, ["quick"])["quick"].to_pylist())
            count += 1
        left = (
            todo.filter(pa.array([quick not in finished for quick in todo["quick"].to_pylist()])) if finished else todo
        )
        tries = _Tries(self.order.todo / f"{number:07d}.json")
        waiting, last = list[Any](), time.monotonic()
        args = dict(zip(left["quick"].to_pylist(), left["args"].to_pylist(), strict=True)) if self.then else {}
        for done in self._results(left, tries):
            waiting.append(done)
            if self.then:
                self.num_rejected += is_reject(done["text"])
                self.then.follow(args[done["quick"]], done["text"])
            if time.monotonic() - last > FLUSH:
                self._write(f"{stem}-{count:04d}.parquet", waiting)
                waiting, last, count = [], time.monotonic(), count + 1
        self._write(f"{stem}-{count:04d}.parquet", waiting)
        return int(todo.num_rows)

    def _write(self, name: str, done: Sequence[Any]) -> None:
        """Write a part of finished rows: tables of them, or single ones. What followed from them is there before."""
        import pyarrow as pa

        if self.then:
            self.then.flush(name)
        tables = [one for one in done if not isinstance(one, dict)]
        if rows := [one for one in done if isinstance(one, dict)]:
            tables.append(parts.part_of(rows, self.schema))
        if tables:
            parts.write_part(self.order.folder / name, pa.concat_tables(tables))

    def _results(self, todo: Any, tries: _Tries) -> Iterator[Any]:
        """Yield rows of the parts, single ones or tables of them, in any order."""
        rows = list[Row]()
        if tries.again:
            rows = todo.to_pylist()
            yield from (self._lost(row) for row in rows if tries.is_hopeless(row["quick"].hex()))
            rows = [row for row in rows if not tries.is_hopeless(row["quick"].hex())]
        elif self.order.group:
            for group in in_batches(todo.to_pylist(), self.order.group):
                done = dict(self._group(group))
                rows += [row for row in group if row["quick"] not in done]
                yield from (self._row(row, row["key"], done[row["quick"]]) for row in group if row["quick"] in done)
        elif not self.then and todo["seconds"].null_count == todo["files"].null_count == todo.num_rows:
            for start in range(0, todo.num_rows, self.order.rows):
                bundle = todo.slice(start, self.order.rows)
                if finished := self._bundle(bundle):
                    yield finished
                else:  # the process died
                    rows += bundle.to_pylist()
        else:
            rows = todo.to_pylist()
        for row in rows:
            tries.under_way(row["quick"].hex())
            if not self.order.group:
                yield self._alone(row)
                continue
            done = dict(self._group([row]))
            yield self._row(row, row["key"], done[row["quick"]])

    def _bundle(self, bundle: Any) -> Any:
        """Give rows without files or a time limit to the process at once; return what they are as a part, if it lives.

        None of a row's values becomes an object of this process but its JSON.
        """
        import pyarrow as pa

        texts = bundle["args"].to_pylist()
        results = json.loads(self._ask_for(texts, None, twice=False).text)
        if isinstance(results, dict):
            return None
        columns = {"quick": bundle["quick"], "named": bundle["quick"], "name": bundle["key"], "text": results[1],
                   "final": results[0], "run": pa.repeat(self.order.run, len(texts))}  # fmt: skip
        return pa.table(columns, self.schema)

    def _row(self, row: Row, name: str, done: Done) -> Row:
        named = row["quick"] if name == row["key"] and not row["files"] else parts.named_hash(name)
        return {"quick": row["quick"], "named": named, "name": name, "text": done.text, "final": done.final,
                "run": self.order.run}  # fmt: skip

    def _lost(self, row: Row) -> Row:
        return self._row(row, row["key"], Done.failed(f"its worker was lost {DEATHS} times with its node", final=False))

    def _group(self, rows: Sequence[Row]) -> Iterator[tuple[bytes, Done]]:
        """Give rows to a model together; of a batch that fails nothing comes, of a row alone what it failed of."""
        items = [{"key": row["key"], **json.loads(row["args"])} for row in rows]
        done = self._do({"items": items, **self.order.options}, None, twice=len(rows) == 1)
        clips = json.loads(done.text).get("clips", {})
        for row in rows:
            if row["key"] in clips:
                yield row["quick"], Done(json.dumps(clips[row["key"]]), done.final)
            elif len(rows) == 1:
                yield row["quick"], done

    def _alone(self, row: Row) -> Row:
        """Do one row: find out what its files contain, then the work, unless it is known what comes of these."""
        args, contents = json.loads(row["args"]), list[str]()
        if row["files"]:
            told = self.process.ask(Task("", {}, row["seconds"], tuple(json.loads(row["files"]))), twice=True)
            contents = json.loads(told.text)
            if isinstance(contents, dict):  # the process was lost, or out of time
                return self._row(row, row["key"], Done(told.text, False))
            args["contents"] = contents
        name = record_name(row["key"], contents)
        known = None if row["anew"] or not contents else self._known(name)
        if known is not None:
            return self._row(row, name, Done(known))
        return self._row(row, name, self._do(args, row["seconds"], twice=True))

    def _known(self, name: str) -> str | None:
        """Return the result that was made of the same contents at another place or time."""
        return self._at(parts.find(self.index, parts.as_hashes(parts.named_hash(name))))

    def _at(self, place: Any) -> str | None:
        """Return the result that lies there, of one row."""
        (located,) = place.tolist()
        if located < 0:
            return None
        with suppress(OSError):
            return str(self.texts_of(located >> 32)["text"][located & 0xFFFFFFFF].as_py())
        return None

    def _do(self, args: Row, seconds: float | None, *, twice: bool) -> Done:
        """Return what became of one row, or of one batch."""
        done = self._ask_for([json.dumps(args)], seconds, twice=twice)
        results = json.loads(done.text)
        return done if isinstance(results, dict) else Done(results[1][0], results[0][0])

    def _ask_for(self, texts: Sequence[str], seconds: float | None, *, twice: bool) -> Done:
        """Let the process do rows with these arguments; of several whose process died there is one failure."""
        done = self.process.ask(Task("", {"work": self.order.work, "rows": texts}, seconds), twice=twice)
        if done.text[0] == "{" and self.process.is_alive():
            raise RuntimeError(f"{self.order.work} cannot be imported by a worker: {json.loads(done.text)['error']}")
        return done


class _Process:
    """The process that does an actor's rows, and another one where it died."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.worker: Worker | None = None

    def is_alive(self) -> bool:
        return self.worker is not None and not self.worker.dead

    def ask(self, task: Task, *, twice: bool) -> Done:
        """Let it do a task; `twice`, also where that kills it. What takes too long is asked for once."""
        if self.worker is None or self.worker.dead:
            self.worker = Worker(BUNDLE, surroundings(threads=self.threads))
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
        return self.ask(task, twice=False) if again else done


class _Then:
    """What follows from a row, done by the same process: filters, then the next step, as deep as the line goes."""

    def __init__(self, following: Following, process: _Process) -> None:
        self.following = following
        self.filtered = [[0, 0] for _ in following.filters]
        self.next = _Next(following, following.order, process) if following.order else None
        self.rows = list[Row]()

    def follow(self, args: str, text: str) -> None:
        """Do what follows from a job's arguments and its result, both as JSON."""
        for row in named_function(self.following.rows)(json.loads(args), json.loads(text)):
            if not self._is_kept(row):
                continue
            if self.next:
                self.next.take(row)
            elif self.following.hands_out:
                self.rows.append({**row, CONTENT: content_of(Path(row["path"]))})

    def _is_kept(self, row: Row) -> bool:
        for one, counts in zip(self.following.filters, self.filtered, strict=True):
            kept = one.keeps(row)
            counts[:] = counts[0] + 1, counts[1] + (not kept)
            if not kept:
                return False
        return True

    def counts(self) -> list[list[int]]:
        found, self.filtered = self.filtered, [[0, 0] for _ in self.filtered]
        return found + (self.next.counts() if self.next else [])

    def take_rows(self) -> list[Row]:
        """Return the rows that are handed out since this was asked last, with what their files contain."""
        if self.next:
            return self.next.then.take_rows() if self.next.then else []
        found, self.rows = self.rows, []
        return found

    def flush(self, name: str) -> None:
        """Write what is finished as a part of this name."""
        if self.next:
            self.next.flush(name)


class _Next(Rows):
    """The next step of a line."""

    def __init__(self, following: Following, order: Order, process: _Process) -> None:
        super().__init__(order, process)
        self.job_of, self.options = named_function(following.job), following.options
        self.waiting = list[Row]()

    def take(self, row: Row) -> None:
        """Do the job of a row of the step before, unless it has a result."""
        if (job := self.job_of(row, self.options)) is None:
            return
        quick, told = parts.quick_hash(job), json.dumps(job.args)
        known = self._at(parts.find(self.index, parts.as_hashes(quick)))
        if known is None:
            todo = {"quick": quick, "key": job.key, "args": told, "seconds": job.seconds, "anew": False,
                    "files": files_of(job)}  # fmt: skip
            self.waiting.append(self._alone(todo))
            known = self.waiting[-1]["text"]
            self.num_done, self.num_rejected = self.num_done + 1, self.num_rejected + is_reject(known)
        if self.then:
            self.then.follow(told, known)

    def flush(self, name: str) -> None:
        self._write(name, self.waiting)
        self.waiting = []


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
        with replacing(self.path) as unfinished:  # half of it would tell that nothing had died
            unfinished.write_text(json.dumps({"row": row, "deaths": self.deaths}), encoding="utf-8")
