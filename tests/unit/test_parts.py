"""Parts: what a cluster's workers leave behind is found again, once, and by the newest that was made."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora_repro.data.jobs import parts, rows
from opensora_repro.data.jobs.cluster import Place, Resources
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.rows import Order, Rows
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.jobs.stream import Table, run_streamed
from tests.job_works import plan_here

CHUNK = 8


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora_repro.data.jobs.stream.run_plan", plan_here)
    monkeypatch.setattr("opensora_repro.data.jobs.stream.SPREAD", 4)


def run(work: str, todo: list[Job], folder: Path, **more: Any) -> list[Any]:
    with Records(folder) as records:
        keeping = Keeping(records, "x", **more)
        found = run_streamed(
            f"tests.job_works:{work}",
            Table.of_jobs(todo),
            keeping,
            resources=Resources(rows=CHUNK),
            place=Place(),
            label="x",
        )
        assert len(found) == len(todo)
        assert list(found) == list(found)
        return list(found)


def numbers(folder: Path, count: int) -> list[Job]:
    return [Job(f"k{n}", "", {"n": n, "log": str(folder / "log")}) for n in range(count)]


def ran(folder: Path) -> list[int]:
    return sorted(int(line.split()[0]) for line in (folder / "log").read_text().splitlines())


def read_parts(folder: Path) -> list[Any]:
    return [parts.read_part(part) for part in (folder / "parts" / "x").glob("*.parquet")]


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [row for part in read_parts(folder) for row in part.to_pylist()]


def test_only_what_is_new_is_done_and_each_runner_finds_what_the_other_did(tmp_path: Path) -> None:
    found = run("square", numbers(tmp_path, 50), tmp_path)
    assert [r["square"] for r in found] == [n * n for n in range(50)] and ran(tmp_path) == list(range(50))
    assert run("square", numbers(tmp_path, 60)[::-1], tmp_path)[::-1][:50] == found
    assert ran(tmp_path) == list(range(60)) and len(rows_in(tmp_path)) == 60
    index = parts.Index(tmp_path / "parts" / "x", 0)  # columns in one piece: to look one row up copies none of them
    assert index.entries.shape == (3, 60) and index.entries[0].flags.c_contiguous
    (tmp_path / "parts" / "x" / ".half.parquet.another-node.1-1.tmp").touch()
    assert run("square", numbers(tmp_path, 50), tmp_path) == found
    assert all(path.suffix == ".parquet" and path.name[0] != "." for path in (tmp_path / "parts" / "x").iterdir())
    with Records(tmp_path) as records:
        from tests.job_works import square

        here = run_jobs(square, numbers(tmp_path, 61), Keeping(records, "x"), runner=Runner(workers=1), label="x")
    assert list(here)[:50] == found and not (tmp_path / "parts" / "x").exists()
    assert run("square", numbers(tmp_path, 61), tmp_path) == list(here)
    assert ran(tmp_path) == list(range(61))


def test_files_are_known_by_content(tmp_path: Path) -> None:
    """What is moved or touched is not done again; what is changed, treated otherwise or no longer holds is."""
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_text(file.name)

    def done(key: str = "k", **more: Any) -> int:
        todo = [Job(key, "", {"n": n, "log": str(tmp_path / "log")}, files=(file,)) for n, file in enumerate(files)]
        before = len(ran(tmp_path)) if (tmp_path / "log").exists() else 0
        assert all("square" in result for result in run("square", todo, tmp_path / "out", **more))
        return len(ran(tmp_path)) - before

    assert done() == 3 and done() == 0
    os.utime(files[0])
    files[2] = files[2].rename(tmp_path / "moved")
    assert done() == 0 and done() == 0
    files[2].write_text("again")
    assert done() == 1
    assert done("l") == 3 and done() == 0  # beside what was made under k
    lost = {0}
    assert done(holds=lambda job, result: result["n"] not in lost or bool(lost.clear())) == 1
    shutil.rmtree(tmp_path / "out")
    assert done(one_a_file=True) == 3 and done("l", one_a_file=True) == 3  # in the place of what was made under k
    assert done("l", one_a_file=True) == 0 and done(one_a_file=True) == 3


def test_what_this_machine_knows_of_files_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    todo = [Job("k", "", {"n": 1}, files=(tmp_path / "a",))]
    from tests.job_works import square

    with Records(tmp_path / "out") as records:
        here = run_jobs(square, todo, Keeping(records, "x"), runner=Runner(workers=1), label="x")
    monkeypatch.delattr("opensora_repro.data.jobs.stream.run_plan")
    assert run("square", todo, tmp_path / "out") == list(here)


def test_each_failure_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    hows = [None, "SIGSEGV", None, "hang", "exit", None, "raise", "SIGKILL", None]
    pids = str(tmp_path / "pids")
    todo = [
        Job(f"k{i}", "", {"n": i, "how": how, "pids": pids}, 1.0 if how == "hang" else None)
        for i, how in enumerate(hows)
    ]
    found = run("misbehave", todo, tmp_path)
    assert run("misbehave", [Job("k", "", {"n": 3, "how": "once", "pids": pids})], tmp_path)[0]["square"] == 9  # alone
    assert [result.get("square", result.get("error")) for result in found] == [
        0, "crashed its worker process (Segmentation fault)", 4, "took longer than the time limit of 1 s",
        "ended its worker process (exit status 3)", 25, "ValueError: two lines",
        "its worker process was killed (SIGKILL: out of memory?)", 64,
    ]  # fmt: skip
    final = {row["name"] for row in rows_in(tmp_path) if row["final"]}
    assert final == {"k", "k0", "k1", "k2", "k4", "k5", "k8"}  # a slow or crowded machine may be better next time


def test_a_model_s_batch_that_fails_is_tried_one_by_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    items = [Job(f"k{n}", "", {"path": str(n), "n": n, "spoilt": n == 4}) for n in range(7)]
    with Records(tmp_path) as records:
        found = run_streamed(
            "tests.job_works:squares", Table.of_jobs(items), Keeping(records, "x"), resources=Resources(rows=7),
            place=Place(), label="x", group=3, options={"log": str(log)},
        )  # fmt: skip
        assert [r.get("square", r.get("error")) for r in found] == [0, 1, 4, 9, "ValueError: spoilt", 25, 36]


def test_a_chunk_goes_on_and_a_row_that_takes_its_node_along_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an actor's death: finished rows stay, and from then on the row under way is known."""
    monkeypatch.setattr(rows, "FLUSH", 0.0)
    folder, todo = tmp_path / "parts", tmp_path / "todo"
    folder.mkdir()
    todo.mkdir()
    order = Order("tests.job_works:square", folder, todo, run=1)

    class Killed(BaseException):
        """The end of an actor."""

    def chunk(dies_at: int | None) -> None:
        actor = Rows(order)
        answer = actor._do

        def work(args: dict[str, Any], seconds: float | None, *, twice: bool) -> Any:
            if args["n"] == dies_at:
                raise Killed
            return answer(args, seconds, twice=twice)

        actor._do = work  # type: ignore[method-assign]
        try:
            actor({"chunk": np.array([0])})
        finally:
            if actor.process.worker:
                actor.process.worker.kill()

    import pyarrow as pa
    import pyarrow.parquet as pq

    told = [
        {"quick": parts.named_hash(f"k{n}"), "key": f"k{n}", "args": json.dumps({"n": n, "log": str(tmp_path / "log")}),
         "seconds": 60.0, "files": None, "anew": False}
        for n in range(4)
    ]  # fmt: skip
    kinds = {"quick": pa.binary(16), "key": pa.string(), "args": pa.string(), "seconds": pa.float64(),
             "files": pa.string(), "anew": pa.bool_()}  # fmt: skip
    pq.write_table(pa.Table.from_pylist(told, pa.schema(kinds.items())), todo / "0000000.parquet")
    for _ in range(3):
        with pytest.raises(Killed):
            chunk(dies_at=2)
    assert ran(tmp_path) == [0, 1]  # once
    chunk(dies_at=2)
    found = {
        row["name"]: json.loads(row["text"]) for part in folder.iterdir() for row in parts.read_part(part).to_pylist()
    }
    assert found.pop("k2") == {"error": "its worker was lost 2 times with its node"}
    assert sorted(found) == ["k0", "k1", "k3"] and ran(tmp_path) == [0, 1, 3]


