"""Worker processes that answer one task after another, and outlive neither a task's trouble nor their parent.

A worker is started afresh (not forked), in its own process group, and is ended by the kernel together with the process
that started it. A task that crashes its worker, or outlasts its time, costs that one task: the worker is killed, reaped
and replaced.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from opensora_repro.files import content_of

Work = Callable[[dict[str, Any]], Any]
KILL_ON_PARENT_DEATH = 1  # Linux: prctl's PR_SET_PDEATHSIG
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # not the input's fault, and the next one will not fare better
ON_PURPOSE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a person, or the out-of-memory killer


@dataclass(frozen=True)
class Task:
    """Arguments for the work, and the seconds it may take (None: any); or files whose sha256 is asked for instead."""

    key: str
    args: dict[str, Any]
    seconds: float | None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What became of a task: its result as JSON, and whether that is final."""

    text: str
    final: bool = True

    @staticmethod
    def failed(reason: str, *, final: bool) -> Done:
        return Done(json.dumps({"error": reason}), final)


Steps = Generator[tuple[str, Done] | None, None, None]


def run_here(work: str, tasks: Iterator[Task], workers: int, gpus: Sequence[str] = ()) -> Steps:
    """Yield each task's key and what became of it, in the order they end; None about every second while none does.

    `work` is "module:function"; each worker sees its own of the `gpus`, if there are any. Closing the generator kills
    the workers.
    """
    pool = Pool(work, workers, gpus)
    try:
        pool.fill(tasks)
        while pool.busy:
            ready = wait(pool.busy)
            if not ready:
                yield None
            for worker in ready:
                if done := pool.take(worker):
                    yield worker.task.key, done
                    pool.fill(tasks)
    finally:
        pool.close()


