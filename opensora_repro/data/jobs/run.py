"""Run one function over many inputs: in processes of this machine, or over a Ray cluster, and never twice.

A job's result is recorded when it is there, and a job with a record is not run again: a run that was killed at any
moment goes on where it was when it is started again. A job is known by how it is done and by what its files contain,
which the worker that is to do it looks up just before, and which is remembered. Never more jobs are under way than
`--workers`, however many there are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.jobs.cluster import import_ray, run_over_ray
from opensora_repro.data.jobs.course import Course, Job, Keeping
from opensora_repro.data.jobs.gpus import visible_gpus
from opensora_repro.data.jobs.workers import Steps, Task, Work, num_cores, run_here
from opensora_repro.data.options import option
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError


@dataclass(frozen=True)
class Runner:
    """Where jobs run: `workers` is 0 for all the cores of the machine, or of the cluster.

    `gpu`: each worker has a GPU of its own, the only one it sees.
    """

    kind: str = "local"
    workers: int = 0
    address: str | None = None
    gpu: bool = False


WHERE = "where the work is done"


@dataclass(frozen=True, kw_only=True)
class RunnerArguments:
    """Options of every tool that works in processes."""

    workers: int = option("processes at a time (default: one a core)", 0, group=WHERE, metavar="N")
    runner: str = option("this machine, or a Ray cluster", "local", group=WHERE, choices=("local", "ray"))
    address: str | None = option(
        "Ray cluster: auto, ray://HOST:PORT; local starts one here", None, group=WHERE, metavar="A"
    )


def runner_of(args: RunnerArguments) -> Runner:
    """Check where the work is to be done; DataError names the wrong option."""
    if args.workers < 0:
        raise DataError(f"--workers {args.workers}: expected a number of at least 1")
    if args.address and args.runner != "ray":
        raise DataError("--address: only with --runner ray")
    if args.runner == "ray":
        import_ray()
    return Runner(args.runner, args.workers, args.address)


def run_jobs(
    work: Work,
    jobs: Sequence[Job],
    keeping: Keeping,
    *,
    runner: Runner,
    label: str,
    unit: str = "file",
) -> list[Any]:
    """Run `work` on every job that has no record yet; return the jobs' results in their order.

    `work` is a top-level function of a module that workers can import; it gets `args` and returns something JSON-able.
    A job that crashes its worker or outlasts its time has the result {"error": reason}. A crash is
    recorded, for it would come again; a limit, an exception of `work` and a worker killed from outside are not, and are
    tried again by the next run. A full or read-only disk raises OSError at once, Ctrl-C KeyboardInterrupt.
    """
    course = Course(jobs, keeping)
    if course.num_left:
        with progress(label, course.num_left, unit) as bar:
            for step in run_tasks(work, course, course.num_left, runner):
                bar(course.take(*step) if step else 0)
    return course.results()


def run_tasks(work: Work, tasks: Iterator[Task], count: int, runner: Runner) -> Steps:
    """Yield each task's key and what became of it, in the order they end; None about every second while none does.

    `count` is about how many tasks there are. The next is taken when the last outcome has been: a worker gets what
    follows from its own.
    """
    if runner.kind == "ray":
        steps = run_over_ray(_name_of(work), tasks, count, runner.workers, runner.address, runner.gpu)
    else:
        steps = run_here(_name_of(work), tasks, runner.workers or num_cores(), visible_gpus() if runner.gpu else ())
    with closing(steps):
        yield from steps


def _name_of(work: Work) -> str:
    """Return "module:function": workers import the code by name, whichever way this process was started."""
    module = work.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else module
    if module == "__main__" or "." in work.__qualname__:
        raise TypeError(f"{work.__qualname__}: expected a top-level function of an importable module")
    return f"{module}:{work.__name__}"
