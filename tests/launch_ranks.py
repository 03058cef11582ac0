"""One process of a small job that goes wrong in a chosen way, for test_launch.

`main([SCENARIO, LOGS])`; rank and world size come from the environment. Prints what it reached; a user's mistake ends
it with code 2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from opensora_repro.config import ParallelConfig
from opensora_repro.parallel.engine import TorchEngine

LIMIT = 6  # seconds a step may take here
DEADLINE = 3.0


def main(arguments: list[str]) -> int:
    from opensora_repro.errors import EngineError

    scenario, logs = arguments
    try:
        SCENARIOS[scenario](int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(logs))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("finished", flush=True)
    return 0


def short_engine() -> TorchEngine:
    return TorchEngine(ParallelConfig(timeout=LIMIT))


def absent(rank: int, world_size: int, logs: Path) -> None:
    """Process 1 is never started."""
    from opensora_repro.parallel.preflight import check_in
    from opensora_repro.parallel.store import open_store

    store = open_store(serve=rank == 0, timeout=DEADLINE)
    check_in(store, rank, world_size, torch.device("cpu"), deadline=DEADLINE)


def no_collective(rank: int, world_size: int, logs: Path) -> None:
    """Process 1 checks in and takes no part in the first all-reduce."""
    from functools import partial

    from opensora_repro.parallel.preflight import all_reduce_check, check_in
    from opensora_repro.parallel.store import open_store
    from opensora_repro.parallel.watchdog import Watchdog

    store = open_store(serve=rank == 0, timeout=DEADLINE)
    places = check_in(store, rank, world_size, torch.device("cpu"))
    connect = partial(open_store, serve=False, timeout=DEADLINE)
    watchdog = Watchdog(rank, places, LIMIT, store=store, connect=connect)
    watchdog.start()
    if rank == 1:
        time.sleep(1000)
    all_reduce_check(watchdog, torch.device("cpu"), deadline=DEADLINE)


def hang(rank: int, world_size: int, logs: Path) -> None:
    """Step 1 is done; in step 2 process 1 does not come to the all-reduce, though it lives."""

    engine = short_engine()
    with engine.watchdog.reporting(logs):
        for step in (1, 2):
            engine.watchdog.progress(f"step {step}")
            if (rank, step) == (1, 2):
                time.sleep(1000)
            engine.sum(torch.ones(1))


def work(rank: int, world_size: int, logs: Path) -> None:
    """All-reduces until somebody kills a process."""

    engine = short_engine()
    with engine.watchdog.reporting(logs):
        for step in range(100_000):
            engine.watchdog.progress(f"step {step}")
            engine.sum(torch.ones(1))
            if step == 0:
                print("working", flush=True)
            time.sleep(0.01)


def error(rank: int, world_size: int, logs: Path) -> None:
    """Process 1 raises what nobody expected."""

    engine = short_engine()
    try:
        with engine.watchdog.reporting(logs):
            engine.sum(torch.ones(1))
            if rank == 1:
                raise MemoryError("no room for\nthe batch")
            engine.sum(torch.ones(1))
    finally:
        engine.close()


def encoding(rank: int, world_size: int, logs: Path) -> None:
    """Process 1 fails within a pass through a model that all hold together; the others wait for it, without a limit."""
    from opensora_repro.parallel.shards import Shards

    engine = short_engine()
    try:
        with engine.watchdog.reporting(logs), engine.watchdog.paused():
            shards, model = Shards(engine.device), torch.nn.Linear(4, 4).requires_grad_(False)
            shards.apply([(model,)])
            shards.most(rank)
            if rank == 1:
                raise MemoryError("no room for\nthe batch")
            model(torch.ones(1, 4))
    finally:
        engine.close()


def facts(rank: int, world_size: int, logs: Path) -> None:
    """All agree twice, once while a pause lasts longer than a step may; then process 1 has other weights."""
    from opensora_repro.parallel.preflight import check_same, weights_digest

    engine = short_engine()
    try:
        with engine.watchdog.reporting(logs):
            check_same(engine.watchdog, "data", {"data.manifest": "7 samples, ids 12"})
            engine.watchdog.progress("step 1")
            with engine.watchdog.paused():
                time.sleep(LIMIT + 2)
            print("paused", flush=True)
            weights = {"bias": torch.tensor([0.0, 1.0 if rank == 1 else 2.0])}
            check_same(engine.watchdog, "weights", {"weights": weights_digest(weights), "seed": "42"})
    finally:
        engine.close()


SCENARIOS = {
    "absent": absent,
    "no_collective": no_collective,
    "hang": hang,
    "work": work,
    "error": error,
    "encoding": encoding,
    "facts": facts,
}
