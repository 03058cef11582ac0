"""Several servers of one model that are asked as one: each question goes to the one that has the least to do."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opensora_repro.data.caption import chat
from opensora_repro.data.caption.chat import Answer, Endpoint, NoAnswer, Stopped
from opensora_repro.data.http_retries import TryAgain
from opensora_repro.errors import DataError


@dataclass
class _Server:
    """One of them: what it has to do now, has answered so far, and since when it has failed."""

    endpoint: Endpoint
    under_way: int = 0
    answered: int = 0
    failures: int = 0  # in a row
    not_before: float = 0.0
    gone: bool = False  # for good: it refuses everybody


class Endpoints:
    """Used by many threads, like an `Endpoint`.

    A question that fails goes to another server at once. One that fails three times in a row, or asks for time, rests,
    a second at first and a minute at most; one that will answer nobody (no key, no such model) is told and left out.
    `concurrency` is how many questions each has at a time.
    """

    def __init__(self, endpoints: Sequence[Endpoint], concurrency: int) -> None:
        self.servers = [_Server(endpoint) for endpoint in endpoints]
        self.concurrency, self.retries = concurrency, endpoints[0].retries
        self.model, self.fields = endpoints[0].model, endpoints[0].fields
        self.url = ", ".join(endpoint.url for endpoint in endpoints)
        self._free = threading.Condition()
        self._stopped = False

    def check_reachable(self) -> None:
        """Tell of servers that take no connection, which rest for now; raise DataError if none does."""
        reasons = []
        for server in self.servers:
            try:
                server.endpoint.check_reachable()
            except DataError as error:
                reasons.append(str(error))
                server.not_before = time.monotonic() + chat.LONGEST_WAIT
        if len(reasons) == len(self.servers):
            raise DataError(reasons[0])
        for reason in reasons:
            print(f"note: {reason}; the others do its part", file=sys.stderr)

    def start(self) -> None:
        self._stopped = False
        for server in self.servers:
            server.endpoint.start()

    def stop(self) -> None:
        for server in self.servers:
            server.endpoint.stop()
        with self._free:
            self._stopped = True
            self._free.notify_all()

    def shares(self) -> str:
        """Return how many answers came from where."""
        return ", ".join(f"{server.endpoint.url} {server.answered:,}" for server in self.servers)

    def ask(self, messages: Sequence[dict[str, Any]]) -> Answer:
        """Return the model's answer. Raises NoAnswer, Stopped, and DataError where no server answers anybody."""
        tried: list[_Server] = []
        attempt, trouble = 0, TryAgain("no server")
        while attempt <= self.retries:
            server = self._take(tried)
            try:
                answer = server.endpoint.ask_once(messages)
            except TryAgain as error:
                attempt, trouble = attempt + 1, error
                tried.append(server)
                self._failed(server, error.wait, len(tried))
                continue
            except DataError as error:
                self._leave_out(server, error)
                continue
            finally:
                self._give_back(server)
            with self._free:
                server.failures, server.answered = 0, server.answered + 1
            return answer
        raise NoAnswer(f"{trouble} ({attempt} tries)", unreachable=True)

    def _take(self, tried: Sequence[_Server]) -> _Server:
        """Wait for the server with the least to do, one that has not failed at this question if there is any."""
        with self._free:
            while not self._stopped:
                now = time.monotonic()
                alive = [server for server in self.servers if not server.gone]
                ready = [s for s in alive if s.not_before <= now and s.under_way < self.concurrency]
                if ready:
                    chosen = min(ready, key=lambda s: (tried.count(s), s.under_way, s.answered))
                    chosen.under_way += 1
                    return chosen
                resting = [server.not_before - now for server in alive if server.not_before > now]
                self._free.wait(min([*resting, 1.0]))
            raise Stopped

    def _give_back(self, server: _Server) -> None:
        with self._free:
            server.under_way -= 1
            self._free.notify()

    def _failed(self, server: _Server, wait: float | None, times: int) -> None:
        with self._free:
            server.failures += 1
            pause = 0.0
            if wait is not None:
                pause = min(wait, chat.LONGEST_ASKED_WAIT)
            elif server.failures >= 3 or times >= len(self.servers):
                pause = min(chat.LONGEST_WAIT, chat.FIRST_WAIT * 2.0 ** min(server.failures, 20))
                pause *= random.uniform(0.5, 1.0)
            server.not_before = max(server.not_before, time.monotonic() + pause)

    def _leave_out(self, server: _Server, error: DataError) -> None:
        with self._free:
            server.gone = True
            if all(other.gone for other in self.servers):
                raise error
        print(f"note: {error}; the others do its part", file=sys.stderr)
