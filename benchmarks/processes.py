"""Sides that are timed in turns, each in a process of its own: how a side treats memory is a part of it."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import clock_of, timed
from opensora_repro.process import peak_memory

Ask = Callable[..., Any]  # (what, *about) -> the side's answer


@dataclass(frozen=True)
class Worker:
    """`build(*arguments)` gives, by name, what the side can be asked; names of "seconds" are calls to be timed."""

    build: Callable[..., Mapping[str, Ask]]
    arguments: tuple[Any, ...]
    keeps_memory: bool  # as our own commands do on a CPU (opensora_repro/process.py), or as torch does


@contextlib.contextmanager
def in_processes(workers: Mapping[str, Worker], one_thread: bool) -> Iterator[dict[str, Ask]]:
    """Each worker's process, as a function that asks it. `ask("seconds", what, ...)` times its answer to `what`.

    `ask("memory")` tells whether the C library does keep freed memory, and the largest resident memory so far.
    """
    context = multiprocessing.get_context("spawn")  # a fork would not have the threads that torch computes with
    with contextlib.ExitStack() as stack:
        asks: dict[str, Ask] = {}
        for name, worker in workers.items():
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, worker, one_thread))
            process.start()
            there.close()
            stack.callback(process.join)
            stack.callback(here.close)
            asks[name] = _ask(name, here)
        yield asks


def seconds_of(ask: Ask, *about: Any) -> Callable[[], float]:
    """The seconds of one answer, for `harness.interleaved_seconds`."""
    return lambda: float(ask("seconds", *about))


def memory_columns(about: Mapping[str, Any]) -> tuple[str, int]:
    """For a table, of what a side's "memory" tells: freed memory, peak in MB."""
    return "kept" if about["keeps_memory"] else "given back", about["peak_memory_mb"]


def _serve(connection: Any, worker: Worker, one_thread: bool) -> None:
    """Answer (what, *about) until the other end is closed."""
    import torch

    from opensora_repro.process import keep_freed_memory

    if one_thread:
        torch.set_num_threads(1)
    keeps = worker.keeps_memory and keep_freed_memory()
    answers = worker.build(*worker.arguments)

    def seconds(what: str, *about: Any) -> float:
        return timed(lambda: answers[what](*about), clock_of(one_thread))()

    def memory() -> dict[str, Any]:
        return {"keeps_memory": keeps, "peak_memory_mb": round(peak_memory() / 2**20)}

    answers = {**answers, "seconds": seconds, "memory": memory}
    with contextlib.suppress(EOFError):
        while True:
            what, *about = connection.recv()
            connection.send(answers[what](*about))


def _ask(name: str, connection: Any) -> Ask:
    def ask(*request: Any) -> Any:
        try:
            connection.send(request)
            return connection.recv()
        except (EOFError, OSError):
            raise SystemExit(f"error: the process of {name!r} ended; see above") from None

    return ask
