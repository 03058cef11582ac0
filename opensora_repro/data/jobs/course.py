"""Which of a run's jobs are done and what is to be done next, where jobs are known by what their files contain."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.workers import Done, Task
from opensora_repro.files import Sha256Memo, digest, size_and_time

CONTENTS = "sha256"  # the kind of records that remember files' contents


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
    """A job, and what is known by now of its record's name, which its files' contents decide."""

    job: Job
    name: str = ""
    contents: list[str] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)  # the files' sizes and times when a worker was told to read them
    failure: Any = None  # why it could not


def record_name(key: str, contents: Sequence[str]) -> str:
    """Return a record's name: how the work is done, and what its files contain."""
    return f"{digest(contents)}-{key}" if contents else key


def memo_of(records: Records) -> Sha256Memo:
    """Return what `records` remember of files' contents."""
    return Sha256Memo(
        lambda place: records.get(CONTENTS, [place]).get(place),
        lambda place, facts: records.put(CONTENTS, {place: json.dumps(facts)}),
    )


class Course:
    """An iterator over tasks that may go on after its end: what a worker finds in a file decides what comes next."""

    def __init__(self, jobs: Sequence[Job], keeping: Keeping) -> None:
        self.keeping, self.records = keeping, keeping.records
        alike = {(job.key, job.files): _Piece(job) for job in jobs}
        self.places = [alike[job.key, job.files] for job in jobs]
        self.pieces = list(alike.values())
        self.found: dict[str, Any] = {}  # results by record
        self.waiting: Counter[str] = Counter()  # jobs by the record that is being made: twins need it made once
        self.memo = memo_of(self.records)
        self._look_up()
        left = [number for number, piece in enumerate(self.pieces) if piece.name not in self.found]
        self.num_left, self.queue = len(left), deque(number for number in left if self._is_first(number))

    def _look_up(self) -> None:
        """Take the results that are recorded, as far as it is remembered what the files contain."""
        for piece in self.pieces:
            contents = [self.memo.recall(file) for file in piece.job.files]
            if None not in contents:
                self._name(piece, [text for text in contents if text])
        self._take_recorded({piece.name: piece.job for piece in self.pieces if piece.name})
        if self.records.num_taken_over(self.keeping.kind):
            left = [piece for piece in self.pieces if piece.job.earlier and piece.name not in self.found]
            self._take_recorded({piece.job.earlier: piece.job for piece in left})
            for piece in left:
                if piece.job.earlier in self.found:
                    piece.name = piece.job.earlier

    def _name(self, piece: _Piece, contents: list[str]) -> None:
        piece.contents = contents
        piece.name = record_name(piece.job.key, contents)

    def _take_recorded(self, jobs: Mapping[str, Job]) -> None:
        for name, result in self.records.get(self.keeping.kind, jobs).items():
            if self.keeping.holds is None or self.keeping.holds(jobs[name], result):
                self.found[name] = result

    def _is_first(self, number: int) -> bool:
        """Whether this job is to be handed out: to read its files, or to do what is not under way for a twin."""
        name = self.pieces[number].name
        self.waiting[name] += bool(name)
        return self.waiting[name] <= 1

    def __iter__(self) -> Course:
        return self

    def __next__(self) -> Task:
        """Return the next task: to tell what a job's files contain, or, where that is known, to do it."""
        if not self.queue:
            raise StopIteration
        number = self.queue.popleft()
        piece, job = self.pieces[number], self.pieces[number].job
        if not piece.name:
            piece.before = [size_and_time(file) for file in job.files]
            return Task(str(number), {}, job.seconds, tuple(os.path.abspath(file) for file in job.files))
        if self.keeping.one_a_file:
            self.records.drop(self.keeping.kind, f"{digest(piece.contents)}-")
        return Task(str(number), {**job.args, "contents": piece.contents} if job.files else job.args, job.seconds)

    def take(self, key: str, done: Done) -> int:
        """Take what became of a task; return how many jobs have their results by that."""
        piece, result = self.pieces[int(key)], json.loads(done.text)
        if piece.name:
            if done.final:
                self.records.put(self.keeping.kind, {piece.name: done.text})
            self.found[piece.name] = result
            return self.waiting[piece.name]
        if isinstance(result, dict):  # the worker was lost, or out of time
            piece.failure = result
            return 1
        for file, before, content in zip(piece.job.files, piece.before, result, strict=True):
            self.memo.remember(file, before, content)
        self._name(piece, result)
        if piece.name not in self.waiting:
            self._take_recorded({piece.name: piece.job})
        if piece.name in self.found:
            return 1
        if self._is_first(int(key)):
            self.queue.appendleft(int(key))
        return 0

    def results(self) -> list[Any]:
        """Return the jobs' results in their order."""
        return [piece.failure or self.found[piece.name] for piece in self.places]
