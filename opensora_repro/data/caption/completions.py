"""Many prompts to one endpoint at a time, each answer recorded the moment it is there: nobody pays twice."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opensora_repro.data.caption.chat import Answer, Endpoint, NoAnswer, Stopped
from opensora_repro.data.caption.endpoints import Endpoints
from opensora_repro.data.jobs.course import Keeping
from opensora_repro.data.progress import progress
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


class Usage:
    """What was asked and what it cost: in this run, and before."""

    def __init__(self, prices: Prices, before: Sequence[dict[str, Any]], endpoint: Endpoint | Endpoints) -> None:
        self.prices, self.before, self.endpoint = prices, list(before), endpoint
        self.asked: list[dict[str, Any]] = []

    def line(self) -> str:
        """Return "12 answers, 3,400 tokens in, 560 out, cost 0.0123"."""
        text = _sums(self.asked, self.prices)
        if isinstance(self.endpoint, Endpoints) and self.asked:
            text += f" ({self.endpoint.shares()})"
        return f"{text}; before: {_sums(self.before, self.prices)}" if self.before else text


def _sums(records: Sequence[dict[str, Any]], prices: Prices) -> str:
    tokens_in, tokens_out = (sum(record[name] for record in records) for name in ("tokens_in", "tokens_out"))
    line = f"{len(records)} answers, {tokens_in:,} tokens in, {tokens_out:,} out"
    return f"{line}, cost {prices.cost(tokens_in, tokens_out):.4f}" if prices != Prices() else line


def complete_all(
    prompts: Sequence[Prompt],
    keeping: Keeping,
    endpoint: Endpoint | Endpoints,
    *,
    concurrency: int,
    label: str,
    prices: Prices,
) -> dict[str, dict[str, Any]]:
    """Return {"text", "cut", "tokens_in", "tokens_out"} or {"error": reason} for every prompt, by its key.

    An answer that is recorded is not asked for again; a failure is tried again by the next run. Prints the cost, also
    when the run ends early. Raises DataError where no server is, or the endpoint answers nobody.
    """
    results = keeping.records.get(keeping.kind, [prompt.key for prompt in prompts])
    usage = Usage(prices, list(results.values()), endpoint)
    todo = {prompt.key: prompt for prompt in prompts if prompt.key not in results}
    total = len(results) + len(todo)
    if todo:
        endpoint.check_reachable()
    workers = _Workers(list(todo.values()), keeping, endpoint, concurrency)
    missed = 0
    try:
        with progress(label, len(todo), "clip") as bar:
            while len(results) < total:
                result = workers.next_result()
                bar(result is not None)
                if result is None:
                    continue
                key, outcome = result
                if isinstance(outcome, Answer):
                    results[key], missed = asdict(outcome), 0
                    usage.asked.append(results[key])
                    continue
                missed += isinstance(outcome, NoAnswer) and (outcome.unreachable or not (usage.asked or usage.before))
                results[key] = {"error": str(outcome)}
                if missed == IN_A_ROW:
                    raise DataError(f"{endpoint.url}: {outcome}, {missed} times in a row; the same command goes on")
    finally:
        usage.asked += workers.end()
        print(f"{label}: {usage.line()}", flush=True)
    return {prompt.key: results[prompt.key] for prompt in prompts}


class _Workers:
    """Threads that take one prompt after another; daemons, so that none keeps a run from ending."""

    def __init__(self, prompts: Sequence[Prompt], keeping: Keeping, endpoint: Endpoint | Endpoints, size: int) -> None:
        self.keeping, self.endpoint = keeping, endpoint
        self.prompts: Iterator[Prompt] = iter(prompts)
        self.lock = threading.Lock()
        self.results: queue.SimpleQueue[tuple[str, Answer | Exception]] = queue.SimpleQueue()
        endpoint.start()
        count = min(size, len(prompts))
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def next_result(self) -> tuple[str, Answer | NoAnswer | DecodeError] | None:
        """Return a prompt's key and outcome, None when there is none for a second; raises what ends the run."""
        try:
            key, outcome = self.results.get(timeout=1.0)
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
            with self.lock:
                prompt = next(self.prompts, None)
            if prompt is None:
                return
            try:
                answer = self.endpoint.ask(prompt.messages())
                self.keeping.records.put(self.keeping.kind, {prompt.key: json.dumps(asdict(answer))})
                self.results.put((prompt.key, answer))
            except (NoAnswer, DecodeError) as trouble:
                self.results.put((prompt.key, trouble))
            except Stopped:
                return
            except Exception as error:  # the main thread's to raise
                self.results.put((prompt.key, error))
                return
