"""CSV tables that are passed over in batches: what their columns are, and that nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_repro.data import csv_tables, tables
from opensora_repro.data.ids import Seen
from opensora_repro.data.manifest import Absolute, Rebase
from opensora_repro.data.tables import open_table, table_writer
from opensora_repro.errors import DataError


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK", 1 << 10)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_the_last_row_may_change_a_columns_type(tmp_path: Path) -> None:
    rows = [f"{n:03d},{n},{n},{n},,{'True' if n % 2 else ''},{n}" for n in range(500)]
    rows.append('"7, ""x""\ny",1,2.5,z,,False,')
    table = open_table(write(tmp_path / "t.csv", "\ufeffid,whole,part,mixed,none,truth,label\n" + "\n".join(rows)))
    assert table.num_rows == 501
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {"id": "string", "whole": "int64", "part": "double", "mixed": "string", "none": "double",
                     "truth": "bool", "label": "int64"}  # fmt: skip
    batches = list(table.batches())
    assert len(batches) > 3
    whole = pa.Table.from_batches(batches)
    assert whole.column("id").to_pylist()[7] == "007"
    assert whole.to_pylist()[-1] == {"id": '7, "x"\ny', "whole": 1, "part": 2.5, "mixed": "z", "none": None,
                                     "truth": False, "label": None}  # fmt: skip
    assert next(b.schema.names for b in table.batches(["part"])) == ["part"]


def test_it_reads_what_pandas_does(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"id": ["NA", "a,b", "nan"], "path": ["x", None, 'q"'], "fps": [29.97, None, 1e-3], "n": [1, 2, 3]}
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    ours = pa.Table.from_batches(list(open_table(tmp_path / "t.csv").batches())).to_pandas()
    expected = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values=[""])
    assert ours.astype(object).where(ours.notna(), None).to_numpy().tolist() == (
        expected.astype(object).where(expected.notna(), None).to_numpy().tolist()
    )


def test_row_groups_are_of_one_size_whatever_the_chunks_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 2)
    monkeypatch.setattr(tables, "GROUP_ROWS", 4)
    table = pa.concat_tables([pa.table({"n": list(range(9))}), pa.table({"n": [9]})])
    tables.write_table(table, tmp_path / "t.parquet")
    written = pq.ParquetFile(tmp_path / "t.parquet")
    assert [written.metadata.row_group(at).num_rows for at in range(written.num_row_groups)] == [4, 4, 2]
    assert written.read() == table


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"a,b\n", "is empty"),
        (b"a,b\n1\n", "Expected 2 columns"),
        (b"a,a\n1,2\n", "column a is there twice"),
        (b"id,b\n\xff\xfe,2\n", "line 2 is no UTF-8 text"),
        (b'id,b\n1,2\n3,"a \\"red\\" car"\n', r"row 2 \(line 3\): quotes are escaped by backslashes"),
        (b"id,b\n" + b"x" * 5000 + b",2\n", "cannot be read as csv"),
    ],
)
def test_what_is_no_table_is_told(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        list(open_table(tmp_path / "t.csv").batches())


def test_a_csv_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("n", pa.int64()), ("kind", pa.dictionary(pa.int32(), pa.string()))])
    batch = pa.RecordBatch.from_pylist(
        [{"id": 'a"\n,', "n": None, "kind": "k"}, {"id": "b", "n": 2, "kind": None}], schema
    )
    with pytest.raises(KeyError), table_writer(tmp_path / "t.csv", schema) as add:
        add(batch)
        raise KeyError
    assert not list(tmp_path.iterdir())
    with table_writer(tmp_path / "t.csv", schema) as add:
        add(batch)
    (back,) = open_table(tmp_path / "t.csv").batches()
    assert back.to_pylist() == batch.to_pylist()
    nested = pa.schema([("tags", pa.list_(pa.string()))])
    with pytest.raises(DataError, match="column tags holds list"), table_writer(tmp_path / "u.csv", nested):
        pass


def test_paths_become_absolute_or_relative_to_another_folder(tmp_path: Path) -> None:
    paths = ["a.mp4", "../b/c.mp4", "/x/d.mp4", "deep/er/e.mp4"]
    batch = pa.RecordBatch.from_pydict({"path": paths})
    old, new = tmp_path / "one", tmp_path / "two"
    absolute = [str(tmp_path / "one/a.mp4"), str(tmp_path / "b/c.mp4"), "/x/d.mp4", str(tmp_path / "one/deep/er/e.mp4")]
    assert Absolute(old)(batch).column("path").to_pylist() == absolute
    moved = Rebase(old, new)(batch).column("path").to_pylist()
    assert moved[:2] == ["../one/a.mp4", "../b/c.mp4"]


def test_seen_finds_every_repetition(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    seen, known = Seen(), set[str]()
    for size in (1, 1000, 3, 500, 2000, 0, 70):
        names = [str(n) for n in random.integers(0, 3000, size)]
        new = []
        for name in names:
            new.append(name not in known)
            known.add(name)
        assert seen.add(names).tolist() == new
    assert sum(map(len, seen.runs)) == len(known)
    assert len(seen.runs) <= 4
