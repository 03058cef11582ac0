"""What the process that runs a tool holds of its rows: neither jobs nor results, however many there are."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from opensora_repro.data.caption.chat import Endpoint
from opensora_repro.data.caption.completions import Prices, Prompt, complete_all
from opensora_repro.data.caption.join import captions_of
from opensora_repro.data.caption.lists import Entry
from opensora_repro.data.caption.text import Caption
from opensora_repro.data.inputs import Item, Items, find_inputs
from opensora_repro.data.jobs.batches import run_batches
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.probe.rows import Probed
from opensora_repro.data.tables import Again
from tests.job_works import square, squares

ONE = Runner(workers=1)
FEW, MANY = 600, 3000  # rows, more than are looked at together
TEXT = "x" * 1000


def held_a_row(use: Callable[[int], None]) -> float:
    """Return how many bytes more `use` holds at its peak for each row more."""
    peaks = []
    for count in (FEW, FEW, MANY):  # the first loads what is needed
        tracemalloc.start()
        use(count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return (peaks[2] - peaks[1]) / (MANY - FEW)


def recorded(folder: Path, count: int, record: dict[str, Any]) -> Records:
    records = Records(folder)
    records.put("x", {f"k{n}": json.dumps(record) for n in range(count)})
    return records


def test_jobs_and_their_results(tmp_path: Path) -> None:
    def use(count: int) -> None:
        jobs = Again(lambda: (Job(f"k{n}", f"file {n}", {"n": n, "text": f"{n}{TEXT}"}) for n in range(count)))
        with Records(tmp_path / str(count)) as records:
            results = run_jobs(square, jobs, Keeping(records, "x"), runner=ONE, label="x")
        assert all(result["n"] == n for result, n in zip(results, range(count), strict=True))

    assert held_a_row(use) < 300


def test_batches_and_answers(tmp_path: Path) -> None:
    answer = {"text": TEXT, "cut": False, "tokens_in": 1, "tokens_out": 1}
    items = {count: Again(lambda n=count: ((f"k{i}", {"text": TEXT}) for i in range(n))) for count in (FEW, MANY)}
    for count in (FEW, MANY):
        recorded(tmp_path / str(count), count, answer).__exit__()

    def batches(count: int) -> None:
        with Records(tmp_path / str(count)) as records:
            results = run_batches(
                squares, items[count], Keeping(records, "x"), size=8, options={}, runner=ONE, label="x"
            )
        assert sum(result == answer for result in results) == count

    def answers(count: int) -> None:
        prompts = Again(lambda: (Prompt(key, list) for key, _ in items[count]))
        endpoint = Endpoint(
            "http://localhost:9/v1", "m", key_env="", max_tokens=1, timeout=1.0, retries=0
        )  # nobody is asked: all is answered
        with Records(tmp_path / str(count)) as records:
            found = complete_all(prompts, Keeping(records, "x"), endpoint, concurrency=1, label="x", prices=Prices())
        assert sum(result == answer for result in found) == count

    assert held_a_row(batches) < 100
    assert held_a_row(answers) < 100


def test_inputs_and_their_rows(tmp_path: Path) -> None:
    """Of a folder names are held, as a column; of files with one content the first one's name."""

    def use(count: int) -> None:
        names = (f"{n:05d}.mp4" for n in reversed(range(count)))
        items = Items(
            (Item(tmp_path / name, name, None, "odd" * (name == "00003.mp4")) for name in names), tmp_path, ordered=True
        )
        results = Again(lambda: ({"id": f"{n // 2:016x}", "codec": TEXT} for n in range(count - 1)))
        probed = Probed(items, results, tmp_path)
        rows, rejects, number = list[Any](), list[Any](), 0
        for number, row in enumerate(probed.rows(rejects.append), start=1):
            rows += [row] if number in (1, 2, 4) else []
        assert number == count - 1 and [row["reason"] for row in rejects] == ["odd"]
        assert [row["path"] for row in rows] == ["00000.mp4", "00001.mp4", "00004.mp4"]
        assert [row.get("same_as") for row in rows] == [None, "00000.mp4", "00002.mp4"]

    assert held_a_row(use) < 400  # before, a row took some thousand


def live(kind: type) -> int:
    return sum(type(one) is kind for one in gc.get_objects())


def test_a_table_and_a_list_of_captions(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [f"i{n}" for n in range(MANY)], "path": [f"{n}.mp4" for n in range(MANY)]})
    frame.to_parquet(tmp_path / "clips.parquet")
    frame[::-1].assign(caption=frame["path"] + " é").to_csv(tmp_path / "list.csv", index=False)
    items = find_inputs(tmp_path / "clips.parquet", out=tmp_path / "out").items

    def clips() -> Iterator[dict[str, Any]]:
        return ({"id": item.row["id"], "path": item.name} for item in items if item.row)

    found, most = captions_of(tmp_path / "list.csv", Again(clips)), 0
    for number, (caption, item) in enumerate(zip(found, items, strict=True)):
        assert caption.text == f"{number}.mp4 é" and item.name == f"{number}.mp4"
        most = max(most, live(Item) + live(Entry)) if number % 500 == 0 else most
    assert most < 10


class Row(dict[str, Any]):
    """A clip's."""


@pytest.mark.parametrize("listed", ["sources.csv", "texts"])
def test_clips_that_are_named_by_their_sources_pass_through(listed: str, tmp_path: Path) -> None:
    names = [f"{n}.mp4" for n in range(MANY // 100)]
    (tmp_path / "texts").mkdir()
    for name in names:
        (tmp_path / "texts" / f"{name}.txt").write_text(f"of {name}")
    pd.DataFrame({"source": names, "caption": [f"of {name}" for name in names]}).to_csv(
        tmp_path / "sources.csv", index=False
    )

    def clips() -> Iterator[Row]:
        return (Row(id=f"i{n}", path=f"clips/{n}.mp4", source=names[n // 100]) for n in range(100, MANY))

    most = 0
    for number, caption in enumerate(captions_of(tmp_path / listed, Again(clips)), start=100):
        assert caption.text == f"of {names[number // 100]}"
        most = max(most, live(Row) + live(Caption)) if number % 500 == 0 else most
    assert number == MANY - 1 and 0 < most < 10
