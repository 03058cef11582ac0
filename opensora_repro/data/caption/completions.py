"""Many prompts to one endpoint at a time, each answer recorded the moment it is there: nobody pays twice."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from opensora_repro.data.caption.chat import Answer, Endpoint, NoAnswer, Stopped
from opensora_repro.data.caption.endpoints import Endpoints
from opensora_repro.data.ids import Seen
from opensora_repro.data.jobs.course import LOOKED_UP, Keeping, failures_of
from opensora_repro.data.jobs.keyed import left_of, results_of
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import Again, in_batches
from opensora_repro.data.video import DecodeError
from opensora_repro.errors import DataError

IN_A_ROW = 3  # prompts without an answer, after all their tries, that end a run
GRACE = 10.0  # seconds for the answers that are under way when a run ends early: they are paid for
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """`messages` makes what is sent, when it is sent; its DecodeError is the prompt's result."""

    key: str  # names its record: digest of what is asked
    messages: Callable[[], Messages]


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens."""

    tokens_in: float = 0.0
    tokens_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (self.tokens_in * tokens_in + self.tokens_out * tokens_out) / 1e6


@dataclass
class Sum:
    """Answers and their tokens."""

    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, record: dict[str, Any]) -> None:
        self.answers += 1
        self.tokens_in += record["tokens_in"]
        self.tokens_out += record["tokens_out"]

    def line(self, prices: Prices) -> str:
        line = f"{self.answers} answers, {self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        return f"{line}, cost {prices.cost(self.tokens_in, self.tokens_out):.4f}" if prices != Prices() else line


class Usage:
    """What was asked and what it cost: in this run, and before."""

    def __init__(self, prices: Prices, endpoint: Endpoint | Endpoints) -> None:
        self.prices, self.endpoint = prices, endpoint
        self.asked, self.before = Sum(), Sum()

    def line(self) -> str:
        """Return "12 answers, 3,400 tokens in, 560 out, cost 0.0123"."""
        text = self.asked.line(self.prices)
        if isinstance(self.endpoint, Endpoints) and self.asked.answers:
            text += f" ({self.endpoint.shares()})"
        return f"{text}; before: {self.before.line(self.prices)}" if self.before.answers else text


def complete_all(
    prompts: Iterable[Prompt],
    keeping: Keeping,
    endpoint: Endpoint | Endpoints,
    *,
    concurrency: int,
    label: str,
    prices: Prices,
) -> Iterable[dict[str, Any]]:
    """Return {"text", "cut", "tokens_in", "tokens_out"} or {"error": reason} for every prompt, in their order.

    Prompts may be of any number, as the jobs of `run_jobs`. An answer that is recorded is not asked for again; a
    failure is tried again by the next run. Prints the cost, also when the run ends early. Raises DataError where no
    server is, or the endpoint answers nobody.
    """
    failed = failures_of(keeping)
    todo = Again(lambda: left_of(((prompt.key, prompt) for prompt in prompts), keeping, failed))
    left = sum(1 for _ in todo)
    completions = Completions((prompt for _, prompt in todo), keeping, endpoint, min(concurrency, left), label, prices)
    add_recorded(completions.usage.before, (prompt.key for prompt in prompts), keeping)
    if left:
        endpoint.check_reachable()
    try:
        with progress(label, left, "clip") as bar:
            while completions.num_done < left:
                bar(completions.take() is not None)
    finally:
        completions.end()
    return results_of((prompt.key for prompt in prompts), keeping, failed)


class Completions:
    """Prompts on their way to an endpoint by so many threads, which take the next one when they have an answer."""

    def __init__(
        self, prompts: Iterator[Prompt], keeping: Keeping, endpoint: Endpoint | Endpoints, concurrency: int, label: str,
        prices: Prices,
    ) -> None:  # fmt: skip
        self.keeping, self.endpoint, self.label = keeping, endpoint, label
        self.usage, self.missed, self.num_done = Usage(prices, endpoint), 0, 0
        self.concurrency, self.prompts = concurrency, prompts
        self.workers: _Workers | None = None

    def take(self, wait: float = 1.0) -> tuple[str, Any] | None:
        """Return a prompt's key and its record or failure, None where there is none for so many seconds.

        Raises DataError where the endpoint answers nobody.
        """
        self.workers = self.workers or _Workers(self.prompts, self.keeping, self.endpoint, self.concurrency)
        if (result := self.workers.next_result(wait)) is None:
            return None
        (key, outcome), self.num_done = result, self.num_done + 1
        if isinstance(outcome, Answer):
            self.missed = 0
            self.usage.asked.add(record := asdict(outcome))
            return key, record
        answered = self.usage.asked.answers + self.usage.before.answers
        self.missed += isinstance(outcome, NoAnswer) and (outcome.unreachable or not answered)
        self.keeping.records.put(f"failed {self.keeping.kind}", {key: json.dumps({"error": str(outcome)})})
        if self.missed == IN_A_ROW:
            raise DataError(f"{self.endpoint.url}: {outcome}, {self.missed} times in a row; the same command goes on")
        return key, {"error": str(outcome)}

    def end(self) -> None:
        """Send nothing more, wait a little for what is under way, tell the cost."""
        for answer in self.workers.end() if self.workers else ():
            self.usage.asked.add(answer)
        print(f"{self.label}: {self.usage.line()}", flush=True)


def add_recorded(total: Sum, keys: Iterable[str], keeping: Keeping) -> None:
    """Add the answers that are recorded, each once."""
    seen = Seen()
    for batch in in_batches(keys, LOOKED_UP):
        new = [key for key, is_new in zip(batch, seen.add(batch).tolist(), strict=True) if is_new]
        for record in keeping.records.get(keeping.kind, new).values():
            total.add(record)


class _Workers:
    """Threads that take one prompt after another; daemons, so that none keeps a run from ending."""

    def __init__(self, prompts: Iterator[Prompt], keeping: Keeping, endpoint: Endpoint | Endpoints, count: int) -> None:
        self.keeping, self.endpoint, self.prompts = keeping, endpoint, prompts
        self.lock = threading.Lock()
        self.results: queue.SimpleQueue[tuple[str, Answer | Exception]] = queue.SimpleQueue()
        endpoint.start()
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def next_result(self, wait: float) -> tuple[str, Answer | NoAnswer | DecodeError] | None:
        """Return a prompt's key and outcome, None when there is none for so many seconds; raises what ends the run."""
        try:
            key, outcome = self.results.get(timeout=wait)
        except queue.Empty:
            return None
        if not isinstance(outcome, Answer | NoAnswer | DecodeError):
            raise outcome
        return key, outcome

    def end(self) -> list[dict[str, Any]]:
        """Send nothing more, wait a little for what is under way; return the answers that nobody has taken yet."""
        self.endpoint.stop()
        deadline = time.monotonic() + GRACE
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = []
        while not self.results.empty():
            _, outcome = self.results.get()
            if isinstance(outcome, Answer):
                left.append(asdict(outcome))
        return left

    def _work(self) -> None:
        while True:
            prompt = None
            try:
                with self.lock:
                    prompt = next(self.prompts, None)
                if prompt is None:
                    return
                answer = self.endpoint.ask(prompt.messages())
                self.keeping.records.put(self.keeping.kind, {prompt.key: json.dumps(asdict(answer))})
                self.results.put((prompt.key, answer))
            except (NoAnswer, DecodeError) as trouble:
                self.results.put((prompt.key if prompt else "", trouble))
            except Stopped:
                return
            except Exception as error:  # the main thread's to raise
                self.results.put((prompt.key if prompt else "", error))
                return