class Pool:
    """At most `size` workers, each started when there is something for it to do; see `run_here`."""

    def __init__(self, work: str, size: int, gpus: Sequence[str] = ()) -> None:
        threads = max(1, num_cores() // size) if size > 1 else None
        self.work, self.busy, self.idle = work, list[Worker](), list[Worker]()
        self.not_started = [surroundings(threads, gpus[number] if gpus else None) for number in range(size)]

    def fill(self, tasks: Iterator[Task]) -> None:
        """Give tasks to those that have none, as long as there are some."""
        while self.idle or self.not_started:
            if (task := next(tasks, None)) is None:
                return
            worker = self.idle.pop() if self.idle else Worker(self.work, self.not_started.pop(0))
            self.busy.append(worker)
            worker.give(task)

    def take(self, worker: Worker) -> Done | None:
        """Return what became of a busy worker's task, None while it is at it; another one follows one that died."""
        done = worker.take()
        if done:
            self.busy.remove(worker)
            if worker.dead:
                self.not_started.insert(0, worker.environment)
            else:
                self.idle.append(worker)
        return done

    def close(self) -> None:
        for worker in self.idle:
            worker.end()
        for worker in self.busy:
            worker.kill()


def surroundings(threads: int | None, gpu: str | None = None) -> dict[str, str]:
    """Return the environment variables of a worker, which its libraries read when they load.

    Otherwise they start a thread a core, in every worker; OpenCV gains nothing by that on single frames.
    """
    told = {"OPENCV_FOR_THREADS_NUM": "1"}
    if threads is not None:
        told["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return told | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})


def wait(pool: list[Worker]) -> list[Worker]:
    """Return the workers that have something to say, have ended or are over their time; waits a second at most."""
    left = min(worker.deadline for worker in pool) - time.monotonic()
    heard = connection.wait([worker.pipe for worker in pool], timeout=min(1.0, max(0.0, left)))
    return [w for w in pool if w.pipe in heard or w.deadline <= time.monotonic()]


class Worker:
    """A process that answers one task after another, with some more variables in its environment."""

    def __init__(self, work: str, environment: dict[str, str]) -> None:
        self.work, self.environment, self.dead, self.started = work, environment, False, False
        self.task: Task
        self.deadline = float("inf")
        context = multiprocessing.get_context("spawn")  # forking a process that has threads is a gamble
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, environment), daemon=True)
        with _no_interrupt():
            self.process.start()
        theirs.close()  # now only the worker holds it, so that its end is heard here

    def give(self, task: Task) -> None:
        """Send a task; its time runs from when the worker is up."""
        self.task = task
        self._start_clock()
        with suppress(OSError):  # a worker that is gone is found out by `take`
            self.pipe.send_bytes(json.dumps([task.args, task.files]).encode())

    def _start_clock(self) -> None:
        seconds = self.task.seconds
        self.deadline = time.monotonic() + seconds if self.started and seconds is not None else float("inf")

    def take(self) -> Done | None:
        """Return what became of the task: the answer, a crash or a missed deadline; None if it has only begun."""
        if not self.pipe.poll():
            self.kill()
            return Done.failed(f"took longer than the time limit of {self.task.seconds:g} s", final=False)
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return self._crashed(self.kill())
        kind, text = answer[:1], answer[1:].decode()
        if kind == b"S":
            self.started = True
            self._start_clock()
            return None
        if kind == b"I":
            raise RuntimeError(f"{self.work} cannot be imported by a worker: {text}")
        if kind == b"D":
            raise OSError(text)
        return Done(text, final=kind == b"R")

    def _crashed(self, status: int) -> Done:
        if not self.started:
            raise RuntimeError(f"a worker process for {self.work} did not start (exit status {status})")
        if status >= 0:
            return Done.failed(f"ended its worker process (exit status {status})", final=True)
        if -status in ON_PURPOSE:
            why = ": out of memory?" if -status == signal.SIGKILL else ""
            return Done.failed(f"its worker process was killed ({signal.Signals(-status).name}{why})", final=False)
        return Done.failed(f"crashed its worker process ({signal.strsignal(-status)})", final=True)

    def end(self) -> None:
        """Let an idle worker leave by itself: it does so when its pipe closes."""
        if not self.dead:
            self.pipe.close()
            self.process.join(5)
            self.kill()

    def kill(self) -> int:
        """Kill the worker and what it started, and reap it; return its exit status."""
        if self.dead:
            return 0
        self.dead = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        status = self.process.exitcode or 0
        self.process.close()
        self.pipe.close()
        return status


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Keep Ctrl-C from a process that is being started: it is for the one that starts it, where it arrives after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def named_function(name: str) -> Any:
    """Return what "module:function" names."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)


def _serve(pipe: Any, name: str, environment: dict[str, str]) -> None:
    """Be a worker: answer tasks until the pipe closes."""
    if hasattr(os, "setsid"):
        os.setsid()  # away from the terminal's Ctrl-C, and killed together with whatever `work` starts
    _die_with_parent()
    os.environ.update(environment)  # before `work` imports what reads it
    try:
        work = named_function(name)
    except Exception as error:
        pipe.send_bytes(b"I" + one_reason(error).encode())
        return
    pipe.send_bytes(b"S")
    while True:
        try:
            args, files = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        with suppress(BrokenPipeError):
            pipe.send_bytes(_answer(work, args, files))


def _answer(work: Work, args: dict[str, Any], files: Sequence[str]) -> bytes:
    """Return R and the result, E and an error, or D and trouble with the disk."""
    try:
        return b"R" + json.dumps([content_of(Path(file)) for file in files] if files else work(args)).encode()
    except OSError as error:
        kind = b"D" if error.errno in DISK_TROUBLE else b"E"
        text = one_reason(error)
    except (Exception, SystemExit) as error:
        kind, text = b"E", one_reason(error)
    return kind + (text if kind == b"D" else json.dumps({"error": text})).encode()


def one_reason(error: BaseException) -> str:
    """Return an error as one line, with its type where the text alone would not tell."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def _die_with_parent() -> None:
    """End this process when the one that started it does, even if that one is killed.

    The kernel sees to it on Linux, whatever this process is doing; elsewhere a thread that waits for the parent.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(KILL_ON_PARENT_DEATH, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it was quicker
            os._exit(1)
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
