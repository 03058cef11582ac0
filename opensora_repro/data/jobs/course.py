"""Which of a run's jobs are done and what is to be done next, where jobs are known by what their files contain."""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.records import Records, Spool
from opensora_repro.data.jobs.workers import Done, Task
from opensora_repro.data.tables import in_batches
from opensora_repro.files import Sha256Memo, digest, size_and_time
from opensora_repro.storage.addresses import address_of

CONTENTS = "sha256"  # the kind of records that remember files' contents
LOOKED_UP = 256  # jobs at a time: there are results that hold hundreds of clips
SPOILT = -1
Files = tuple[str, tuple[Path, ...]]  # with how they are treated


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    key: str  # digest of how it is done: names its record, together with what `files` contain
    name: str  # for messages
    args: dict[str, Any]  # JSON-able, given to `work`; beside them the files' digests as "contents"
    seconds: float | None = None  # that it may take
    files: tuple[Path, ...] = ()  # what it is done with
    earlier: str = ""  # its record's name in releases that knew files by their place


@dataclass(frozen=True)
class Keeping:
    """Where results are kept: as records of a kind, which count while `holds`, if there is one, says so.

    With `one_a_file`, what is made of a file under one key replaces what was made of it under others.
    """

    records: Records
    kind: str
    holds: Callable[[Job, Any], bool] | None = None
    one_a_file: bool = False


@dataclass
class _Piece:
    """A job on its way, and what is known by now of its record's name, which its files' contents decide."""

    number: int
    job: Job
    name: str = ""
    contents: list[str] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)  # the files' sizes and times when a worker was told to read them

    @property
    def of(self) -> Files:
        return self.job.key, self.job.files


def record_name(key: str, contents: Sequence[str]) -> str:
    """Return a record's name: how the work is done, and what its files contain."""
    return f"{digest(contents)}-{key}" if contents else key


def failures_of(keeping: Keeping) -> str:
    """Return the kind of what fails in one run and is tried again by the next; what a killed one left is deleted."""
    kind = f"failed {keeping.kind}"
    keeping.records.drop(kind, "")
    return kind


def memo_of(records: Records) -> Sha256Memo:
    """Return what `records` remember of files' contents."""
    return Sha256Memo(
        lambda place: records.get(CONTENTS, [place]).get(place),
        lambda place, facts: records.put(CONTENTS, {place: json.dumps(facts)}),
    )


