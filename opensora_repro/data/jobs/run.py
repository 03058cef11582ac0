"""Run one function over many inputs: in processes of this machine, or over a Ray cluster, and never twice.

A job's result is recorded when it is there, and a job with a record is not run again: a run that was killed at any
moment goes on where it was when it is started again. A job is known by how it is done and by what its files contain,
which the worker that is to do it looks up just before, and which is remembered. Never more jobs are under way than
`--workers`, however many there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.cluster import Place, Resources, import_ray
from opensora_repro.data.jobs.course import LOOKED_UP, Course, Job, Keeping, memo_of
from opensora_repro.data.jobs.gpus import visible_gpus
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.records import Records, Spool
from opensora_repro.data.jobs.stream import Results, Table, run_streamed
from opensora_repro.data.jobs.workers import Steps, Task, Work, num_cores, run_here
from opensora_repro.data.options import option
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import Again, in_batches
from opensora_repro.errors import DataError, check_least
from opensora_repro.storage.scratch import ready


@dataclass(frozen=True)
class Runner:
    """Where jobs run: `workers` is 0 for all the cores of the machine, or of the cluster.

    `gpu`: each worker has a GPU of its own, the only one it sees. What follows is of a cluster: what a worker holds
    there where that is not what its step needs (GiB of memory), and whether work without GPUs goes to nodes with GPUs.
    """

    kind: str = "local"
    workers: int = 0
    address: str | None = None
    gpu: bool = False
    cpus: float | None = None
    gpus: float | None = None
    memory: float | None = None
    gpu_nodes: bool = False

    def resources(self, step: Resources) -> Resources:
        """Return what a worker holds over Ray, for a step that says what it needs."""
        cpus = step.cpus if self.cpus is None else self.cpus
        gpus = float(self.gpu) or step.gpus
        if gpus and self.gpus is not None:
            gpus = self.gpus
        memory = step.memory if self.memory is None else int(self.memory * 2**30)
        return replace(step, cpus=cpus, gpus=gpus, memory=memory)


USUAL = Resources()
WHERE = "where the work is done"
READING = Resources(rows=256)  # of files, for what they contain


@dataclass(frozen=True, kw_only=True)
class RunnerArguments:
    """Options of every tool that works in processes."""

    workers: int = option("processes at a time (default: one a core)", 0, group=WHERE, metavar="N")
    runner: str = option("this machine, or a Ray cluster", "local", group=WHERE, choices=("local", "ray"))
    address: str | None = option(
        "Ray cluster: auto, ray://HOST:PORT; local starts one here", None, group=WHERE, metavar="A"
    )
    cpus: float | None = option("cores that a worker holds over Ray (as its step says)", None, group=WHERE, metavar="X")
    gpus: float | None = option(
        "GPUs, or a part of one, that a worker with a model on cuda holds over Ray (1)", None, group=WHERE, metavar="X"
    )
    memory: float | None = option(
        "GiB of memory that a worker holds over Ray (as its step says)", None, group=WHERE, metavar="X"
    )
    gpu_nodes: bool = option("over Ray, use nodes with GPUs also for work that needs none", False, group=WHERE)


def runner_of(args: RunnerArguments) -> Runner:
    """Check where the work is to be done; UserError names the wrong option."""
    if args.workers < 0:
        raise DataError(f"--workers {args.workers}: expected a number of at least 1")
    for name in ("address", "cpus", "gpus", "memory", "gpu_nodes"):
        if getattr(args, name) and args.runner != "ray":
            raise DataError(f"--{name.replace('_', '-')}: only with --runner ray")
    check_least(args, "cpus", "gpus", "memory", least=0)
    if args.runner == "ray":
        import_ray()
    return Runner(
        args.runner, args.workers, args.address, cpus=args.cpus, gpus=args.gpus, memory=args.memory,
        gpu_nodes=args.gpu_nodes,
    )  # fmt: skip


def run_jobs(
    work: Work,
    jobs: Iterable[Job],
    keeping: Keeping,
    *,
    runner: Runner,
    label: str,
    unit: str = "file",
    resources: Resources = USUAL,
) -> Iterable[Any]:
    """Run `work` on every job that has no record yet; return the jobs' results in their order.

    `jobs` may be of any number, if it gives a new iterator whenever it is asked for one: neither jobs nor results are
    held, both are read when they are asked for. `resources` is what a worker holds over Ray.

    `work` is a top-level function of a module that workers can import; it gets `args` and returns something JSON-able.
    A job that crashes its worker or outlasts its time has the result {"error": reason}. A crash is
    recorded, for it would come again; a limit, an exception of `work` and a worker killed from outside are not, and are
    tried again by the next run. A full or read-only disk raises OSError at once, Ctrl-C KeyboardInterrupt.
    """
    if runner.kind == "ray":
        return run_over_ray(work, jobs, keeping, runner, resources, label, unit)
    to_records(keeping)
    course = Course(jobs, keeping)
    if course.of_store:
        ready()
    if course.num_left:
        with progress(label, course.num_left, unit) as bar:
            for step in run_tasks(work, course, runner):
                if step:
                    course.take(*step)
                bar(course.take_new())
            bar(course.take_new())
    return course.results()


def run_tasks(work: Work, tasks: Iterator[Task], runner: Runner) -> Steps:
    """Yield each task's key and what became of it, in the order they end; None about every second while none does.

    The next is taken when the last outcome has been: a worker gets what
    follows from its own.
    """
    gpus = visible_gpus() if runner.gpu else ()
    with closing(run_here(name_of(work), tasks, runner.workers or num_cores(), gpus)) as steps:
        yield from steps


def run_over_ray(
    work: Work,
    jobs: Iterable[Job],
    keeping: Keeping,
    runner: Runner,
    resources: Resources,
    label: str,
    unit: str,
    *,
    group: int = 0,
    options: dict[str, Any] | None = None,
) -> Results:
    """Like `run_jobs`, over a cluster; with `group` the work takes so many jobs at a time, see `run_batches`."""
    place = Place(runner.address, runner.workers, runner.gpu_nodes)
    return run_streamed(
        name_of(work), Table.of_jobs(jobs), keeping, resources=runner.resources(resources), place=place, label=label,
        unit=unit, group=group, options=options,
    )  # fmt: skip


def contents_of(files: Iterable[Path], records: Records, runner: Runner) -> Iterable[str]:
    """Return the sha256 of files that no job has read, such as clips that go to a model in batches; as `run_jobs`."""
    if runner.kind == "ray":
        jobs = Again(lambda: (Job("contents", str(file), {}, files=(file,)) for file in files))
        keeping = Keeping(records, "contents")
        return run_over_ray(first_content, jobs, keeping, runner, READING, "reading", "file")
    memo, contents = memo_of(records), Spool(records.path.parent)
    with ThreadPoolExecutor(num_cores()) as pool, progress("reading", sum(1 for _ in files), "file") as bar:
        for batch in in_batches(files, LOOKED_UP):
            contents.add([json.dumps(content) for content in pool.map(memo, batch)])
            bar(len(batch))
    return contents


def first_content(args: dict[str, Any]) -> str:
    """Job: the sha256 of a file, which its worker has looked up."""
    return str(args["contents"][0])


def name_of(work: Callable[..., Any]) -> str:
    """Return "module:function": workers import the code by name, whichever way this process was started."""
    module = work.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else module
    if module == "__main__" or "." in work.__qualname__:
        raise TypeError(f"{work.__qualname__}: expected a top-level function of an importable module")
    return f"{module}:{work.__name__}"
