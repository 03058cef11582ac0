"""Work that behaves and misbehaves, for the tests of jobs; a script that runs it, for those that kill the script.

python tests/job_works.py FOLDER COUNT WORKERS
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opensora_repro.data.jobs.cluster import Place, Resources
    from opensora_repro.data.jobs.rows import Order

REPO = Path(__file__).resolve().parent.parent


def square(args: dict[str, Any]) -> Any:
    """Leave a mark in `log` each time it runs."""
    if "log" in args:
        with open(args["log"], "a") as file:
            file.write(f"{args['n']} {os.getpid()}\n")
    time.sleep(args.get("sleep", 0))
    return {"n": args["n"], "square": args["n"] ** 2, "odd name": "é\n'\udcff"}


def squares(args: dict[str, Any]) -> Any:
    """A batch: leave a mark in `log`; a spoilt item fails all of it."""
    with open(args["log"], "a") as file:
        file.write(" ".join(item["path"] for item in args["items"]) + "\n")
    if any(item.get("spoilt") for item in args["items"]):
        raise ValueError("spoilt")
    return {"clips": {item["key"]: {"square": item["n"] ** 2} for item in args["items"]}}


def surroundings(args: dict[str, Any]) -> Any:
    """Return what a worker's libraries found in its environment; leave PID-GPU, and do what `how` says."""
    import cv2

    Path(args["pids"], f"{os.getpid()}-{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    misbehave({"n": 0, "how": args["how"]})
    threads = {"cv2": cv2.getNumThreads(), "omp": os.environ["OMP_NUM_THREADS"]}
    return {"gpu": os.environ["CUDA_VISIBLE_DEVICES"], **threads}


def node(args: dict[str, Any]) -> Any:
    """Return the process of the cluster's node that this runs on, whose children are its actors."""
    time.sleep(args["sleep"])
    return int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])


def misbehave(args: dict[str, Any]) -> Any:
    """Do what `how` says."""
    how = args.get("how")
    if "pids" in args:
        Path(args["pids"], str(os.getpid())).touch()
    if how in ("SIGSEGV", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "once":
        try:
            Path(args["pids"], "once").touch(exist_ok=False)
        except FileExistsError:
            return square(args)
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(3)
    elif how == "hang":
        child = subprocess.Popen(["sleep", "1000"])  # which is to go with its worker
        Path(args["pids"], f"{child.pid}.child").touch()
        time.sleep(1000)
    elif how == "raise":
        raise ValueError("two\nlines")
    elif how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    return square(args)


def plan_here(order: Order, count: int, resources: Resources, place: Place) -> Iterator[Any]:
    """Let an actor's code do the chunks in this process: the same rows and parts as a plan's, without a cluster."""
    import numpy as np

    from opensora_repro.data.jobs import parts
    from opensora_repro.data.jobs.rows import Rows, folders_of

    actor = Rows(order)
    try:
        for number in range(count):
            done = actor({"chunk": np.array([number])})
            assert done["trouble"] == [""]
            yield json.loads(done["told"][0])
    finally:
        if actor.process.worker:
            actor.process.worker.end()
    for folder in folders_of(order):
        for group in parts.groups_to_merge(folder):
            parts.merge(group)


def main() -> None:
    sys.path.insert(0, str(REPO))
    from opensora_repro.data.jobs.course import Job, Keeping
    from opensora_repro.data.jobs.records import Records
    from opensora_repro.data.jobs.run import Runner, run_jobs
    from opensora_repro.errors import run_command
    from tests import job_works

    folder, count, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log = str(folder / "log")
    jobs = [Job(f"{n:03d}", str(n), {"n": n, "log": log, "sleep": 0.05}) for n in range(count)]

    def run() -> int:
        with Records(folder) as records:
            run_jobs(job_works.square, jobs, Keeping(records, "x"), runner=Runner("local", workers), label="squaring")
        return 0

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
