"""Several steps over a cluster as one plan: what a row gives goes on to the next step at once, in the same actor.

Nothing waits for the other rows. Each step's results are the parts in which its tool finds them when its turn comes,
so that manifests and rejects are what the tools make one after the other: a line only does ahead what they would do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.cluster import Place, Resources, run_plan
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.rows import Following, Order
from opensora_repro.data.jobs.run import Runner, name_of
from opensora_repro.data.jobs.stream import Run, Table
from opensora_repro.data.jobs.workers import Work
from opensora_repro.data.progress import progress_of_line


@dataclass(frozen=True)
class ToolStep:
    """A step of a line: where its tool keeps which results, and what is done.

    `jobs` gives the jobs that follow from one of the step before: from its arguments, its result and `options`.
    """

    name: str
    out: Path
    kind: str
    work: Work
    resources: Resources
    jobs: Callable[[dict[str, Any], Any, dict[str, Any]], list[Job]] | None = None  # the first step has none
    options: dict[str, Any] = field(default_factory=dict)
    holds: Callable[[Job, Any], bool] | None = None
    one_a_file: bool = False


def run_line(stages: Sequence[ToolStep], jobs: Iterable[Job], runner: Runner) -> None:
    """Do the first step's jobs that have no result yet, and of each what follows from it.

    What fails for now has no lasting result: the step's own tool tries it again. Raises as `run_streamed` does.
    """
    with ExitStack() as opened:
        keepings = [
            Keeping(opened.enter_context(Records(one.out)), one.kind, one.holds, one.one_a_file) for one in stages
        ]
        if any(keeping.records.num_taken_over(keeping.kind) for keeping in keepings):
            return  # the tools know how an earlier release named what it did
        for keeping in keepings:
            parts.from_records(keeping)
        resources = runner.resources(_resources_of(stages))
        runs = [Run(Table.of_jobs(jobs if not number else []), k, resources.rows) for number, k in enumerate(keepings)]
        todo = [run.write_todo(anew=False) for run in runs]
        if (chunks_left := todo[0])[1]:
            told = ", ".join(stage.name for stage in stages)
            print(f"{told}: row by row, {chunks_left[1]:,} to do", flush=True)
            order = _order_of(stages, runs, threads=max(1, int(resources.cpus)))
            place = Place(runner.address, runner.workers, runner.gpu_nodes)
            with progress_of_line([stage.name for stage in stages], chunks_left[1]) as tell:
                for counts in run_plan(order, chunks_left[0], resources, place):
                    tell(counts)
        for run in runs:
            run.sweep()


def _resources_of(stages: Sequence[ToolStep]) -> Resources:
    """Return what a worker needs that does all of it."""
    told = [stage.resources for stage in stages]
    return replace(
        told[0], cpus=max(one.cpus for one in told), memory=max(one.memory for one in told),
        rows=min(one.rows for one in told),
    )  # fmt: skip


def _order_of(stages: Sequence[ToolStep], runs: Sequence[Run], threads: int) -> Order:
    then = None
    for stage, run in reversed(list(zip(stages, runs, strict=True))):
        order = run.order_of(name_of(stage.work), by_name=True, threads=threads, then=then)
        then = Following(name_of(stage.jobs), stage.options, order) if stage.jobs else None
    return order
