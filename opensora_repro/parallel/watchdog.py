"""Ends a job whose processes no longer get on: a dead process, a hung collective, a lost host.

Two threads in every process, because the main thread may be stuck in a collective, which no Python code can interrupt.
One talks to the store: it writes this process's beat and reads the others'. The other judges by the clock, so that a
store which does not answer stops no judgement. What ends a process is written down first: the stacks of all threads in
RUN/logs/rankR.log and on stderr, and one line that says which process is to blame.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from opensora_repro.parallel.store import Place, Store, keeper, keeps_store, listed

BEAT_EVERY = 1.0  # seconds
JUDGE_EVERY = 0.5
SILENCE = 20.0  # without a beat a process counts as dead
SUSPICION = 4.0  # the same, once a collective has failed
GRACE = 10.0  # for ending by itself, after another process has raised an error or the store is gone
FAREWELL = 5.0  # for the others to write down their stacks, before torchrun sees the first process end and kills them
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Beat:
    """What a process last said. `count` grows with its progress; `changed` is this process's clock, in seconds."""

    text: str
    changed: float

    @property
    def count(self) -> int:
        return int(self.text.split(" ", 2)[1])

    @property
    def at(self) -> str:
        return self.text.split(" ", 2)[2]

    @property
    def ended(self) -> bool:
        return self.at in (DONE, FAILED)


@dataclass(frozen=True)
class Failure:
    """Why the job ends, as the first process to notice has put it; `grace`: the others may end by themselves."""

    by: int
    line: str
    grace: bool


