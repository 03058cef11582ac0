"""Work over a Ray cluster, as a streaming plan of Ray Data: chunks of rows in, Parquet parts out, by way of actors.

What Ray does: who works where, back-pressure, more and fewer actors, and another try for a chunk whose actor or node is
gone. Rows and results never pass through this process.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.rows import Order, Rows, folders_of
from opensora_repro.data.jobs.workers import num_cores, one_reason
from opensora_repro.errors import DataError

BLOCKS, A_WORKER = 512, 16  # tasks of Ray's that a plan has at most: in all, or for each worker if that is more
STARTS = 3  # of a cluster on this machine: Ray gives its own processes half a minute, which a busy one needs


@dataclass(frozen=True)
class Resources:
    """What a worker of a step holds over Ray: cores, GPUs and bytes of memory. `rows` is how many it gets at a time."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    rows: int = 64


@dataclass(frozen=True)
class Place:
    """Which cluster, and how many workers there: 0 for all that it has room for. `gpu_nodes`: also where GPUs are."""

    address: str | None = None
    workers: int = 0
    gpu_nodes: bool = False


def import_ray() -> Any:
    """Return the module; DataError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours calls home
    try:
        import ray
    except ImportError:
        raise DataError("--runner ray: Ray is not installed here; install the package `ray`") from None
    return ray


# "counts" of each step of a line (usually there is one): rows that were done, and rejects among them; and "rows" that
# come out of it, see `Following`
Told = dict[str, Any]


def run_plan(order: Order, count: int, resources: Resources, place: Place) -> Iterator[Told]:
    """Do the chunks 0 to `count` of `order`, then make few parts of many; yield what was done, now and then.

    Every node needs this package, and inputs and outputs under the same path. Raises DataError if no cluster answers
    or none of its nodes has what a worker needs, OSError and RuntimeError for what stops all of the work.
    """
    ray = import_ray()
    mine = not ray.is_initialized()
    if mine:
        _connect(ray, resources, place)
    try:
        with _told(ray):
            nodes, apart = _nodes(ray, resources, place)
            yield from _chunks(ray, order, count, resources, place, room=_room(nodes, resources), apart=apart)
            merge = ray.remote(num_cpus=min(1.0, resources.cpus), max_retries=3, label_selector=apart)(parts.merge)
            groups = [group for folder in folders_of(order) for group in parts.groups_to_merge(folder)]
            ray.get([merge.remote(group) for group in groups])
    finally:
        if mine:
            ray.shutdown()


@contextmanager
def _told(ray: Any) -> Iterator[None]:
    """Let an error of Ray's be one line."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise OSError(f"--runner ray: {one_reason(error)[:500]}") from error


def _chunks(
    ray: Any, order: Order, count: int, resources: Resources, place: Place, *, room: int, apart: dict[str, str] | None
) -> Iterator[Told]:
    from ray.data import ActorPoolStrategy, DataContext, from_items

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    # The last ones are the largest, with which it begins, so that none is left alone with one at the end. A task costs
    # this process some 10 ms, whatever it has to do: where there are many chunks, a task has several.
    numbers = [{"chunk": number} for number in reversed(range(count))]
    blocks = min(count, max(BLOCKS, A_WORKER * max(room, place.workers)))
    most = min(place.workers or blocks, blocks)
    plan = from_items(numbers, override_num_blocks=blocks).map_batches(
        Rows,
        batch_size=max(1, count // blocks),  # of the smallest block; with GPUs Ray wants it told
        fn_constructor_args=(order,),
        compute=ActorPoolStrategy(min_size=1, max_size=most, initial_size=min(room, most)),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        memory=resources.memory or None,
        label_selector=apart,
    )
    for done in plan.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        for trouble in filter(None, done["trouble"].tolist()):
            kind, _, text = trouble.partition(" ")
            raise RuntimeError(text) if kind == "RuntimeError" else OSError(text)
        yield from map(json.loads, done["told"].tolist())


def _nodes(ray: Any, resources: Resources, place: Place) -> tuple[list[dict[str, float]], dict[str, str] | None]:
    """Return what each node has that may do this work, and by which label Ray keeps away from the others.

    Nodes with GPUs are left to what needs these, unless there are no others.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in alive if node["Resources"].get("GPU")]
    if resources.gpus or place.gpu_nodes or len(with_gpus) == len(alive) or not with_gpus:
        return [node["Resources"] for node in alive], None
    names = ", ".join(node["NodeID"] for node in with_gpus)
    others = [node["Resources"] for node in alive if node not in with_gpus]
    return others, {"ray.io/node-id": f"!in({names})"}


def _room(nodes: list[dict[str, float]], resources: Resources) -> int:
    """Return how many workers the nodes have room for. Raises DataError for none."""
    per_worker = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory}
    per_worker = {name: amount for name, amount in per_worker.items() if amount}
    room = sum(int(min(node.get(name, 0) / amount for name, amount in per_worker.items())) for node in nodes)
    if room or not per_worker:
        return max(1, room)
    if resources.gpus and not any(node.get("GPU") for node in nodes):
        raise DataError("--runner ray: this cluster has no GPU, as --device cuda asks for")
    told = f"{resources.cpus:g} cores, {resources.gpus:g} GPUs and {resources.memory / 2**30:.1f} GiB of memory"
    raise DataError(f"--runner ray: no node has the {told} of a worker; --cpus, --gpus and --memory say less")


def _connect(ray: Any, resources: Resources, place: Place) -> None:
    """Join the cluster at the address, or start one here ("local", or none given and none running)."""
    quiet = {"logging_level": "WARNING", "log_to_driver": False}
    here = place.address == "local" or not (place.address or os.environ.get("RAY_ADDRESS"))
    cores = math.ceil(place.workers * resources.cpus) or num_cores()
    for left in reversed(range(STARTS if here else 1)):
        try:
            if here:
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
            else:
                ray.init(address=place.address, **quiet)
            return
        except Exception as error:  # Ray has no class of its own for this: ConnectionError, RuntimeError, Exception
            ray.shutdown()
            if not left:
                told = f"--address {place.address or 'local'}: no Ray cluster answers: {one_reason(error)}"
                raise DataError(told) from error
