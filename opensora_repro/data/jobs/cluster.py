"""The same tasks over a Ray cluster: each Ray actor hands them to a worker of its own, so results are the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from opensora_repro.data.jobs.workers import Done, Steps, Task, Worker, num_cores, one_reason, surroundings, wait
from opensora_repro.errors import DataError


def import_ray() -> Any:
    """Return the module; DataError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    try:
        import ray
    except ImportError:
        raise DataError("--runner ray: Ray is not installed here; install the package `ray`") from None
    return ray


def run_over_ray(
    work: str, tasks: Iterator[Task], count: int, workers: int, address: str | None, gpu: bool = False
) -> Steps:
    """Like `run_here`; `workers` is 0 for all that the cluster has room for. Raises DataError if no cluster answers.

    Never more than `workers` tasks are under way, each in an actor that holds a core, and with `gpu` a GPU, for the
    whole run: a model is loaded once. Every node needs this package and the inputs under the same path.
    """
    ray = import_ray()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, workers, address)
    crew: list[Any] = []
    try:
        room = _room(ray, gpu)
        # An actor and its task are started again, three times, where their node is lost.
        actor = ray.remote(num_cpus=1, num_gpus=int(gpu), max_restarts=-1, max_task_retries=3)(_RayWorker)
        crew += [actor.remote(work) for _ in range(min(workers or room, count))]
        yield from _hand_out(ray, crew, tasks)
    finally:
        for member in crew:
            ray.kill(member)
        if mine:
            ray.shutdown()


def _room(ray: Any, gpu: bool) -> int:
    """Return how many actors the cluster has room for. Raises DataError for none."""
    resources = ray.cluster_resources()
    room = max(1, int(resources.get("CPU", 1)))
    if not gpu:
        return room
    if not (gpus := int(resources.get("GPU", 0))):
        raise DataError("--runner ray: this cluster has no GPU, as --device cuda asks for")
    return min(room, gpus)


def _hand_out(ray: Any, crew: list[Any], queue: Iterator[Task]) -> Steps:
    """Give a task to each actor that is there and idle; one that the cluster has no room for yet gets none."""
    pending: dict[Any, tuple[Any, str | None]] = {member.ready.remote(): (member, None) for member in crew}
    busy, more = 0, True
    while busy or more:
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
        if not ready:
            yield None
        for ref in ready:
            member, key = pending.pop(ref)
            if key is not None:
                busy -= 1
                yield key, _fetch(ray, ref)
            elif (told := _fetch(ray, ref)).text:
                raise RuntimeError(f"a Ray actor did not start: {told.text}")
            task = next(queue, None)
            more = task is not None
            if task is not None:
                busy += 1
                pending[member.run.remote(task)] = member, task.key


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


class _RayWorker:
    """A Ray actor with a worker of its own, so that a crash or a hang is met as on one machine.

    The worker inherits the variables by which Ray tells an actor its GPU.
    """

    def __init__(self, work: str) -> None:
        self.work = work
        self.worker: Worker | None = None

    def ready(self) -> tuple[str, bool]:
        """Answer when the actor is there."""
        return "", True

    def run(self, task: Task) -> tuple[str, bool]:
        """Return a task's result, and whether it is final."""
        if self.worker is None or self.worker.dead:
            self.worker = Worker(self.work, surroundings(threads=1))
        worker, done = self.worker, None
        try:
            worker.give(task)
            while done is None:
                if wait([worker]):
                    done = worker.take()
        except BaseException:
            worker.kill()
            raise
        return done.text, done.final
