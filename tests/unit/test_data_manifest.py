from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from opensora_repro.data import manifest, tables
from opensora_repro.errors import DataError
from tests.frames import read_manifest, write_manifest


def rows(**changes: Any) -> pd.DataFrame:
    columns: dict[str, Any] = {
        "id": ["a", "b", "c"],
        "path": ["clips/a.mp4", "clips/b, 'x'.mp4", "im/c.png"],
        "caption": ['a "red" circle, moving left', "NA", "ünï 视频"],
        "num_frames": [16, 20, 1],
        "fps": [24.0, 29.97, 0.0],
        "height": [64, 64, 64],
        "width": [64, 96, 64],
        "source": ["s.mp4", "s.mp4", None],
        "note": ["kept", "too", ""],
    }
    columns.update(changes)
    return pd.DataFrame({name: values for name, values in columns.items() if values is not None})


@pytest.mark.parametrize("name", ["m.parquet", "m.csv", "M.CSV"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    frame = rows(path=[str(tmp_path / "clips/a.mp4"), "clips/b, 'x'.mp4", str(tmp_path.parent / "c.png")])
    write_manifest(frame, tmp_path / "new" / name)
    back = read_manifest(tmp_path / "new" / name)
    for column in ("id", "caption", "num_frames", "fps", "height", "width"):
        assert back[column].tolist() == frame[column].tolist(), column
    assert back["path"].tolist() == [
        str(tmp_path / "clips/a.mp4"),
        str(tmp_path / "new/clips/b, 'x'.mp4"),
        str(tmp_path.parent / "c.png"),
    ]
    assert back["note"].tolist()[:2] == ["kept", "too"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_a_moved_tree_still_reads(tmp_path: Path) -> None:
    write_manifest(rows(path=[str(tmp_path / "one/clips/a.mp4")] * 3), tmp_path / "one" / "m.csv")
    (tmp_path / "one").rename(tmp_path / "two")
    assert read_manifest(tmp_path / "two" / "m.csv")["path"].tolist() == [str(tmp_path / "two/clips/a.mp4")] * 3


def test_numeric_looking_ids_stay_text(tmp_path: Path) -> None:
    write_manifest(rows(id=["007", "7", "1e3"]), tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv")["id"].tolist() == ["007", "7", "1e3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": None}, "column caption missing"),
        ({"num_frames": None, "fps": None}, "columns num_frames, fps missing"),
        (
            {"caption": ["x", float("nan"), "z"]},
            r"row 2 \(id 'b'\): caption is empty or NaN; data_tools.caption writes",
        ),
        ({"caption": ["x", "y", "  "]}, r"row 3 \(id 'c'\): caption is empty or NaN"),
        ({"caption": ["x", "nan", "z"]}, r"row 2 \(id 'b'\): caption is empty or NaN"),
        ({"id": ["a", "b", "a"]}, "id 'a' is used by rows 1, 3"),
        ({"id": ["a", None, "c"]}, "row 2: id is empty"),
        ({"path": ["x", "y", None]}, r"row 3 \(id 'c'\): path is empty"),
        ({"num_frames": [16, 0, 1]}, r"row 2 \(id 'b'\): num_frames is 0"),
        ({"num_frames": [16, 2.5, 1]}, r"row 2 \(id 'b'\): num_frames is 2.5"),
        ({"height": ["64", "tall", "64"]}, r"row 2 \(id 'b'\): height is 'tall'"),
        ({"fps": [24.0, 0.0, 0.0]}, r"row 2 \(id 'b'\): fps is 0.0"),
        ({"fps": [24.0, None, None]}, r"row 2 \(id 'b'\): fps is nan"),
    ],
)
@pytest.mark.parametrize("name", ["m.parquet", "m.csv"])
def test_mistakes_are_named_in_one_line(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    frame = rows(**changes)
    if name.endswith("parquet"):
        frame.to_parquet(tmp_path / name)
    else:
        frame.to_csv(tmp_path / name, index=False)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_ids_of_one_hash_are_compared_as_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the parts of a table, too; no two texts are known that really have the same hash."""
    monkeypatch.setattr(manifest, "hash", len, raising=False)
    monkeypatch.setattr(manifest, "BATCHES", 1)
    monkeypatch.setattr(tables, "BATCH_ROWS", 1)
    write_manifest(rows(), tmp_path / "m.parquet")
    assert read_manifest(tmp_path / "m.parquet")["id"].tolist() == ["a", "b", "c"]
    write_manifest(rows(id=["b", "a", "b"]), tmp_path / "m.parquet")
    with pytest.raises(DataError, match="id 'b' is used by rows 1, 3"):
        read_manifest(tmp_path / "m.parquet")


def test_lists_that_fit_in_no_one_chunk_stay_in_several() -> None:
    most = 2**31 - 2
    batch = pa.record_batch({"list": pa.ListArray.from_arrays(pa.array([0, most], pa.int32()), pa.nulls(most))})
    assert [part.num_rows for part in manifest._joined([batch, batch]).to_batches()] == [1, 1]
    assert manifest._joined([pa.record_batch({"n": [1]})] * 3)["n"].num_chunks == 1


def test_caption_of_another_type(tmp_path: Path) -> None:
    rows(caption=[1, 2, 3]).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="caption is 1, expected text"):
        read_manifest(tmp_path / "m.parquet")


def test_columns_of_bytes_are_text(tmp_path: Path) -> None:
    encoded = {name: [text.encode() for text in rows()[name]] for name in ("id", "path", "caption")}
    rows(**encoded).to_parquet(tmp_path / "m.parquet")
    back = read_manifest(tmp_path / "m.parquet")
    assert back["id"].tolist() == ["a", "b", "c"] and back["caption"].tolist() == rows()["caption"].tolist()
    assert back["path"][0] == str(tmp_path / "clips/a.mp4")
    rows(id=[b"a", b"\xff", b"c"]).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="column id holds bytes that are no UTF-8 text"):
        read_manifest(tmp_path / "m.parquet")


@pytest.mark.parametrize("name", ["caption", "score"])
def test_a_column_that_is_there_twice(tmp_path: Path, name: str) -> None:
    frame = rows(score=[1, 2, 3])
    table = pa.Table.from_pandas(frame).append_column(name, pa.array(["x", "y", "z"]))
    parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(DataError, match=rf"m\.parquet: column {name} is there twice"):
        read_manifest(tmp_path / "m.parquet")


def test_a_path_of_no_store_is_told_with_the_manifest(tmp_path: Path) -> None:
    rows(path=["file:///a.mp4"] * 3).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"m\.parquet: column path: file:/// is of no store that can be used"):
        read_manifest(tmp_path / "m.parquet")


def test_tools_may_read_rows_without_captions(tmp_path: Path) -> None:
    write_manifest(rows(caption=["x", "", None]), tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv", need_captions=False)["caption"].tolist() == ["x", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", None, "no such file"),
        ("m.csv", b"", "cannot be read as csv"),
        ("m.csv", b"id,path,caption,num_frames,fps,height,width\n", "empty"),
        ("m.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("m.csv", b"\xff\xfe\x00\x01binary\x00", "is UTF-16 text"),
        ("m.json", b"{}", "expected a .parquet or .csv file"),
        (
            "m.csv",
            b"id;path;caption\na;b;c\n",
            "fields are parted by semicolons, expected commas; save it as CSV UTF-8",
        ),
        ("m.csv", b"id\tpath\na\tb\n", "fields are parted by tabs, expected commas"),
        ("m.csv", rows().to_csv(index=False).encode("utf-16"), "is UTF-16 text; save it as CSV UTF-8"),
    ],
)
def test_files_that_are_no_manifest(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.csv").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_manifest(tmp_path / "m.csv")


def test_a_killed_writer_leaves_the_old_manifest(tmp_path: Path, repo_dir: Path) -> None:
    """Kill a process that rewrites the manifest for ever: the name always holds a whole file."""
    write_manifest(rows(), tmp_path / "m.csv")
    code = (
        "import sys, itertools, pandas as pd\n"
        "from tests.frames import read_manifest, write_manifest\n"
        "frame = read_manifest(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    many = pd.concat([frame.assign(id=frame.id + str(k)) for k in range(i % 300 + 1)])\n"
        "    write_manifest(many, sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.csv")]
    with subprocess.Popen(command, cwd=repo_dir, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(20):
            time.sleep(0.02)
            assert len(read_manifest(tmp_path / "m.csv")) % 3 == 0
        os.kill(writer.pid, signal.SIGKILL)
    assert len(read_manifest(tmp_path / "m.csv")) % 3 == 0
