"""The same tasks over a Ray cluster: each Ray process hands them to a worker of its own, so results are the same."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

from opensora_repro.data.jobs.workers import Done, Steps, Task, Worker, num_cores, one_reason, wait
from opensora_repro.data.manifest import DataError


def import_ray() -> Any:
    """Return the module; DataError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    try:
        import ray
    except ImportError:
        raise DataError("--runner ray: Ray is not installed here; install the package `ray`") from None
    return ray


def run_over_ray(work: str, tasks: Iterable[Task], workers: int, address: str | None) -> Steps:
    """Like `run_here`; `workers` is 0 for all of the cluster's cores. Raises DataError if no cluster answers.

    Twice as many tasks as cores are under way, so that no node waits for its next one. Every node needs this package
    and the inputs under the same path.
    """
    ray = import_ray()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, workers, address)
    remote = ray.remote(num_cpus=1, max_retries=3)(_ray_task)  # retries are for nodes that are lost
    limit = 2 * (workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
    queue, pending = iter(tasks), dict[Any, str]()
    try:
        while True:
            for task in islice(queue, limit - len(pending)):
                pending[remote.remote(work, task.args, task.seconds)] = task.key
            if not pending:
                return
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            if not ready:
                yield None
            for ref in ready:
                yield pending.pop(ref), _fetch(ray, ref)
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, workers: int, address: str | None) -> None:
    """Join the cluster at `address`, or start one here ("local", or none given and none running)."""
    quiet = {"logging_level": "WARNING", "log_to_driver": False}
    try:
        if address in (None, "local") and not os.environ.get("RAY_ADDRESS"):
            ray.init(address="local", num_cpus=workers or num_cores(), include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray has no class of its own for this: ConnectionError, RuntimeError, plain Exception
        raise DataError(f"--address {address or 'local'}: no Ray cluster answers: {one_reason(error)}") from error


def _fetch(ray: Any, ref: Any) -> Done:
    try:
        text, final = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # not the task's own fault: those come back as results
        raise error.cause if isinstance(error.cause, OSError | RuntimeError) else error from None
    except ray.exceptions.RayError as error:
        return Done.failed(f"lost with its node: {one_reason(error)}", final=False)
    return Done(text, final)


_kept: dict[str, Worker] = {}  # in a Ray process: the worker of the task before


def _ray_task(work: str, args: dict[str, Any], seconds: float | None) -> tuple[str, bool]:
    """Run one task in this Ray process's own worker, so that a crash or a hang is met as on one machine."""
    worker = _kept.pop(work, None) or Worker(work, share_cores=True)
    try:
        worker.give(Task("", args, seconds))
        done = None
        while done is None:
            if wait([worker]):
                done = worker.take()
    except BaseException:
        worker.kill()
        raise
    if not worker.dead:
        _kept[work] = worker
    return done.text, done.final
