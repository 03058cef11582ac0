"""Clips that go to a model in batches, and are known again one by one, whatever batch they were in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opensora_repro.data.jobs.cluster import Needs
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.run import USUAL, Runner, run_over_ray, run_tasks
from opensora_repro.data.jobs.workers import Task, Work
from opensora_repro.data.progress import progress

Record = dict[str, Any]
SENT = 64  # clips that a worker gets at a time where it sizes its batches by itself: all their frames are in memory


def sized_batches(given: int | None, device: str, *, usual: int) -> int:
    """Return how many clips go to a worker at a time; see `in_batches_that_fit` for what it does with them on a GPU."""
    return given or (SENT if device.startswith("cuda") else usual)


def run_batches(
    work: Work,
    items: Mapping[str, Record],
    keeping: Keeping,
    *,
    size: int,
    options: Record,
    runner: Runner,
    label: str,
    needs: Needs = USUAL,
) -> dict[str, Record]:
    """Return every item's record by its key, a digest of its content and of how it is treated.

    `work` gets {"items": a batch, each with its "key", **options} and returns {"clips": {key: record}}. What is
    recorded is not done again. If a batch fails, its items are tried one by one; one that fails alone has
    {"error": ...}.
    """
    if runner.kind == "ray":
        jobs = [Job(key, "", item) for key, item in items.items()]
        results = run_over_ray(work, jobs, keeping, runner, needs, label, "clip", group=size, options=options)
        return dict(zip(items, results, strict=True))
    to_records(keeping)
    known = keeping.records.get(keeping.kind, items)
    for step in dict.fromkeys((size, 1)):
        left = [{"key": key, **item} for key, item in items.items() if key not in known]
        batches = {str(at): left[at : at + step] for at in range(0, len(left), step)}
        tasks = [Task(at, {"items": batch, **options}, None) for at, batch in batches.items()]
        with progress(label, len(tasks), "batch") as bar:
            for done in run_tasks(work, iter(tasks), runner) if tasks else ():
                bar(done is not None)
                if done is None:
                    continue
                batch, result = batches[done[0]], json.loads(done[1].text)
                found = {batch[0]["key"]: result} if len(batch) == 1 and "error" in result else result.get("clips", {})
                if done[1].final:
                    keeping.records.put(keeping.kind, {key: json.dumps(record) for key, record in found.items()})
                known.update(found)
    return {key: known[key] for key in items}