def test_many_small_parts_become_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SMALL_PARTS", 3)
    monkeypatch.setattr(parts, "FULL", 30)
    found = run("square", numbers(tmp_path, 80), tmp_path)
    names = sorted(part.name for part in (tmp_path / "parts" / "x").glob("*.parquet"))
    assert len(names) == 4 and all(name.startswith("merged-") for name in names)
    held = [sorted(int(row["name"][1:]) for row in part.to_pylist()) for part in read_parts(tmp_path)]
    assert all(rows[-1] - rows[0] == len(rows) - 1 for rows in held)  # neighbours: results are read in their order
    assert len(rows_in(tmp_path)) == 80 and run("square", numbers(tmp_path, 80), tmp_path) == found
    assert ran(tmp_path) == list(range(80))


def test_a_merge_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Ray tries it again; what was deleted by then is in the part that was made."""
    found = run("square", numbers(tmp_path, 40), tmp_path)
    group = sorted((tmp_path / "parts" / "x").glob("*.parquet"))
    last = group[-1].read_bytes()
    parts.merge(group)
    group[-1].write_bytes(last)
    parts.merge(group)
    assert len(rows_in(tmp_path)) == 40 and run("square", numbers(tmp_path, 40), tmp_path) == found


def test_what_no_longer_holds_is_made_again_and_the_newest_counts(tmp_path: Path) -> None:
    """Also where making it again fails for now, or has to be tried more than once."""
    pids = tmp_path / "pids"
    pids.mkdir()
    todo = [Job("k", "", {"n": 3, "how": "once", "pids": str(pids)})]
    (pids / "once").touch()
    (good,) = run("misbehave", todo, tmp_path)
    todo = [Job("k", "", {"n": 3, "how": "raise", "pids": str(pids)})]
    (failed,) = run("misbehave", todo, tmp_path, holds=lambda job, result: False)
    assert failed == {"error": "ValueError: two lines"}
    assert run("misbehave", todo, tmp_path) == [good]  # an error is for that run
    lost = iter([True] * 2)
    assert run("square", numbers(tmp_path, 1), tmp_path, holds=lambda job, result: not next(lost, False))
    assert ran(tmp_path) == [0] * 3
    with pytest.raises(OSError, match="1 results are not here or no longer hold after 3 tries; do all nodes share"):
        run("square", numbers(tmp_path, 1), tmp_path, holds=lambda job, result: False)


def test_files_of_any_name_and_parts_of_known_contents_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / os.fsdecode(b"caf\xe9-%d" % n) for n in range(30)]
    for file in files:
        file.write_text(file.name, errors="surrogateescape")
    todo = [Job("k", "", {"n": n, "log": str(tmp_path / "log")}, files=(file,)) for n, file in enumerate(files)]
    found, reads = run("square", todo, tmp_path / "out"), list[Path]()
    num_parts = len(list((tmp_path / "out" / "parts" / "x").glob("*.parquet")))
    for file in files:
        os.utime(file)

    def read_part(part: Path, columns: Any = None) -> Any:
        reads.extend([part] if columns == ["text"] else [])
        return original(part, columns)

    original = parts.read_part
    monkeypatch.setattr(parts, "read_part", read_part)
    assert run("square", todo, tmp_path / "out") == found and len(ran(tmp_path)) == len(files)
    assert len(reads) <= 4 * num_parts
