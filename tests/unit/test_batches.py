"""Items that go through a model in batches: each is known by its own key, and a bad one costs no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.batches import run_batches
from opensora_repro.data.jobs.course import Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner
from tests import job_works


def run(items: dict[str, dict[str, Any]], folder: Path, size: int) -> tuple[dict[str, Any], list[str]]:
    """Return the results and the batches that were worked on."""
    log = folder / "log"
    log.write_text("")
    options = {"log": str(log)}
    with Records(folder) as records:
        results = run_batches(
            job_works.squares, items.items(), Keeping(records, "x"), size=size, options=options,
            runner=Runner(workers=1), label="x",
        )  # fmt: skip
    return dict(zip(items, results, strict=True)), log.read_text().splitlines()


def test_a_batch_that_fails_is_tried_one_by_one(tmp_path: Path) -> None:
    items = {f"k{n}": {"path": str(n), "n": n} for n in range(7)}
    items["k4"]["spoilt"] = True
    results, batches = run(items, tmp_path, 3)
    assert batches == ["0 1 2", "3 4 5", "6", "3", "4", "5"]
    assert list(results) == list(items)
    assert results["k4"] == {"error": "ValueError: spoilt"}
    assert [results[f"k{n}"]["square"] for n in (0, 3, 5, 6)] == [0, 9, 25, 36]
    again, batches = run(items, tmp_path, 2)  # another size: the same records; what failed is tried again
    assert again == results and batches == ["4"]
    del items["k4"]["spoilt"]
    items = {"k9": {"path": "9", "n": 9}, **items}
    results, batches = run(items, tmp_path, 8)
    assert batches == ["9 4"] and results["k4"] == {"square": 16} and next(iter(results)) == "k9"
