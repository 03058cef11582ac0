"""Run one function over many inputs: in processes of this machine, or over a Ray cluster, and never twice.

A job's result is written to `FOLDER/KEY.json` when it is there, beside and then renamed; a job whose record exists is
not run again. So a run that was killed at any moment goes on where it was when it is started again. Never more jobs are
under way than `--workers`, however many there are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.cluster import import_ray, run_over_ray
from opensora_repro.data.jobs.gpus import visible_gpus
from opensora_repro.data.jobs.records import finished, write_record
from opensora_repro.data.jobs.workers import Steps, Task, Work, num_cores, run_here
from opensora_repro.data.options import option
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError
from opensora_repro.files import remove_leftovers


@dataclass(frozen=True)
class Job:
    """One piece of work."""

    key: str  # names its record: digest of content and options
    name: str  # for messages
    args: dict[str, Any]  # JSON-able, given to `work`
    seconds: float | None = None  # its own time limit, before run_jobs' `timeout`


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
    folder: Path,
    *,
    runner: Runner,
    label: str,
    unit: str = "file",
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run `work` on every job that has no record in `folder` yet; return all results by key, in the jobs' order.

    `work` is a top-level function of a module that workers can import; it gets `args` and returns something JSON-able.
    A job that crashes its worker or outlasts its limit (`timeout` seconds) has the result {"error": reason}. A crash is
    recorded, for it would come again; a limit, an exception of `work` and a worker killed from outside are not, and are
    tried again by the next run. A full or read-only disk raises OSError at once, Ctrl-C KeyboardInterrupt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    results = finished([job.key for job in jobs], folder)
    todo = {job.key: job for job in jobs if job.key not in results}
    if todo:
        with progress(label, len(todo), unit) as bar, closing(_start(work, todo.values(), runner, timeout)) as steps:
            for step in steps:
                bar(step is not None)
                if step is None:
                    continue
                key, done = step
                if done.final:
                    write_record(folder, key, done.text)
                results[key] = json.loads(done.text)
    return {job.key: results[job.key] for job in jobs}


def _start(work: Work, jobs: Iterable[Job], runner: Runner, timeout: float | None) -> Steps:
    tasks = [Task(job.key, job.args, timeout if job.seconds is None else job.seconds) for job in jobs]
    if runner.kind == "ray":
        return run_over_ray(_name_of(work), tasks, runner.workers, runner.address, runner.gpu)
    return run_here(_name_of(work), tasks, runner.workers or num_cores(), visible_gpus() if runner.gpu else ())


def _name_of(work: Work) -> str:
    """Return "module:function": workers import the code by name, whichever way this process was started."""
    module = work.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else module
    if module == "__main__" or "." in work.__qualname__:
        raise TypeError(f"{work.__qualname__}: expected a top-level function of an importable module")
    return f"{module}:{work.__name__}"
