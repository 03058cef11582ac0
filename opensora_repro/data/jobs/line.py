"""Several steps of a line as one plan: what a row gives goes on to the next step at once, whatever the others do.

Each step's results are kept where its tool finds them when its turn comes, so that manifests and rejects are what the
tools make one after the other: a line only does ahead what they would do. On this machine see local_line.py; over a
cluster what a row gives stays in the same actor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from typing import Any

from opensora_repro.data.jobs import local_line, parts
from opensora_repro.data.jobs.cluster import Place, Resources, run_plan
from opensora_repro.data.jobs.course import Job
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.rows import Following, Order
from opensora_repro.data.jobs.run import Runner, name_of
from opensora_repro.data.jobs.steps import ClipStep, ModelStep, ToolStep
from opensora_repro.data.jobs.stream import Run, Table
from opensora_repro.data.progress import progress_of_line


def run_steps(steps: Sequence[Any], jobs: Iterable[Job], runner: Runner, *, known_too: bool, then: str) -> None:
    """Do the first step's jobs that have no result yet, and of each what follows from it.

    `known_too`: on this machine also what follows from results that are there. `then` tells what waits for all rows.
    """
    over_cluster = runner.kind == "ray"
    if over_cluster and (later := [step.name for step in steps if isinstance(step, ModelStep)][:1]):
        steps, then = list(takewhile(lambda step: not isinstance(step, ModelStep), steps)), later[0]
    told = f"{', '.join(step.name for step in steps)}: row by row{f'; with all rows: {then}' if then else ''}"
    if over_cluster:
        run_over_cluster(steps, jobs, runner, told)
    else:
        local_line.run_here(steps, jobs, runner, known_too=known_too, told=told)


def run_over_cluster(steps: Sequence[Any], jobs: Iterable[Job], runner: Runner, told: str) -> None:
    """Let actors do the steps that are tools', and this process ask the endpoint about the rows that come out.

    What fails for now has no lasting result: the step's own tool tries it again. Raises as `run_streamed` does.
    """
    head = list(takewhile(lambda step: not isinstance(step, ClipStep), steps))
    tail = list(takewhile(lambda step: not isinstance(step, ToolStep), steps[len(head) :]))
    tools = [step for step in head if isinstance(step, ToolStep)]
    with ExitStack() as opened:
        keepings = [one.keeping(opened.enter_context(Records(one.out))) for one in tools]
        asked = opened.enter_context(local_line.Asked(tail)) if tail else None
        if any(keeping.records.num_taken_over(keeping.kind) for keeping in keepings):
            return  # the tools know how an earlier release named what it did
        for keeping in keepings:
            parts.from_records(keeping)
        resources = runner.resources(_resources_of(tools))
        runs = [Run(Table.of_jobs(jobs if not number else []), k, resources.rows) for number, k in enumerate(keepings)]
        todo = [run.write_todo(anew=False) for run in runs]
        if (chunks_left := todo[0])[1]:
            print(told, flush=True)
            order = _order_of(head, runs, threads=max(1, int(resources.cpus)), hands_out=bool(tail))
            place = Place(runner.address, runner.workers, runner.gpu_nodes)
            with progress_of_line([step.name for step in (*head, *tail)], chunks_left[1]) as tell:
                for done in run_plan(order, chunks_left[0], resources, place):
                    tell(done["counts"] + (asked.take(done["rows"]) if asked else []))
                for counts in asked.rest() if asked else ():
                    tell([[0, 0] for _ in head] + counts)
        for run in runs:
            run.sweep()


def _resources_of(tools: Sequence[ToolStep]) -> Resources:
    """Return what a worker needs that does all of it."""
    told = [tool.resources for tool in tools]
    return replace(
        told[0], cpus=max(one.cpus for one in told), memory=max(one.memory for one in told),
        rows=min(one.rows for one in told),
    )  # fmt: skip


def _order_of(steps: Sequence[Any], runs: Sequence[Run], threads: int, hands_out: bool) -> Order:
    """Return the order of the first step, which holds those of the others."""
    then = Following("", {}, None, hands_out=True) if hands_out else None
    left, filters = list(runs), list[Any]()
    for step in reversed(steps):
        if not isinstance(step, ToolStep):
            filters.insert(0, step)
            continue
        if then or filters:
            then = then or Following("", {}, None)
            then = replace(then, rows=name_of(step.rows), filters=tuple(filters))
        order = left.pop().order_of(name_of(step.work), by_name=True, threads=threads, then=then)
        then, filters = (Following(name_of(step.job), step.options, order) if step.job else None), []
    return order
