"""Jobs: nothing twice, nothing lost, and nobody left behind, whatever the work or the person does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensora_repro.data.jobs import cluster, gpus
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Course, Job, Keeping
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, run_jobs, runner_of
from opensora_repro.data.jobs.workers import Done, Task, num_cores, run_here
from opensora_repro.data.options import parse, parser_of
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError, UserError
from tests import job_works
from tests.job_records import recorded
from tests.job_works import misbehave, square

TWO = Runner("local", 2)
COUNT = 160  # jobs of a run that is stopped: seconds of work


def run(work: Any, todo: list[Job], folder: Path, runner: Runner = TWO, **more: Any) -> dict[str, Any]:
    """Return the results by the jobs' keys."""
    with Records(folder) as records:
        results = run_jobs(work, todo, Keeping(records, "x"), runner=runner, label="testing", **more)
    return {job.key: result for job, result in zip(todo, results, strict=True)}


def numbers(folder: Path, count: int) -> list[Job]:
    return [Job(f"k{n}", f"file {n}", {"n": n, "log": str(folder / "log")}) for n in range(count)]


def ran(folder: Path) -> list[int]:
    """Return the numbers that were squared."""
    return sorted(int(line.split()[0]) for line in (folder / "log").read_text().splitlines())


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped by the machine's first process does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def soon(condition: Any) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def test_results_in_order_and_never_twice(tmp_path: Path) -> None:
    todo = [*numbers(tmp_path, 5), Job("k0", "twin", {"n": 0, "log": str(tmp_path / "log")})]
    results = run(square, todo, tmp_path)
    assert list(results) == [f"k{n}" for n in range(5)]
    assert [r["square"] for r in results.values()] == [0, 1, 4, 9, 16]
    assert recorded(tmp_path, "x") == results
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert run(square, numbers(tmp_path, 5), tmp_path) == results
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before
    assert run(square, numbers(tmp_path, 6), tmp_path).items() >= results.items()
    assert ran(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_files_are_known_by_content(tmp_path: Path) -> None:
    """Twins are worked on once, and what is moved or touched not again; what is changed or treated otherwise is."""
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text("twin" if file.name != "c" else "other")

    def done(key: str = "k", one_a_file: bool = False) -> list[int]:
        todo = [Job(key, "", {"n": n, "log": str(tmp_path / "log")}, files=(file,)) for n, file in enumerate(files)]
        with Records(tmp_path / "out") as records:
            keeping = Keeping(records, "x", one_a_file=one_a_file)
            results = list(run_jobs(square, todo, keeping, runner=TWO, label="testing"))
        assert results[0] == results[1] and [r["square"] for r in results[1:]] in ([0, 4], [1, 4])
        return ran(tmp_path)

    first = done()
    assert len(first) == 2 and first[1] == 2
    os.utime(files[0])
    files[2] = files[2].rename(tmp_path / "moved")
    assert done() == first
    files[2].write_text("again")
    assert done() == [*first, 2]
    assert len(done(key="l", one_a_file=True)) == 5  # in the place of what was made under k
    assert len(done()) == 7
    files[2].unlink()  # is told by the work that opens it
    assert len(done()) == 8


def test_each_failure_costs_its_own_job(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    hows = ["SIGSEGV", None, "hang", "exit", None, "raise", "SIGKILL", None]
    todo = [
        Job(f"k{i}", "", {"n": i, "how": how, "pids": str(tmp_path / "pids")}, 2.0 if how == "hang" else 60.0)
        for i, how in enumerate(hows)
    ]
    results = run(misbehave, todo, tmp_path)
    assert results["k0"] == {"error": "crashed its worker process (Segmentation fault)"}
    assert results["k2"] == {"error": "took longer than the time limit of 2 s"}
    assert results["k3"] == {"error": "ended its worker process (exit status 3)"}
    assert results["k5"] == {"error": "ValueError: two lines"}
    assert results["k6"] == {"error": "its worker process was killed (SIGKILL: out of memory?)"}
    assert [results[f"k{i}"]["square"] for i in (1, 4, 7)] == [1, 16, 49]
    # a crash would come again; a slow or crowded machine may be better next time
    assert recorded(tmp_path, "x").keys() == {"k0", "k1", "k3", "k4", "k7"}
    pids = list((tmp_path / "pids").iterdir())
    assert len(pids) >= 5
    assert soon(lambda: not any(alive(int(p.stem)) for p in pids))
    assert not any(Path(f"/proc/{p.name}").exists() for p in pids if not p.suffix)  # no worker is left as a zombie


def test_a_full_disk_stops_the_run(tmp_path: Path) -> None:
    todo = [Job(f"k{i}", "", {"n": i, "how": "full" if i == 2 else None}) for i in range(50)]
    with pytest.raises(OSError, match="No space left on device"):
        run(misbehave, todo, tmp_path)
    assert "k2" not in recorded(tmp_path, "x")


def test_work_must_be_importable(tmp_path: Path) -> None:
    def local(args: dict[str, Any]) -> Any:
        return args

    with pytest.raises(TypeError, match="top-level function"):
        run(local, numbers(tmp_path, 1), tmp_path)


def start(folder: Path, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(Path(__file__).parents[1] / "job_works.py"), str(folder), str(count), "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def workers_of(folder: Path) -> set[int]:
    log = folder / "log"
    return {int(line.split()[1]) for line in log.read_text().splitlines()} if log.exists() else set()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C: everybody in the terminal's group gets it. Python drops one that arrives within a destructor."""
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_nobody_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    with start(tmp_path, COUNT) as process:
        assert soon(lambda: len(recorded(tmp_path, "x")) >= 5)
        if how == signal.SIGINT:
            interrupt(process)
        else:
            os.kill(process.pid, how)
        errors = process.communicate(timeout=30)[1].decode()
        status = process.returncode
    assert status == (-9 if how == signal.SIGKILL else 130)
    assert errors == ("" if how == signal.SIGKILL else "interrupted; the same command goes on from here\n")
    assert soon(lambda: not any(alive(pid) for pid in workers_of(tmp_path)))
    assert 5 <= len(recorded(tmp_path, "x")) < COUNT
    with start(tmp_path, COUNT) as process:
        assert process.wait(60) == 0
    found = recorded(tmp_path, "x")
    assert {key: r["square"] for key, r in found.items()} == {f"{n:03d}": n * n for n in range(COUNT)}
    numbers_run = ran(tmp_path)
    assert all(numbers_run.count(n) <= 2 for n in range(COUNT))
    assert len(numbers_run) <= COUNT + 3  # what was under way, and one that was just handed over
    assert sorted(p.name for p in tmp_path.rglob(".*")) == []


def test_ray_gives_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "pids").mkdir()
    hows = ["SIGSEGV", None, "hang", "raise", *[None] * 2]
    todo = [
        Job(f"k{i}", "", {"n": i, "how": how, "pids": str(tmp_path / "pids")}, 2.0 if how == "hang" else 60.0)
        for i, how in enumerate(hows)
    ]
    here = run(misbehave, todo, tmp_path / "here")
    there = run(misbehave, todo, tmp_path / "there", Runner("ray", 2, "local"))
    assert there == here
    with Records(tmp_path / "there") as records:
        to_records(Keeping(records, "x"))  # as the next run on this machine does
    assert recorded(tmp_path / "here", "x") == recorded(tmp_path / "there", "x")
    assert soon(lambda: not any(alive(int(p.stem)) for p in (tmp_path / "pids").iterdir()))


def test_each_worker_has_a_gpu_and_few_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that takes the place of another takes its GPU, too."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "pids").mkdir()
    told = {"pids": str(tmp_path / "pids")}
    hows = ["exit", "SIGSEGV", None, None, None]
    tasks = [Task(str(n), {"n": n, "how": how, **told}, None) for n, how in enumerate(hows)]
    done = [step for step in run_here("tests.job_works:surroundings", iter(tasks), 2, ["5", "GPU-1"]) if step]
    found = [json.loads(outcome.text) for _, outcome in done]
    seen = [told for told in found if "gpu" in told]
    assert len(seen) == 3 and len(found) == 5
    assert {told["gpu"] for told in seen} <= {"5", "GPU-1"}
    assert {told["cv2"] for told in seen} == {1} and {told["omp"] for told in seen} == {str(max(1, num_cores() // 2))}
    pairs = {path.name.split("-", 1)[0]: path.name.split("-", 1)[1] for path in (tmp_path / "pids").iterdir()}
    assert sorted(set(pairs.values())) == ["5", "GPU-1"] and len(pairs) in (3, 4)  # one or both were replaced


def test_which_gpus_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert gpus.visible_gpus() == ["3", "GPU-7"]
    assert gpus.check_device("cuda", 2, over_ray=False) and gpus.check_device("cuda", 9, over_ray=True)
    assert not gpus.check_device("cuda:1", 9, over_ray=False) and not gpus.check_device("cpu", 9, over_ray=False)
    for device, over_ray, message in (
        ("cuda", False, "--model-workers 3: more than the 2 GPUs here"),
        ("cuda:2", False, "--device cuda:2: 2 GPUs can be used here"),
        ("cuda:0", True, "--device cuda:0: over Ray each worker gets a GPU of its own"),
        ("nowhere", False, "--device nowhere: "),
    ):
        with pytest.raises(DataError, match=message):
            gpus.check_device(device, 3, over_ray=over_ray)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DataError, match="--device cuda: no GPU can be used here"):
        gpus.check_device("cuda", 1, over_ray=False)


def test_which_nodes_have_room() -> None:
    """As Ray tells of three nodes: one with GPUs, one without, one that is gone."""
    facts = [("a", True, {"CPU": 8.0, "GPU": 2.0, "memory": 64.0}), ("b", True, {"CPU": 3.0, "memory": 10.0}),
             ("c", False, {"CPU": 99.0})]  # fmt: skip
    told = [{"NodeID": name, "Alive": alive, "Resources": resources} for name, alive, resources in facts]

    def room(resources: Resources, place: cluster.Place, nodes: list[dict[str, Any]] = told) -> tuple[int, object]:
        found, apart = cluster._nodes(SimpleNamespace(nodes=lambda: nodes), resources, place)
        return cluster._room(found, resources), apart

    here = cluster.Place()
    assert room(Resources(), here) == (3, {"ray.io/node-id": "!in(a)"})
    assert room(Resources(memory=4), here)[0] == 2 and room(Resources(cpus=2.0), here)[0] == 1
    assert room(Resources(), cluster.Place(gpu_nodes=True)) == (11, None)
    assert room(Resources(gpus=1.0), here) == (2, None) and room(Resources(gpus=0.5), here) == (4, None)
    assert room(Resources(), here, told[:1]) == (8, None)  # where there are no others
    with pytest.raises(DataError, match="this cluster has no GPU, as --device cuda asks for"):
        room(Resources(gpus=1.0), here, told[1:])
    with pytest.raises(DataError, match=r"no node has the 4 cores, 0 GPUs .* of a worker; --cpus, --gpus and --memory"):
        room(Resources(cpus=4.0), here)


@pytest.mark.exhaustive
def test_ray_keeps_to_its_workers_and_gives_each_a_gpu(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    (tmp_path / "pids").mkdir()
    ray.init(address="local", num_cpus=4, num_gpus=3, include_dashboard=False, log_to_driver=False)
    try:
        told = {"pids": str(tmp_path / "pids"), "how": None}
        jobs = [Job(str(n), "", {"n": n, **told}) for n in range(8)]
        found = run(job_works.surroundings, jobs, tmp_path, Runner("ray", 2, gpu=True))
        assert len({told["gpu"] for told in found.values()}) == 2 and {told["cv2"] for told in found.values()} == {1}
        assert len(list((tmp_path / "pids").iterdir())) == 2  # of four cores
        run(job_works.surroundings, jobs[:1], tmp_path / "one", Runner("ray", 0, gpu=True))
    finally:
        ray.shutdown()


def options(*given: str) -> RunnerArguments:
    return parse(RunnerArguments, parser_of(RunnerArguments, "tool", None), given)


def test_runner_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runner_of(options()) == Runner("local", 0, None)
    assert runner_of(options("--workers", "3")) == Runner("local", 3, None)
    with pytest.raises(DataError, match="--workers -1"):
        runner_of(options("--workers", "-1"))
    with pytest.raises(DataError, match="--address: only with --runner ray"):
        runner_of(options("--address", "auto"))
    with pytest.raises(DataError, match="--gpu-nodes: only with --runner ray"):
        runner_of(options("--gpu-nodes"))
    with pytest.raises(UserError, match=r"--memory -1\.0: expected 0 or more"):
        runner_of(options("--runner", "ray", "--memory", "-1"))
    told = runner_of(options("--runner", "ray", "--cpus", "2", "--gpus", ".5", "--memory", "1.5"))
    assert told.resources(Resources(rows=8)) == Resources(cpus=2.0, memory=3 << 29, rows=8)
    assert (
        replace(told, gpu=True).resources(Resources()).gpus == 0.5
        and Runner(gpu=True).resources(Resources()).gpus == 1.0
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="Ray is not installed"):
        runner_of(options("--runner", "ray", "--address", "auto"))
    with pytest.raises(DataError, match="Ray is not installed"):
        cluster.import_ray()


def test_progress_is_quiet_for_short_work_and_tells_of_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("testing", 3, "file") as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("opensora_repro.data.progress.LOG_EVERY", 0.0)
    with progress("testing", 3, "file") as advance:
        time.sleep(0.01)
        advance(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "testing" in line
    assert "1/3" in line


def test_twins_are_read_and_made_once(tmp_path: Path) -> None:
    """Rows of one file, or of equal ones, wait for the first; so they do where it cannot be read, or has failed."""
    for name in ("a", "b", "hangs"):
        (tmp_path / name).write_text("same")
    jobs = [Job("k", "", {}, files=(tmp_path / name,)) for name in ("a", "a", "b", "hangs", "a", "hangs")]
    with Records(tmp_path / "out") as records:
        course, sha = Course(jobs, Keeping(records, "x")), "0" * 64
        reads = [task.key for task in course]
        assert reads == ["0", "2", "3"] and course.num_left == 6
        course.take("0", Done(json.dumps([sha])))
        course.take("3", Done.failed("out of time", final=False))
        (work,) = course
        course.take("2", Done(json.dumps([sha])))
        assert (work.key, work.args) == ("0", {"contents": [sha]}) and not [*course] and course.take_new() == 2
        course.take("0", Done.failed("odd", final=False))
        assert course.take_new() == 4 and not [*course]
        assert [result["error"] for result in course.results()] == ["odd"] * 3 + ["out of time", "odd", "out of time"]
        assert records.places("x", ["k"]) == {} and not [*records.texts("failed x")]