class Course:
    """An iterator over tasks that may go on after its end: what a worker finds in a file decides what comes next.

    Of a job 8 bytes are held: where its result lies in the records. Jobs are made when their turns come, by an iterable
    that gives them anew whenever it is asked. What fails for now is recorded apart, and forgotten with the run.
    """

    def __init__(self, jobs: Iterable[Job], keeping: Keeping) -> None:
        self.jobs, self.keeping, self.records = jobs, keeping, keeping.records
        self.heard: Callable[[Job, int], None] | None = None  # is told where a job's result lies when that is there
        self.tells_known = False  # it is told of results that were there before, too
        self.failed, self.has_failures = failures_of(keeping), False
        self.memo = memo_of(self.records)
        self.places = array("q")  # 0: no result yet, SPOILT: one that no longer holds
        self.of_store = False  # whether files are objects
        for batch in in_batches(jobs, LOOKED_UP):
            self.of_store = self.of_store or any(address_of(file) for job in batch for file in job.files)
            self.places.extend(self._find_recorded(batch))
        self.num_left = sum(place <= 0 for place in self.places)
        self.left, self.queue, self.is_over = self._left(), deque[_Piece](), False
        self.given = dict[str, _Piece]()  # by their tasks' keys
        self.reading = dict[Files, list[_Piece]]()  # jobs whose files are being read, by these
        self.unread = dict[Files, int]()  # where it is told why files could not be
        self.waiting = dict[str, list[_Piece]]()  # jobs by the record that is being made: twins need it made once
        self.made_again = set[str]()  # records that did not hold
        self.num_new = 0  # results since `take_new`

    def _find_recorded(self, jobs: Sequence[Job]) -> list[int]:
        """Return where the jobs' results lie, as far as it is remembered what their files contain."""
        pieces = [_Piece(0, job) for job in jobs]
        for piece in pieces:
            self._recall(piece)
        found = self._places(jobs, [piece.name for piece in pieces])
        if self.records.num_taken_over(self.keeping.kind):
            earlier = self._places(jobs, [job.earlier for job in jobs])
            found = [place if place > 0 else before or place for place, before in zip(found, earlier, strict=True)]
        return found

    def _recall(self, piece: _Piece) -> None:
        contents = [self.memo.recall(file) for file in piece.job.files]
        if None not in contents:
            self._name(piece, [text for text in contents if text])

    def _name(self, piece: _Piece, contents: list[str]) -> None:
        piece.contents = contents
        piece.name = record_name(piece.job.key, contents)

    def _places(self, jobs: Sequence[Job], names: Sequence[str]) -> list[int]:
        kind, holds = self.keeping.kind, self.keeping.holds
        known = self.records.places(kind, [name for name in names if name])
        found = [known.get(name, 0) for name in names]
        if holds and known:
            results = self.records.get(kind, known)
            pairs = zip(found, jobs, names, strict=True)
            found = [SPOILT if at and not holds(job, results[name]) else at for at, job, name in pairs]
        return found

    def _left(self) -> Iterator[_Piece | None]:
        """Yield what has no result; None after each job whose result was there and is told."""
        start = 0
        for batch in in_batches(self.jobs, LOOKED_UP):
            for number, job in enumerate(batch, start):
                if self.places[number] <= 0:
                    piece = _Piece(number, job)
                    self._recall(piece)
                    yield piece
                elif self.heard and self.tells_known:
                    self.heard(job, self.places[number])
                    yield None
            start += len(batch)
        self.is_over = True

    def add(self, job: Job) -> None:
        """Add a job that was not known at the beginning, and none of the jobs gives again."""
        piece = _Piece(len(self.places), job)
        self._recall(piece)
        (place,) = self._places([job], [piece.name])
        self.places.append(place)
        if place > 0:
            self._found([piece], place)
        else:
            self.queue.append(piece)

    def __iter__(self) -> Course:
        return self

    def __next__(self) -> Task:
        """Return the next task: to tell what a job's files contain, or, where that is known, to do it."""
        while True:
            piece = self.queue.popleft() if self.queue else next(self.left)
            if piece is None:
                raise StopIteration  # for now: whoever was told may have something to do first
            if not (self._has_result(piece) if piece.name else self._is_read(piece)):
                return self._task(piece)

    def _task(self, piece: _Piece) -> Task:
        key, job = str(piece.number), piece.job
        self.given[key] = piece
        if not piece.name:
            piece.before = [size_and_time(file) for file in job.files]
            return Task(key, {}, job.seconds, tuple(os.path.abspath(file) for file in job.files))
        self.waiting[piece.name] = [piece]
        if self.keeping.one_a_file:
            self.records.drop(self.keeping.kind, f"{digest(piece.contents)}-", but=piece.name)
        return Task(key, {**job.args, "contents": piece.contents} if job.files else job.args, job.seconds)

    def _is_read(self, piece: _Piece) -> bool:
        """Whether a job's files are being read for another one, or could not be."""
        twins = self.reading.setdefault(piece.of, [])
        twins.append(piece)
        if unread := self.unread.get(piece.of):
            del self.reading[piece.of]
            self._found([piece], unread)
        return bool(unread) or len(twins) > 1

    def _has_result(self, piece: _Piece) -> bool:
        """Whether a twin has made a job's result since it was looked for, or is at it."""
        if piece.name in self.waiting:
            self.waiting[piece.name].append(piece)
            return True
        place = 0
        if self.places[piece.number] != SPOILT or piece.name in self.made_again:
            (place,) = self._places([piece.job], [piece.name])
        if place == SPOILT:
            self.places[piece.number] = SPOILT
        if place <= 0 and self.has_failures:
            place = self.records.places(self.failed, [piece.name]).get(piece.name, 0)
        if place > 0:
            self._found([piece], place)
        return place > 0

    def take(self, key: str, done: Done) -> None:
        """Take what became of a task."""
        piece = self.given.pop(key)
        twins = [] if piece.name else self.reading.pop(piece.of)
        if twins and isinstance(contents := json.loads(done.text), list):
            for file, before, content in zip(piece.job.files, piece.before, contents, strict=True):
                self.memo.remember(file, before, content)
            for twin in twins:
                self._name(twin, contents)
            self.queue.extendleft(reversed(twins))
            return
        if self.places[piece.number] == SPOILT:
            self.made_again.add(piece.name)
        final = done.final and not twins  # else the worker was lost, or out of time, before it could read
        self.has_failures = self.has_failures or not final
        kind, name = self.keeping.kind if final else self.failed, piece.name or key
        self.records.put(kind, {name: done.text})
        place = self.records.places(kind, [name])[name]
        if twins:
            self.unread[piece.of] = place
        self._found(twins or self.waiting.pop(name), place)

    def _found(self, pieces: Sequence[_Piece], place: int) -> None:
        for piece in pieces:
            self.places[piece.number] = place
            if self.heard:
                self.heard(piece.job, place)
        self.num_new += len(pieces)

    def take_new(self) -> int:
        """Return how many jobs have their results since this was asked last."""
        new, self.num_new = self.num_new, 0
        return new

    def results(self) -> Spool:
        """Return the jobs' results in their order."""
        found = Spool(self.records.path.parent)
        for start in range(0, len(self.places), LOOKED_UP):
            found.add(self.records.texts_at(self.places[start : start + LOOKED_UP]))
        self.records.drop(self.failed, "")
        return found
