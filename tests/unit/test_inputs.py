"""What INPUT stands for, and the tables that tools leave."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest

from opensora_repro.data.inputs import Item, find_inputs
from opensora_repro.data.manifest import MANIFEST, REJECTS, reject, write_outcome
from opensora_repro.data.tables import with_types, write_rows
from opensora_repro.errors import DataError
from opensora_repro.files import one_line
from tests.frames import read_table

NAMES = ["-dash.mp4", "UPPER.MOV", "phone.3gp", "a 'b', \"c\"\nd.mp4", "sub/имя 视频.webm", "sub/x.mp4/inside.mkv"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos, other and hidden files, a folder named like a video, links that dangle or circle, the tool's output."""
    root = tmp_path / "in"
    for name in [*NAMES, "notes.txt", ".hidden.mp4", ".hidden/a.mp4", "out/clips/c.mp4"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (root / "sub" / "circle").symlink_to(root)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.mp4").touch()
    (root / "more").symlink_to(tmp_path / "elsewhere")
    return root


def names(given: Path | str, out: Path) -> list[str]:
    return [item.name for item in find_inputs(given, out=out).items]


def test_a_folder(folder: Path) -> None:
    inputs = find_inputs(folder, out=folder / "out")
    expected = sorted([*NAMES, "gone.mp4", "more/linked.mp4", "sub/x.mp4"])
    assert [item.name for item in inputs.items] == expected
    assert all(item.path == folder / item.name and not item.reason for item in inputs.items)
    assert inputs.others == 1
    assert names(folder, folder.parent) == sorted([*expected, "out/clips/c.mp4"])


def test_names_that_are_no_text(tmp_path: Path) -> None:
    try:
        open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "w").close()
    except OSError:
        pytest.skip("this file system takes text alone")
    (item,) = find_inputs(tmp_path, out=tmp_path / "out").items
    assert item.name == "caf\\xe9.mp4"
    assert "not valid UTF-8" in item.reason


def test_files_and_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / "out"
    assert [*find_inputs(folder / "notes.txt", out=out).items] == [Item(folder / "notes.txt", "notes.txt")]
    assert names(folder / "gone.mp4", out) == ["gone.mp4"]
    assert names(f"{folder}/*.mp4", out) == sorted(
        n for n in [*NAMES, "gone.mp4"] if n.endswith("mp4") and "/" not in n
    )
    assert names(f"{folder}/sub/*", out) == ["x.mp4", "имя 视频.webm"]
    assert names(f"{folder}/*/clips/**/c.mp4", folder.parent / "out") == ["out/clips/c.mp4"]
    with pytest.raises(DataError, match="no file matches"):
        find_inputs(f"{folder}/*/clips/**/c.mp4", out=out)
    monkeypatch.chdir(folder)
    assert names("-*", out) == ["-dash.mp4"]
    (folder / "[1].mp4").touch()
    assert names("[1].mp4", out) == ["[1].mp4"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": "sub/a, 'b'.mp4", "id": "1", "source": "whole.mp4", "start_frame": None, "score": 0.5},
        {"path": str(tmp_path / "else.mp4"), "id": "2", "source": "whole.mp4", "start_frame": 3, "score": 1.5},
        {"path": "x.mp4", "id": "3", "source": None, "start_frame": None, "score": None},
    ]
    table = tmp_path / f"list.{kind}"
    frame = pd.DataFrame(rows)
    frame.to_csv(table, index=False) if kind == "csv" else frame.to_parquet(table)
    items = find_inputs(table, out=tmp_path / "out").items
    assert [i.path for i in items] == [tmp_path / "sub/a, 'b'.mp4", tmp_path / "else.mp4", tmp_path / "x.mp4"]
    assert [i.name for i in items] == ["whole.mp4", str(tmp_path / "else.mp4"), "x.mp4"]
    assert [i.row["id"] for i in items if i.row] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing", "no such file or folder"),
        ("bare", "no video in this folder"),
        ("*.mp4", "no file matches this pattern"),
        ("names.csv", r"column path missing \(has id\)"),
        ("none.csv", "the table is empty"),
        ("blank.csv", "row 2: path is None, expected text"),
        ("bad.parquet", "cannot be read as parquet"),
        ("a\nb", r"a\\nb: no such file"),
        (".", "is INPUT itself"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare").mkdir()
    Path("names.csv").write_text("id\n1\n")
    Path("none.csv").write_text("path\n")
    Path("blank.csv").write_text("path,id\na.mp4,1\n,2\n")
    Path("bad.parquet").write_text("x")
    with pytest.raises(DataError, match=message) as caught:
        find_inputs(given, out=Path("." if given == "." else "out"))
    assert "\n" not in str(caught.value)


def test_tables_stream_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = [
        {"id": f"{i}", "path": "a\n.mp4", "caption": "", "num_frames": i, "fps": float("nan"), "height": 1, "width": 1,
         "score": i / 2, "note": None if i else "é", "sharp": i > 1, "beside": 1}
        for i in range(40_000)
    ]  # fmt: skip
    columns = with_types(({k: v for k, v in row.items() if k != "beside"} for row in rows), MANIFEST)
    assert columns == {**MANIFEST, "score": "double", "note": "string", "sharp": "bool"}
    write_outcome(tmp_path, iter(rows), [reject("i", "s\n", "probe", "why\nnot", start_frame=3, end_frame=5)], columns)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert before.keys() == {"manifest.parquet", "rejects.parquet"}
    frame = read_table(tmp_path / "manifest.parquet")
    assert frame["num_frames"].tolist() == list(range(40_000))
    assert frame["fps"].isna().all()
    (rejected,) = read_table(tmp_path / "rejects.parquet").to_dict("records")
    assert list(rejected) == list(REJECTS)
    assert (rejected["source"], rejected["reason"], rejected["end_frame"]) == ("s\n", "why\\nnot", 5)
    assert write_rows(tmp_path / "manifest.parquet", iter(rows), columns) == 40_000
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="x"):
        write_rows(tmp_path / "manifest.parquet", [{"num_frames": "x"}], columns)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_one_line() -> None:
    assert one_line("plain 'é' 视频") == "plain 'é' 视频"
    assert one_line("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\udcff"
