"""Several steps of a line as one plan on this machine: the same processes do all of them, the last ones first.

Rows wait where a step is slower than those before it, and while too many do, nothing is begun anew. Models have
processes of their own, questions to an endpoint threads; all of them work side by side.
"""

from __future__ import annotations

import json
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.course import Course, Job, failures_of, memo_of
from opensora_repro.data.jobs.gpus import visible_gpus
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.rows import CONTENT, is_reject
from opensora_repro.data.jobs.run import Runner, name_of
from opensora_repro.data.jobs.steps import AskStep, ClipStep, KeyOf, ModelStep, Row, ToolStep
from opensora_repro.data.jobs.workers import Done, Pool, Task, named_function, num_cores, wait
from opensora_repro.data.progress import progress_of_line
from opensora_repro.storage.scratch import ready

MOST_WAITING = 4096  # rows before models and endpoints
PAUSE = 0.05  # seconds between two looks at what threads do
ANY_WORK = "opensora_repro.data.jobs.local_line:do_work"


def run_here(steps: Sequence[Any], jobs: Iterable[Job], runner: Runner, *, known_too: bool, told: str) -> None:
    """Do the first step's jobs that have no result yet, and of each what follows from it; `told` is printed first.

    `known_too`: also what follows from results that are there. What fails for now has no lasting result: the step's own
    tool tries it again. Raises as `run_jobs` does.
    """
    with ExitStack() as opened:
        records = {folder: opened.enter_context(Records(folder)) for folder in {s.out: s for s in steps if _keeps(s)}}
        keepings = [step.keeping(records[step.out]) if _keeps(step) else None for step in steps]
        if any(keeping.records.num_taken_over(keeping.kind) for keeping in keepings if keeping):
            return  # the tools know how an earlier release named what it did
        for keeping in filter(None, keepings):
            to_records(keeping)
        line = _Line(steps, keepings, jobs, runner, known_too)
        opened.callback(line.end)
        first = line.tools[0].course
        if not (todo := len(first.places) if known_too else first.num_left):
            return
        print(told, flush=True)
        with progress_of_line([step.name for step in steps], todo) as tell:
            while line.go_on():
                tell(line.counts())
            tell(line.counts())
        for keeping in filter(None, keepings):
            failures_of(keeping)


def _keeps(step: Any) -> bool:
    return isinstance(step, ToolStep | ClipStep)


def do_work(args: Row) -> Any:
    """Job: the work of any step."""
    return named_function(args["work"])(args["args"])


_Shift = tuple[Pool, Callable[[], Task | None], Callable[[str, Done], None]]  # processes, what they do, what came of it


class _Line:
    """The steps' places, and the processes that work for them."""

    def __init__(
        self, steps: Sequence[Any], keepings: Sequence[Any], jobs: Iterable[Job], runner: Runner, known_too: bool
    ) -> None:
        self.places = _places_of(steps, keepings, jobs)
        self.tools = [place for place in self.places if isinstance(place, _Jobs)]
        self.clips = [place for place in self.places if isinstance(place, _Clips)]
        first = self.tools[0].course
        first.tells_known = known_too
        self.pools: list[_Shift] = [(Pool(ANY_WORK, runner.workers or num_cores()), self._next_job, self._take_job)]
        self.pools += [(p.pool, p.next_batch, p.take_batch) for p in self.places if isinstance(p, _Batches)]
        if first.of_store:
            ready()

    def end(self) -> None:
        for pool, _, _ in self.pools:
            pool.close()
        for place in self.clips:
            place.end()

    def counts(self) -> list[list[int]]:
        return [place.take_counts() for place in self.places]

    def go_on(self) -> bool:
        """Give out what is to be done, and wait for what is done, a second at most; return whether there is more."""
        for place in self.clips:
            place.look()
        for pool, next_task, _ in self.pools:
            pool.fill(iter(next_task, None))
        busy = {worker: (pool, take) for pool, _, take in self.pools for worker in pool.busy}
        waiting = any(place.is_under_way() for place in self.clips)
        if not busy and not waiting:
            return any(place.let_go() for place in self.clips)
        for worker in wait(list(busy)) if busy else ():
            pool, take = busy[worker]
            if done := pool.take(worker):
                take(worker.task.key, done)
        if waiting and not busy:
            time.sleep(PAUSE)
        return True

    def _next_job(self) -> Task | None:
        """Return what is to be done next: of the last step that has something, unless too much waits behind them."""
        full = False
        while not full:
            full = sum(place.num_waiting() for place in self.clips) >= MOST_WAITING
            for number, place in reversed(list(enumerate(self.tools))):
                if (number or not full) and (task := next(place.course, None)):
                    args = {"work": name_of(place.step.work), "args": task.args}
                    return replace(task, key=f"{number} {task.key}", args=args)
            full = full or self.tools[0].course.is_over
        return None

    def _take_job(self, key: str, done: Done) -> None:
        number, _, name = key.partition(" ")
        self.tools[int(number)].course.take(name, done)


