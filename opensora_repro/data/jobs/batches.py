"""Clips that go to a model in batches, and are known again one by one, whatever batch they were in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Job, Keeping, failures_of
from opensora_repro.data.jobs.keyed import left_of, results_of
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.run import USUAL, Runner, run_over_ray, run_tasks
from opensora_repro.data.jobs.workers import Done, Task, Work
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import Again, in_batches

Record = dict[str, Any]
SENT = 64  # clips that a worker gets at a time where it sizes its batches by itself: all their frames are in memory


def sized_batches(given: int | None, device: str, *, usual: int) -> int:
    """Return how many clips go to a worker at a time; see `in_batches_that_fit` for what it does with them on a GPU."""
    return given or (SENT if device.startswith("cuda") else usual)


def run_batches(
    work: Work,
    items: Iterable[tuple[str, Record]],
    keeping: Keeping,
    *,
    size: int,
    options: Record,
    runner: Runner,
    label: str,
    resources: Resources = USUAL,
) -> Iterable[Record]:
    """Return every item's record in their order, of items with their keys: digests of content and of treatment.

    Items may be of any number, as the jobs of `run_jobs`. `work` gets {"items": a batch, each with its "key",
    **options} and returns {"clips": {key: record}}. What is recorded is not done again. If a batch fails, its items are
    tried one by one; one that fails alone has {"error": ...}.
    """
    if runner.kind == "ray":
        jobs = Again(lambda: (Job(key, "", item) for key, item in items))
        return run_over_ray(work, jobs, keeping, runner, resources, label, "clip", group=size, options=options)
    to_records(keeping)
    failed = failures_of(keeping)
    for step in dict.fromkeys((size, 1)):
        batches = _Batches(items, keeping, failed, step, options)
        with progress(label, batches.count, "batch") as bar:
            for done in run_tasks(work, iter(batches), runner) if batches.count else ():
                bar(done is not None)
                if done is not None:
                    batches.take(*done)
    return results_of((key for key, _ in items), keeping, failed)


class _Batches:
    """Tasks for batches of what is left; of these, the ones are held that are under way."""

    def __init__(
        self, items: Iterable[tuple[str, Record]], keeping: Keeping, failed: str, size: int, options: Record
    ) -> None:
        self.items, self.keeping, self.failed, self.size, self.options = items, keeping, failed, size, options
        self.under_way = dict[str, list[Record]]()
        self.count = -(-sum(1 for _ in left_of(items, keeping, failed)) // size)

    def __iter__(self) -> Iterator[Task]:
        left = ({"key": key, **item} for key, item in left_of(self.items, self.keeping, self.failed))
        for number, batch in enumerate(in_batches(left, self.size)):
            self.under_way[str(number)] = batch
            yield Task(str(number), {"items": batch, **self.options}, None)

    def take(self, number: str, done: Done) -> None:
        batch, result = self.under_way.pop(number), json.loads(done.text)
        found = {batch[0]["key"]: result} if len(batch) == 1 and "error" in result else result.get("clips", {})
        kind = self.keeping.kind if done.final else self.failed
        self.keeping.records.put(kind, {key: json.dumps(record) for key, record in found.items()})
