"""A cluster of two nodes, one of which is killed in mid-run: nothing is lost or there twice, all as on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from opensora_repro.data.jobs import parts
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.errors import DataError
from tests.e2e.test_data_tools import film
from tests.e2e.test_ray_tools import run_tools
from tests.frames import read_table
from tests.job_works import node, square

COUNT = 240
ROWS = 8  # a chunk
PATIENCE = 1800  # seconds: a node takes a minute to start where other work goes on


def lines(folder: Path) -> list[int]:
    log = folder / "log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def workers(folder: Path) -> set[str]:
    """Return the processes that have done rows: of two, each is on a node, which has one core."""
    return {line.split()[1] for line in (folder / "log").read_text().splitlines()}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run(folder: Path, runner: Runner, count: int = COUNT) -> list[Any]:
    (folder / "files").mkdir(parents=True, exist_ok=True)
    jobs = []
    for n in range(count):
        if not (file := folder / "files" / str(n)).exists():
            file.write_text(str(n))
        jobs.append(Job("k", str(n), {"n": n, "log": str(folder / "log"), "sleep": 0.1}, 60.0, (file,)))
    with Records(folder / "out") as records:
        return list(
            run_jobs(
                square, jobs, Keeping(records, "x"), runner=runner, label="squaring", resources=Resources(rows=ROWS)
            )
        )


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [row for part in folder.glob("*.parquet") for row in parts.read_part(part).to_pylist()]


@contextmanager
def cluster_of(**head: int) -> Iterator[Any]:
    """Yield a cluster on this machine, which this process has joined."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def killing(cluster: Any, when: Callable[[], bool]) -> Iterator[None]:
    """Add a node of one core, and kill it as soon as `when` holds, within the block."""
    doomed = cluster.add_node(num_cpus=1)

    def kill() -> None:
        wait_for(when)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


@pytest.mark.exhaustive
@pytest.mark.timeout(PATIENCE)
def test_a_killed_node_costs_what_was_in_flight(tmp_path: Path) -> None:
    here, folder = run(tmp_path / "here", Runner("local", 2)), tmp_path / "there"
    with cluster_of(num_cpus=1) as cluster:
        with killing(cluster, lambda: len(lines(folder)) >= COUNT // 4 and len(workers(folder)) > 1):
            there = run(folder, Runner("ray", 2, "auto"))
        assert there == here
        kept = rows_in(folder / "out" / "parts" / "x")
        assert len(kept) == COUNT and len({row["quick"] for row in kept}) == COUNT
        done = Counter(lines(folder))
        assert set(done) == set(range(COUNT)) and set(done.values()) <= {1, 2}
        assert sum(done.values()) <= COUNT + 2 * ROWS  # the chunks that the node had
        assert run(folder, Runner("ray", 2, "auto")) == here and Counter(lines(folder)) == done


@pytest.mark.exhaustive
@pytest.mark.timeout(PATIENCE)
def test_tools_give_the_same_where_a_node_is_killed(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "there"
    videos.mkdir()
    for number in range(12):
        film(videos / f"{number}.mp4", [(level, 12) for level in (20 + number, 120 + number, 200 - number)])
    (videos / "broken.mp4").write_bytes(b"\0" * 500)
    run_tools(videos, tmp_path / "here")
    with cluster_of(num_cpus=1) as cluster, killing(cluster, lambda: any(out.glob("split/clips/*.mp4"))):
        run_tools(videos, out, "--runner", "ray", "--address", "auto")
    for tool in ("probe", "split", "score"):
        first, second = (tmp_path / name / tool for name in ("here", "there"))
        assert (first / "rejects.parquet").read_bytes() == (second / "rejects.parquet").read_bytes()
        pd.testing.assert_frame_equal(
            read_table(first / "manifest.parquet"), read_table(second / "manifest.parquet"), check_exact=True
        )


@pytest.mark.exhaustive
@pytest.mark.timeout(PATIENCE)
def test_work_without_gpus_keeps_away_from_nodes_with_some(tmp_path: Path) -> None:
    jobs = [Job(f"k{n}", "", {"sleep": 0.3}) for n in range(24)]

    def nodes(name: str, runner: Runner) -> set[int]:
        with Records(tmp_path / name) as records:
            return set(run_jobs(node, jobs, Keeping(records, "x"), runner=runner, label="x"))

    with cluster_of(num_cpus=2) as cluster:
        there = cluster.add_node(num_cpus=2, num_gpus=1).all_processes["raylet"][0].process.pid
        assert there not in nodes("cpu", Runner("ray"))
        assert nodes("gpu", Runner("ray", gpu=True)) == {there}
        assert there in nodes("told", Runner("ray", workers=4, gpu_nodes=True))
        with pytest.raises(DataError, match=r"no node has the 1 cores, 2 GPUs and 0\.0 GiB of memory"):
            nodes("two", Runner("ray", gpu=True, gpus=2.0))


@pytest.mark.exhaustive
@pytest.mark.timeout(PATIENCE)
def test_a_killed_driver_costs_what_was_in_flight(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    program = (
        "import sys; from pathlib import Path; from opensora_repro.data.jobs.run import Runner\n"
        "from tests.e2e.test_ray_cluster import run\n"
        "if __name__ == '__main__': run(Path(sys.argv[1]), Runner('ray', 2, 'local'))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(lines(tmp_path)) >= COUNT // 4)
        os.kill(process.pid, signal.SIGKILL)
    found = run(tmp_path, Runner("ray", 2, "local"))
    assert [result["square"] for result in found] == [n * n for n in range(COUNT)]
    done = Counter(lines(tmp_path))
    assert set(done) == set(range(COUNT)) and sum(done.values()) <= COUNT + 3 * ROWS
    assert len({row["quick"] for row in rows_in(tmp_path / "out" / "parts" / "x")}) == COUNT