class Watchdog:
    """`start` it, tell it of `progress`, and `close` it; with no other process to watch, all of it does nothing."""

    def __init__(
        self,
        rank: int,
        places: Sequence[Place],
        timeout: float,
        *,
        store: Store | None = None,
        connect: Callable[[], Store] | None = None,
    ) -> None:
        """`timeout`: seconds a step may take. `store` is the main thread's; `connect` opens the watchdog's own."""
        self.rank, self.places, self.timeout, self.store = rank, places, timeout, store
        self._connect = connect
        self._silence = min(SILENCE, timeout)
        self._logs: Path | None = None
        self._count, self._at = 0, "start"
        self._since, self._limit = time.monotonic(), float("inf")
        self._beats: dict[int, Beat] = {}
        self._exchanged = time.monotonic()
        self._cut_off: float | None = None  # when the store was found gone
        self._error: BaseException | None = None  # the main thread's, from a collective
        self._own: Failure | None = None
        self._failure: Failure | None = None
        self._failure_seen = 0.0
        self._wake, self._told, self._over = threading.Event(), threading.Event(), threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """From here on silence and lost contact end this process; `timeout` counts from the first `progress`."""
        if self._connect is None:
            return
        faulthandler.enable()  # a crash shows its stacks, too
        for work in (self._talk, self._judge):
            self._threads.append(threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True))
            self._threads[-1].start()

    # What the main thread says

    def progress(self, at: str) -> None:
        """The main thread begins `at` (such as "step 12") and has `timeout` seconds until it says so again."""
        self._count, self._at = self._count + 1, at
        self._since, self._limit = time.monotonic(), self.timeout

    @contextlib.contextmanager
    def limited(self, at: str, seconds: float) -> Iterator[None]:
        """The block may take `seconds`; afterwards the clock is as it was, started anew."""
        self._count, self._at = self._count + 1, at
        with self._clock(seconds):
            yield

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """The block may take as long as it likes: encoding, saving, sampling. Silence still ends the process."""
        return self._clock(float("inf"))

    @contextlib.contextmanager
    def _clock(self, limit: float) -> Iterator[None]:
        before = self._limit
        self._since, self._limit = time.monotonic(), limit
        try:
            yield
        finally:
            self._since, self._limit = time.monotonic(), before

    @contextlib.contextmanager
    def reporting(self, logs: Path) -> Iterator[None]:
        """Stacks go to the folder `logs`. An error of the block is told to the others before it is raised.

        A collective's error ends the process instead, with a line that names the process which caused it.
        """
        self._logs = logs
        try:
            yield
        except BaseException as error:
            if self._threads:
                self._report(error)
            raise

    def close(self) -> None:
        """This process is through: the others no longer wait for its beats."""
        if not self._threads:
            return
        if self._own is None:
            self._say(DONE)
        if keeps_store(self.rank):
            self._await_ends(GRACE if self._own is None else FAREWELL)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(FAREWELL)
        self._threads = []

    def who_is_silent(self, wait: float = SUSPICION + 2 * BEAT_EVERY) -> list[Place]:
        """The processes without a beat for `SUSPICION` seconds, once there are any or after `wait` seconds."""
        end = time.monotonic() + wait
        while not (silent := self._silent(SUSPICION)) and self._failure is None and self._cut_off is None:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        return silent

    # The thread that talks

    def _talk(self) -> None:
        assert self._connect is not None
        try:
            store = self._connect()
            number = 0
            while not self._over.is_set():
                self._exchange(store, number := number + 1)
                self._wake.wait(BEAT_EVERY)
                self._wake.clear()
        except (RuntimeError, ValueError):  # the store is gone; EngineError where it could not be reached
            self._cut_off = time.monotonic()
            self._told.set()

    def _exchange(self, store: Store, number: int) -> None:
        own, at = self._own, self._at
        if own is not None:
            store.compare_set("failure", "", json.dumps([own.by, own.line, own.grace]))
        store.set(f"beat/{self.rank}", f"{number} {self._count} {at}")
        texts = store.multi_get([f"beat/{place.rank}" for place in self.places])
        now = time.monotonic()
        for place, text in zip(self.places, texts, strict=True):
            beat = self._beats.get(place.rank)
            if beat is None or beat.text != text.decode():
                self._beats[place.rank] = Beat(text.decode(), now)
        if self._failure is None and store.check(["failure"]):
            self._failure, self._failure_seen = Failure(*json.loads(store.get("failure"))), now
        self._exchanged = now
        if at in (DONE, FAILED):
            self._told.set()

    # The thread that judges

    def _judge(self) -> None:
        while not self._over.wait(JUDGE_EVERY):
            line = self._why_to_end(time.monotonic())
            if line:
                self._end(line)

    def _why_to_end(self, now: float) -> str | None:
        """Why this process must end now; None where it need not."""
        failure = self._failure
        if failure is not None and failure.by != self.rank:
            return failure.line if now - self._failure_seen > GRACE * failure.grace else None
        gone = self._cut_off is not None and now - self._cut_off > GRACE / 2
        if gone or now - self._exchanged > self._silence:
            return self._store_gone()
        stands = now - self._since > self._limit
        silent = self._silent(SUSPICION if stands else self._silence)
        if silent:
            return self._silence_of(silent)
        return self._standstill(now - self._since) if stands else None

    def _silent(self, seconds: float) -> list[Place]:
        """Measured at the last exchange, so that this process's own delay makes nobody silent."""
        late = self._exchanged - seconds
        return [place for place, beat in self._others() if not beat.ended and beat.changed < late]

    def _others(self) -> list[tuple[Place, Beat]]:
        """The other processes, as far as their beats are known."""
        return [(p, self._beats[p.rank]) for p in self.places if p.rank != self.rank and p.rank in self._beats]

    def _silence_of(self, silent: Sequence[Place]) -> str:
        seconds = min(self._exchanged - self._beats[place.rank].changed for place in silent)
        verb = "has" if len(silent) == 1 else "have"
        return f"{listed(silent)} {verb} been silent for {seconds:.0f} s: dead, or cut off. {self._advice()}"

    def _store_gone(self) -> str:
        return f"{keeper()}, through which the processes watch each other, is gone. {self._advice()}"

    def _standstill(self, seconds: float) -> str:
        behind = [(place, beat) for place, beat in self._others() if beat.count < self._count]
        who = "; ".join(f"{place} is behind, at {beat.at}" for place, beat in behind)
        return f"{self._at} has not ended after {seconds:.0f} s; {who or 'all processes are in it'}. {self._advice()}"

    def _advice(self) -> str:
        stacks = f"Stacks: {self._logs}; start" if self._logs else "Start"
        return f"{stacks} the same command again to resume"

    # The end

    def _report(self, error: BaseException) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut the search for the cause short
        if _is_collective(error):
            self._error = error
            self._end(self._cause_of(error))
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self._own = Failure(self.rank, f"{self.places[self.rank]} ended: {reason}", grace=True)
        self._say(FAILED)

    def _cause_of(self, error: BaseException) -> str:
        """The line that explains a failed collective: another's failure, silent processes, a lost store, or itself."""
        silent = self.who_is_silent()
        if self._failure is not None and self._failure.by != self.rank:
            return self._failure.line
        if silent:
            return self._silence_of(silent)
        if self._cut_off is not None:
            return self._store_gone()
        return f"a collective failed in {self._at}: {' '.join(str(error).split())}. {self._advice()}"

    def _end(self, line: str) -> None:
        """Write down the stacks, say why, tell the others, and end this process with exit code 1."""
        with self._ending:  # for good: whoever comes second finds the process ended
            self._own = Failure(self.rank, line, grace=False)
            self._wake.set()  # the others learn of it while this process writes
            self._write_stacks(line)
            print(f"error (process {self.rank}): {line}", file=sys.stderr, flush=True)
            self._say(FAILED)
            self._await_ends(FAREWELL)
            os._exit(1)

    def _say(self, end: str) -> None:
        """The last beat; waits a little for it to be written."""
        self._at = end
        self._told.clear()
        self._wake.set()
        self._told.wait(2 * BEAT_EVERY)

    def _await_ends(self, seconds: float) -> None:
        """Until every process that is not silent has said its last beat; at most `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._cut_off is None:
            silent = self._silent(SUSPICION)
            if all(beat.ended for place, beat in self._others() if place not in silent):
                return
            time.sleep(0.05)
            self._wake.set()

    def _write_stacks(self, line: str) -> None:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.places[self.rank]}: {line}\n"
        if self._error is not None:
            text += "".join(traceback.format_exception(self._error))
        with contextlib.suppress(OSError):  # a full disk must not keep the process alive
            _write_stacks(sys.stderr, text)
        if self._logs is not None:
            with contextlib.suppress(OSError):
                self._logs.mkdir(parents=True, exist_ok=True)
                with open(self._logs / f"rank{self.rank}.log", "a", encoding="utf-8") as file:
                    _write_stacks(file, text)


def _write_stacks(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)


def _is_collective(error: BaseException) -> bool:
    """gloo raises a bare RuntimeError that names a file of its own."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