class Asked:
    """The end of a line whose other steps are done elsewhere: filters, and clips that an endpoint is asked about."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.opened = ExitStack()
        keepings = [_keeps(one) and one.keeping(self.opened.enter_context(Records(one.out))) for one in steps]
        self.places = _places_of(steps, keepings, [])
        self.clips = [place for place in self.places if isinstance(place, _Clips)]
        self.keepings = list(filter(None, keepings))

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        for place in self.clips:
            place.end()
        for keeping in self.keepings:
            failures_of(keeping)
        self.opened.close()

    def take(self, rows: Iterable[Row]) -> list[list[int]]:
        """Go on with rows, and with what has been answered; return what the steps have done since."""
        for row in rows:
            self.places[0].take(row)
        for place in self.clips:
            place.look()
        return [place.take_counts() for place in self.places]

    def rest(self) -> Iterator[list[list[int]]]:
        """Wait for the answers that are still to come."""
        while any(place.is_under_way() for place in self.clips):
            time.sleep(PAUSE)
            yield self.take([])


def _places_of(steps: Sequence[Any], keepings: Sequence[Any], jobs: Iterable[Job]) -> list[_Place]:
    places, then = list[_Place](), None
    for number, (step, keeping) in reversed(list(enumerate(zip(steps, keepings, strict=True)))):
        given = (jobs if number == 0 else [],) if isinstance(step, ToolStep) else ()
        then = _KINDS[type(step)](step, keeping, then, *given) if keeping else _Filter(step, None, then)
        places.insert(0, then)
    return places


class _Place:
    """A step's place in the line: it takes rows, counts them, and passes on what comes of them."""

    def __init__(self, step: Any, keeping: Any, then: _Place | None) -> None:
        self.step, self.keeping, self.then = step, keeping, then
        self.num_done = self.num_rejected = 0

    def take_counts(self) -> list[int]:
        """Return how many rows were done since this was asked last, and how many of these are rejects."""
        found, self.num_done, self.num_rejected = [self.num_done, self.num_rejected], 0, 0
        return found

    def done(self, rows: Iterable[Row], *, rejected: bool) -> None:
        self.num_done, self.num_rejected = self.num_done + 1, self.num_rejected + rejected
        if self.then:
            for row in rows:
                self.then.take(row)

    def take(self, row: Row) -> None:
        raise NotImplementedError


class _Filter(_Place):
    def take(self, row: Row) -> None:
        kept = self.step.keeps(row)
        self.done([row] if kept else [], rejected=not kept)


class _Jobs(_Place):
    """A step whose results are those of jobs: they are known by what their files contain."""

    def __init__(self, step: ToolStep, keeping: Any, then: _Place | None, jobs: Iterable[Job]) -> None:
        super().__init__(step, keeping, then)
        self.course = Course(jobs, keeping)
        self.course.heard = self._heard

    def take(self, row: Row) -> None:
        if job := self.step.job(row, self.step.options):
            self.course.add(job)

    def _heard(self, job: Job, place: int) -> None:
        (text,) = self.keeping.records.texts_at([place])
        self.done(self.step.rows(job.args, json.loads(text)), rejected=is_reject(text))


