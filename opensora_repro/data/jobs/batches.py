"""Clips that go to a model in batches, and are known again one by one, whatever batch they were in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.keys import digest
from opensora_repro.data.jobs.run import Job, Runner, run_jobs
from opensora_repro.data.jobs.workers import Work

Record = dict[str, Any]


def run_batches(
    work: Work, items: Mapping[str, Record], folder: Path, *, size: int, options: Record, runner: Runner, label: str
) -> dict[str, Record]:
    """Return every item's record by its key, a digest of its content and of how it is treated.

    `work` gets {"items": a batch, each with its "key", **options} and returns {"clips": {key: record}}. What `folder`
    holds is not done again. If a batch fails, its items are tried one by one; one that fails alone has {"error": ...}.
    """
    known = dict(_finished(folder))
    for step in dict.fromkeys((size, 1)):
        left = [{"key": key, **item} for key, item in items.items() if key not in known]
        batches = [left[at : at + step] for at in range(0, len(left), step)]
        jobs = [
            Job(digest([item["key"] for item in batch]), str(batch[0]["path"]), {"items": batch, **options})
            for batch in batches
        ]
        results = run_jobs(work, jobs, folder, runner=runner, label=label, unit="batch")
        for job, batch in zip(jobs, batches, strict=True):
            result = results[job.key]
            if len(batch) == 1 and "error" in result:
                known[batch[0]["key"]] = result
            known.update(result.get("clips", {}))
    return {key: known[key] for key in items}


def _finished(folder: Path) -> Iterator[tuple[str, Record]]:
    """Yield the items of all finished batches."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield from json.loads(path.read_text(encoding="utf-8")).get("clips", {}).items()
        except (OSError, ValueError, AttributeError):
            continue
