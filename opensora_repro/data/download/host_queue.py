"""Threads that share requests to others' servers, under a limit of concurrent requests to any one host."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class HostQueue(Generic[T]):
    """Hands out items, at most `each` of one host at a time, the hosts in turn."""

    def __init__(self, items: Iterable[tuple[str, T]], each: int) -> None:
        self.each, self.changed = each, threading.Condition()
        self.waiting: dict[str, deque[T]] = {}
        for host, item in items:
            self.waiting.setdefault(host, deque()).append(item)
        self.running = dict.fromkeys(self.waiting, 0)
        self.ready = deque(self.waiting)  # hosts with an item left and room for it

    def take(self) -> tuple[str, T] | None:
        """Return the next item, when its host has room; None if there are none left."""
        with self.changed:
            while not self.ready:
                if not self.waiting:
                    return None
                self.changed.wait()
            host = self.ready.popleft()
            item = self.waiting[host].popleft()
            self.running[host] += 1
            if not self.waiting[host]:
                del self.waiting[host]
                self.changed.notify_all()  # whoever waits for an item may have none to wait for
            elif self.running[host] < self.each:
                self.ready.append(host)
            return host, item

    def done(self, host: str) -> None:
        """Give a host's place back."""
        with self.changed:
            if self.running[host] == self.each and host in self.waiting:
                self.ready.append(host)
            self.running[host] -= 1
            self.changed.notify()


def in_threads(work: Callable[[T], R], waiting: HostQueue[T], threads: int) -> Iterator[tuple[T, R] | None]:
    """Yield each item with what `work` returned for it, in the order they end; None about every second while none does.

    What `work` raises is raised here. The threads do not keep the process from ending.
    """
    results: queue.Queue[tuple[T, R] | BaseException | None] = queue.Queue()

    def run() -> None:
        try:
            while (taken := waiting.take()) is not None:
                host, item = taken
                try:
                    results.put((item, work(item)))
                finally:
                    waiting.done(host)
        except BaseException as error:
            results.put(error)
        results.put(None)

    for _ in range(threads):
        threading.Thread(target=run, daemon=True).start()
    alive = threads
    while alive:
        try:
            result = results.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if isinstance(result, BaseException):
            raise result
        if result is None:
            alive -= 1
        else:
            yield result