class _Clips(_Place):
    """A step whose results are known by what the clip contains, which threads look up."""

    def __init__(self, step: ClipStep, keeping: Any, then: _Place | None) -> None:
        super().__init__(step, keeping, then)
        self.memo, self.readers = memo_of(keeping.records), ThreadPoolExecutor(1)
        self.read: queue.SimpleQueue[tuple[Row, Future[str]]] = queue.SimpleQueue()
        self.num_reading = 0
        self.under_way = dict[str, list[Row]]()  # by the names of the records that are being made

    def take(self, row: Row) -> None:
        if CONTENT in row:  # whoever gives the row has read the clip
            self._known(row, row.pop(CONTENT))
            return
        self.num_reading += 1
        reading = self.readers.submit(self.memo, Path(row["path"]))
        reading.add_done_callback(lambda reading: self.read.put((row, reading)))

    def look(self) -> None:
        """Go on with the rows whose clips have been read."""
        while not self.read.empty():
            row, reading = self.read.get()
            self.num_reading -= 1
            self._known(row, reading.result())

    def _known(self, row: Row, content: str) -> None:
        """Go on with a row, by what its clip contains."""
        key = self.key_of(content, row)
        known = self.keeping.records.get(self.keeping.kind, [key])
        if key in self.under_way:
            self.under_way[key].append(row)
        elif key in known:
            self._passed(row, known[key])
        else:
            self.under_way[key] = [row]
            self.begin(key, row)

    def key_of(self, content: str, row: Row) -> str:
        raise NotImplementedError

    def begin(self, key: str, row: Row) -> None:
        raise NotImplementedError

    def has_record(self, key: str, record: Row | None) -> None:
        """Pass on the rows of a record; None: there is none for now."""
        for row in self.under_way.pop(key):
            self._passed(row, record or {"error": ""})

    def _passed(self, row: Row, record: Row) -> None:
        rows = self.step.rows(row, record) if "error" not in record else []
        self.done(rows, rejected=not rows)

    def num_waiting(self) -> int:
        return self.num_reading + len(self.under_way)

    def is_under_way(self) -> bool:
        """Whether threads are at work."""
        return self.num_reading > 0

    def let_go(self) -> bool:
        """Begin with few rows together, since no more are to come; return whether there were some."""
        return False

    def end(self) -> None:
        self.readers.shutdown(cancel_futures=True)


class _Batches(_Clips):
    """Clips that go to a model's processes together."""

    def __init__(self, step: ModelStep, keeping: Any, then: _Place | None) -> None:
        super().__init__(step, keeping, then)
        self.model: tuple[KeyOf, Row] | None = None  # looked at when there is a clip for it
        self.pool = Pool(name_of(step.work), step.runner.workers, visible_gpus() if step.runner.gpu else ())
        self.items, self.least = deque[Row](), step.size
        self.batches = dict[str, list[str]]()  # keys of what is with the processes

    def key_of(self, content: str, row: Row) -> str:
        self.model = self.model or self.step.ready(self.keeping.records)
        return self.model[0](content, row)

    def begin(self, key: str, row: Row) -> None:
        self.items.append({"key": key, **{name: row[name] for name in self.step.shown}})

    def next_batch(self) -> Task | None:
        if not self.items or len(self.items) < self.least:
            return None
        batch = [self.items.popleft() for _ in range(min(self.step.size, len(self.items)))]
        self.least, name = self.step.size, batch[0]["key"]
        self.batches[name] = [item["key"] for item in batch]
        options = self.model[1] if self.model else {}
        return Task(name, {"items": batch, **options}, None)

    def take_batch(self, name: str, done: Done) -> None:
        """Keep what came of a batch; of one that failed the tool finds out in its turn whose fault that was."""
        found = json.loads(done.text).get("clips", {}) if done.final else {}
        self.keeping.records.put(self.keeping.kind, {key: json.dumps(record) for key, record in found.items()})
        for key in self.batches.pop(name):
            self.has_record(key, found.get(key))

    def let_go(self) -> bool:
        self.least = 1
        return bool(self.items)


class _Questions(_Clips):
    """Clips that an endpoint is asked about."""

    def __init__(self, step: AskStep, keeping: Any, then: _Place | None) -> None:
        super().__init__(step, keeping, then)
        self.prompts = queue.SimpleQueue[Any]()
        self.completions: Any = None

    def key_of(self, content: str, row: Row) -> str:
        return str(self.step.key(content, row))

    def begin(self, key: str, row: Row) -> None:
        if not self.completions:
            self.completions = self.step.completions(self._asked(), self.keeping)
        self.prompts.put(self.step.prompt(key, row))

    def _asked(self) -> Iterator[Any]:
        """Yield prompts, to one thread at a time, which waits for the next; None ends it."""
        return iter(self.prompts.get, None)

    def look(self) -> None:
        super().look()
        while self.completions and (found := self.completions.take(0.0)):
            self.has_record(*found)

    def is_under_way(self) -> bool:
        return self.num_waiting() > 0

    def end(self) -> None:
        super().end()
        if self.completions:
            self.prompts.put(None)
            self.completions.end()


_KINDS: dict[type, Any] = {ToolStep: _Jobs, ModelStep: _Batches, AskStep: _Questions}
