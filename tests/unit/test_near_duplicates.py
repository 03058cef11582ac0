"""Near-duplicates by embeddings: clusters against every pair, and the table that embeddings lie in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import deduplicate
from opensora_repro.data import near_duplicates
from opensora_repro.data.embeddings import gather_embeddings, write_embeddings
from opensora_repro.data.near_duplicates import cells_note, find_near_duplicates, num_cells
from opensora_repro.errors import DataError

SIZE = 64
RANDOM = np.random.default_rng(0)


def crowd() -> np.ndarray:
    """4,850 vectors in a narrow cone: 800 are near to others, at various distances, and 50 are one more."""
    alone = RANDOM.normal(size=(4000, SIZE)) + 1
    pairs = alone[:800] + RANDOM.uniform(0.1, 0.4, (800, 1)) * RANDOM.normal(size=(800, SIZE))
    return np.concatenate([alone, pairs, np.repeat(alone[:1], 50, axis=0)])


def by_every_pair(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Each row's first near one among those before it, -1 where there is none."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = np.tril(unit @ unit.T >= cosine, -1)
    return np.where(pairs.any(axis=1), pairs.argmax(axis=1), -1)


@pytest.mark.parametrize("cells", [1, 60])
def test_clusters_find_what_every_pair_finds(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "BLOCK", 1 << 11)  # several blocks and chunks a cell
    monkeypatch.setattr(near_duplicates, "CHUNK", 1 << 5)
    vectors = crowd()
    order = RANDOM.permutation(len(vectors))
    expected = by_every_pair(vectors[order], 0.95)
    steps: list[int] = []
    found = find_near_duplicates(vectors, order, cosine=0.95, cells=cells, advance=steps.append)
    assert sum(steps) == len(vectors) and (expected >= 0).sum() > 500
    if cells == 1:
        assert np.array_equal(found.better, expected)
    else:
        right = found.better == expected
        assert right[expected < 0].all() and right.mean() > 0.998
    worse = np.flatnonzero(found.better >= 0)
    assert (found.cosine[worse] >= 0.95).all() and (found.better[worse] < worse).all()
    kept = found.kept()
    assert (found.better[kept] < 0).all() and np.array_equal(kept[worse], kept[found.better[worse]])


def test_what_is_all_alike_is_compared_with_its_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    cosines = near_duplicates._Found._cosines
    monkeypatch.setattr(
        near_duplicates._Found, "_cosines",
        lambda self, rows, others: (compared.append(len(rows) * len(others)), cosines(self, rows, others))[1],
    )  # fmt: skip
    black = RANDOM.normal(size=SIZE) + 0.02 * RANDOM.normal(size=(10_000, SIZE))  # a logo, encoded 10,000 times
    vectors = np.concatenate([black, RANDOM.normal(size=(500, SIZE))]).astype(np.float16)
    found = find_near_duplicates(vectors, np.arange(len(vectors)), cells=1)
    assert (found.better[1:10_000] == 0).all() and (found.better[[0, *range(10_000, 10_500)]] < 0).all()
    assert sum(compared) < 2e7  # of a hundred million


def test_how_many_are_compared_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cells(20_000) == 1 and num_cells(1_000_000) == 1000
    assert cells_note(1_000_000).startswith("1,000,000 embeddings are compared within 1,000 clusters")
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None)
    assert num_cells(1_000_000) == 1 and "pip install faiss-cpu" in cells_note(1_000_000)


def test_embeddings_come_back_by_id(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    vectors = RANDOM.normal(size=(5, 3)).astype(np.float32)
    vectors[3] = 0
    write_embeddings(path, zip("abcde", vectors, strict=True), 3)
    assert pq.read_schema(path).field("embedding").type == pa.list_(pa.float16(), 3)
    with tempfile.TemporaryFile() as file:
        found, whose = gather_embeddings(path, pa.array(["z", "e", "d", "b"]), file, lambda rows: None)
        assert whose.tolist() == [3, 1]  # "d" has no direction, "z" no embedding
        unit = vectors[[1, 4]] / np.linalg.norm(vectors[[1, 4]], axis=1, keepdims=True)
        assert np.abs(found - unit).max() < 1e-3


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"height": ["240", "x"]}, "m.parquet: column height holds string, expected numbers"),
        ({"id": ["a", "a"]}, "m.parquet: id 'a' is used by rows 1, 2; ids must be unique"),
        ({"width": [None, 320]}, ""),
    ],
)
def test_manifests_that_cannot_be_compared(
    changed: dict[str, list[object]], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = {"id": ["a", "b"], "path": ["a", "b"], "caption": ["", ""]}
    columns = {**texts, "height": [240, 240], "width": [320, 320], "num_frames": [9, 9], "fps": [24.0, 24.0]}
    pq.write_table(pa.table({**columns, **changed}), tmp_path / "m.parquet")
    vectors = [[1e30, 2e30], [1e-30, 2e-30]]  # one direction, whatever their lengths
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": vectors}), tmp_path / "e.parquet")
    command = [str(tmp_path / "m.parquet"), "--embeddings", str(tmp_path / "e.parquet"), "--out", str(tmp_path / "out")]
    assert deduplicate.main(command) == (2 if told else 0)
    seen = capfd.readouterr()
    assert told in seen.err and "Warning" not in seen.err and ("1 clips drop for 1 that stay" in seen.out) == (not told)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"id": ["a"], "vector": [[1.0]]}, "column embedding missing"),
        ({"id": ["a"], "embedding": ["text"]}, "expected lists of float16"),
        ({"id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}, "embeddings of 1, 2 numbers"),
        ({"id": ["a", "b", "a"], "embedding": [[1.0]] * 3}, "id a has 2 rows"),
    ],
)
def test_tables_that_hold_no_embeddings(columns: dict[str, list[object]], told: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with tempfile.TemporaryFile() as file, pytest.raises(DataError, match=told):
        gather_embeddings(tmp_path / "x.parquet", pa.array(["a", "b"]), file, lambda rows: None)
