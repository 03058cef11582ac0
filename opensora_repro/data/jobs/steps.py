"""What a tool says of its step in a line, for those that run several steps as one plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.jobs.workers import Work

Row = dict[str, Any]


class NeedsAllRows(Exception):
    """What a step does with a row depends on the others: no line has it. The text names the step, and says why."""


@dataclass(frozen=True)
class ToolStep:
    """A step whose tool keeps results of jobs.

    `job` makes the job of a row from the step before, and of `options`; it may make none. `rows` are those that come of
    a job's arguments and its result, with paths that are absolute; of their `columns` rules may speak.
    """

    name: str
    out: Path
    kind: str
    work: Work
    resources: Resources
    rows: Callable[[dict[str, Any], Any], list[Row]]
    columns: Mapping[str, str]
    job: Callable[[Row, dict[str, Any]], Job | None] | None = None  # the first step has none
    options: dict[str, Any] = field(default_factory=dict)
    holds: Callable[[Job, Any], bool] | None = None
    one_a_file: bool = False

    def keeping(self, records: Records) -> Keeping:
        return Keeping(records, self.kind, self.holds, self.one_a_file)


KeyOf = Callable[[str, Row], str]  # of a clip's content and its row: what names the record of what is made of it


@dataclass(frozen=True)
class ClipStep:
    """A step whose tool keeps records by what the clip contains. `rows` are those that come of a row and its record."""

    name: str
    out: Path
    kind: str
    rows: Callable[[Row, Row], list[Row]]
    columns: Mapping[str, str]

    def keeping(self, records: Records) -> Keeping:
        return Keeping(records, self.kind)


@dataclass(frozen=True)
class ModelStep(ClipStep):
    """Clips go to a model in batches, of at most `size` and of their values `shown`; see `run_batches`.

    `ready` looks at the model, of whose files the records may remember what they contain: keys, the work's options.
    """

    work: Work
    ready: Callable[[Records], tuple[KeyOf, dict[str, Any]]]
    shown: tuple[str, ...]
    size: int
    runner: Runner
    resources: Resources


@dataclass(frozen=True)
class AskStep(ClipStep):
    """Each clip is a question to an endpoint, one of several at a time."""

    key: KeyOf
    prompt: Callable[[str, Row], Any]
    completions: Callable[[Iterator[Any], Keeping], Any]  # of prompts, see completions.py
