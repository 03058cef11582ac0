"""Captions of files made elsewhere: every known format, joined by key or by span and never by order."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_repro.data.caption import join
from opensora_repro.data.caption.join import Spans, captions_of, match
from opensora_repro.data.caption.lists import Entry
from opensora_repro.errors import DataError


def clip(identity: str, path: str, source: str | None = None, span: tuple[float, float] | None = None) -> dict:
    row: dict[str, Any] = {"id": identity, "path": path, "num_frames": 40, "fps": 8.0, "height": 64, "width": 64}
    if source:
        row["source"] = source
    if span:
        start, end = span
        row |= {"start_time": start, "end_time": end, "start_frame": int(start * 8), "end_frame": int(end * 8)}
    return row


CLIPS = [
    clip("c0", "/d/clips/vidA-0.mp4", "in/vidA.mp4", (0.0, 4.0)),
    clip("c1", "/d/clips/vidA-1.mp4", "in/vidA.mp4", (4.0, 9.0)),
    clip("c2", "/d/whole/007.mp4", "whole/007.mp4"),
    clip("c3", "/d/whole/sceneX.mp4", "whole/sceneX.mp4"),
]


def texts(sidecar: Path, clips: list[dict] = CLIPS) -> list[str]:
    """Return captions, or reasons in brackets."""
    return [found.text or f"[{found.reason}]" for found in captions_of(sidecar, clips)]


def as_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def table(path: Path, rows: list[dict]) -> Path:
    frame = pd.DataFrame(rows)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


# ---- tables


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_webvid(tmp_path: Path, suffix: str) -> None:
    """Ids keep their zeros; a video's caption is that of its parts too."""
    rows = [{"videoid": v, "contentUrl": "https://x", "duration": "PT00H00M09S", "page_dir": "p", "name": n}
            for v, n in (("zz", "no"), ("007", "a spy"), ("7", "a number"), ("vidA", "a walk"))]  # fmt: skip
    missing = "[no caption for this source]"
    assert texts(table(tmp_path / f"w{suffix}", rows)) == ["a walk", "a walk", "a spy", missing]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_panda(tmp_path: Path, suffix: str) -> None:
    spans = [["0:00:04.020", "0:00:09.000"], ["0:00:00.000", "0:00:04.000"]]
    captions = ["the second's, with a comma", 'the first "quoted"']
    lists = (str(spans), str(captions)) if suffix == ".csv" else (spans, captions)
    rows = [{"videoID": "vidA", "url": "u", "timestamp": lists[0], "caption": lists[1], "matching_score": "[0.4]"},
            {"videoID": "other", "url": "u", "timestamp": "no list", "caption": "x", "matching_score": ""}]  # fmt: skip
    if suffix == ".parquet":
        rows[1] |= {"timestamp": [["0:0:0", "0:0:1"]], "caption": ["x"]}
    found = texts(table(tmp_path / f"p{suffix}", rows))
    assert found == [captions[1], captions[0], *["[no caption for this source]"] * 2]


@pytest.mark.parametrize(
    ("timestamp", "caption"),
    [
        ("[['0:00:00', '0:00:04']]", "__import__('os').mkdir('made')"),
        ("[['0:00:00', '0:00:04']]", "['one', 'two']"),
        ("[['0:00:04', '0:00:01']]", "['backwards']"),
        ("[['soon', 'late']]", "['x']"),
        ("[" * 100_000, "['x']"),
        ("[5]", "['x']"),
    ],
)
def test_panda_rows_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timestamp: str, caption: str) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"videoID": "vidA", "url": "u", "timestamp": timestamp, "caption": caption, "matching_score": "[1]"}]
    with pytest.raises(DataError, match="row 1: "):
        texts(table(tmp_path / "p.csv", rows))
    assert not (tmp_path / "made").exists()


def test_hd_vg(tmp_path: Path) -> None:
    """By the scene's name, or by frames within a clip that has its own span of the video."""
    clips = {
        "vidA.1.mp4": {"fps": 10.0, "span": ["00:00:00.000", "00:00:04.000"], "scene_split": [
            {"clip_id": "vidA-1-s0", "scene_cut": [-1, -1], "caption": "first"}]},
        "vidA.2.mp4": {"fps": 10.0, "span": ["00:00:03.000", "00:00:20.000"], "scene_split": [
            {"clip_id": "vidA-2-s0", "scene_cut": [10, 60], "caption": "second"},
            {"clip_id": "sceneX.mp4", "scene_cut": [60, 90], "caption": "named"}]},
    }  # fmt: skip
    path = as_json(tmp_path / "hdvg_0.json", {"vidA": {"url": "u", "clip": clips}, "b": {"url": "u", "clip": {}}})
    assert texts(path) == ["first", "second", "[no caption for this source]", "named"]
    as_json(path, {"vidA": {"clip": {"x.mp4": {"scene_split": [{"caption": "x"}]}}}})
    with pytest.raises(DataError, match=r"row 1 \(video vidA\): is not as HD-VG-130M's"):
        texts(path)


def test_json_lists(tmp_path: Path) -> None:
    rows = [{"id": "c1", "caption": "one"}, {"id": "c0", "text": "ignored", "caption": "zero"}]
    missing = ["[no caption for this id]"] * 2
    assert texts(as_json(tmp_path / "a.json", rows)) == ["zero", "one", *missing]
    assert texts(as_json(tmp_path / "b.json", {"c1": "one", "c0": "zero"})) == ["zero", "one", *missing]
    assert texts(as_json(tmp_path / "c.json", {"c1": {"text": "one"}, "c0": {"text": "zero"}})) == [
        "zero", "one", *missing
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text('{"clip_id": "007", "text": "seven"}\n\n{"clip_id": "vidA-1", "text": "one"}\n')
    assert texts(tmp_path / "d.jsonl") == [missing[0], "one", "seven", missing[0]]


def test_rows_below_a_key(tmp_path: Path) -> None:
    rows = [{"video": "vidA.mp4", "caption": "a walk"}, {"video": "007.mp4", "caption": "a spy"}]
    whole = ["a walk", "a walk", "a spy", "[no caption for this source]"]
    assert texts(as_json(tmp_path / "a.json", {"version": 2, "videos": [{"video": "vidA.mp4"}], "data": rows})) == whole
    prompts = [{"video": row["video"], "prompt": row["caption"]} for row in rows]
    assert texts(table(tmp_path / "metadata.csv", prompts)) == whole


def test_json_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    odd = "one\u2028two\u0085three\x0bfour\x1cfive"
    lines = [json.dumps({"id": "c0", "caption": odd}, ensure_ascii=False).replace("\\u000b", "\x0b"),
             json.dumps({"id": "c1", "caption": "second"})]  # fmt: skip
    (tmp_path / "l.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    assert "\x0b" in lines[0]
    assert texts(tmp_path / "l.jsonl")[:2] == ["one two three four five", "second"]
    (tmp_path / "l.jsonl").write_text(lines[1] + '\n{"id": "c0", \n')
    with pytest.raises(DataError, match=r"l\.jsonl: line 2: cannot be read as JSON"):
        texts(tmp_path / "l.jsonl")


def test_json_as_other_tools_write_it(tmp_path: Path) -> None:
    """Lines by the name of a list and the other way round; tables by columns, and by rows that are only counted."""
    rows = [{"source": "in/vidA.mp4", "caption": "a walk"}, {"source": "007.mp4", "caption": "a spy"}]
    expected = ["a walk", "a walk", "a spy", "[no caption for this source]"]
    frame = pd.DataFrame(rows)
    lines = "\n".join(map(json.dumps, rows))
    for name, content in (
        ("lines.json", lines),
        ("list.jsonl", json.dumps(rows)),
        ("columns.json", frame.to_json()),
        ("lists.json", json.dumps(frame.to_dict("list"))),
        ("index.json", frame.to_json(orient="index")),
        ("files.json", json.dumps([row | {"source": {"path": row["source"], "bytes": None}} for row in rows])),
    ):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == expected, name
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]))
    assert texts(tmp_path / "one.jsonl")[0] == "a walk"
    with pytest.raises(DataError, match=r"row 1: its key is \['x'\], expected text"):
        texts(as_json(tmp_path / "odd.json", [{"source": ["x"], "caption": "a"}]))


def test_maps_and_repeated_columns_of_parquet(tmp_path: Path) -> None:
    names = pa.array(["007.mp4"])
    texts_by_language = pa.array([[("en", "a spy"), ("de", "ein Spion")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"source": names, "caption": texts_by_language}), tmp_path / "map.parquet")
    assert texts(tmp_path / "map.parquet")[2] == "a spy"
    twice = pa.Table.from_arrays([names, names, names], names=["source", "caption", "caption"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="column caption is there twice"):
        texts(tmp_path / "twice.parquet")


def test_of_several_captions_the_first_that_is_not_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "c0", "caption": ["", " ", "zero", "nil"]}, {"id": "c1", "caption": ["one"]},
            {"id": "c2", "caption": []}, {"id": "c3", "caption": None}]  # fmt: skip
    expected = ["zero", "one", *(f"[its caption (row {n} of the list) is empty]" for n in (3, 4))]
    for suffix in (".parquet", ".csv"):
        assert texts(table(tmp_path / f"l{suffix}", rows)) == expected
    as_json(tmp_path / "l.json", [*rows[:3], {"id": "c3", "caption": {"text": "object"}}])
    assert texts(tmp_path / "l.json") == [*expected[:3], "object"]
    assert capsys.readouterr().err.count("1 rows have several captions; the first of each is taken") == 3
    rows[0]["caption"] = {"title": "x"}
    with pytest.raises(DataError, match="row 1: its caption is an object without caption, "):
        texts(as_json(tmp_path / "l.json", rows))


def test_binary_columns_are_text(tmp_path: Path) -> None:
    rows = [{"clip_id": b"c0", "caption": "ein Süßer".encode()}, {"clip_id": b"vidA-1.mp4", "caption": b"one"}]
    assert texts(table(tmp_path / "l.parquet", rows))[:2] == ["ein Süßer", "one"]
    rows[0]["caption"] = b"S\xfc\xdfer"
    with pytest.raises(DataError, match=r"row 1: its caption is no UTF-8 text"):
        texts(table(tmp_path / "l.parquet", rows))


def test_open_sora_plan(tmp_path: Path) -> None:
    rows = [{"path": "part_0/vidA-1.mp4", "cap": ["one"], "fps": 25.0}, {"path": "/x/007.mp4", "cap": "seven"}]
    missing = "[no caption for this file]"
    assert texts(as_json(tmp_path / "osp.json", rows)) == [missing, "one", "seven", missing]


def test_the_lists_of_the_cases(cases_dir: Path) -> None:
    folder = cases_dir / "captions"
    clips = pd.read_parquet(folder / "m" / "manifest.parquet").to_dict("records")
    assert texts(folder / "list_caps.parquet", clips) == [f"first of {n}" for n in "abcd"]
    assert texts(folder / "ext_ids.csv", clips) == [f"caption of {n}" for n in "abcd"]
    assert texts(folder / "osp.json", clips)[:2] == ["A man stands in a library.", "A woman walks a dog."]
    with pytest.raises(DataError, match=r"row 1 \(line 2\): 3 fields, the header has 2: put a caption with commas"):
        texts(folder / "unquoted_comma.csv", clips)


# ---- names


@pytest.mark.parametrize("column", ["source", "filename", "video", "File Name", "path", "video_id"])
@pytest.mark.parametrize("name", ["vidA.mp4", "vidA", "in/vidA.MP4", "/disk/in/vidA.mp4", "C:\\in\\vidA.mp4"])
def test_a_sources_caption_goes_to_all_its_clips(tmp_path: Path, column: str, name: str) -> None:
    listed = table(tmp_path / "l.csv", [{column: name, "Caption": "a walk"}, {column: "zz.mp4", "Caption": "no"}])
    assert texts(listed)[:2] == ["a walk", "a walk"]
    listed = table(
        tmp_path / "l.csv", [{column: "vidA-1.mp4", "caption": "a run"}, {column: name, "caption": "a walk"}]
    )
    assert texts(listed)[:2] == ["a walk", "a run"]


def test_capitals_count_only_between_names_that_differ_by_them(tmp_path: Path) -> None:
    clips = [clip("a", "/d/IMG_1.MP4"), clip("b", "/d/img_2.mp4"), clip("c", "/d/Img_2.mp4"), clip("d", "/D/x.mp4")]
    names = ["img_1.mp4", "img_2.mp4", "IMG_3.mp4", "d/X"]
    rows = [{"filename": name, "caption": f"of {name}"} for name in names]
    found = texts(table(tmp_path / "a.csv", rows), clips)
    assert found[:2] == ["of img_1.mp4", "of img_2.mp4"] and found[3] == "of d/X"
    assert found[2] == "[no caption for this file]"  # img_2.mp4 is the other one's own name


def test_spans_and_whole_sources_in_one_list(tmp_path: Path) -> None:
    rows = [{"source": "vidA.mp4", "start_time": 0, "end_time": 4, "caption": "a part"},
            {"source": "007.mp4", "start_time": None, "end_time": None, "caption": "all of it"}]  # fmt: skip
    assert texts(table(tmp_path / "l.csv", rows))[:3] == ["a part", "[no caption's span holds its middle]", "all of it"]


def test_folders_tell_names_apart_or_the_doubt_is_told(tmp_path: Path) -> None:
    sources = ["x/a.mp4", "y/a.mp4", "e\u0301.mp4", "take.2.mp4", "b.mov"]
    clips = [clip(name, f"/d/c/{name}.mp4", source) for name, source in zip("pqrst", sources, strict=True)]
    names = ["/disk/x/a.mp4", "q", "\u00e9.mp4", "take.2", "z/b.mov", "take", "b.webm"]
    found = texts(table(tmp_path / "l.csv", [{"video": name, "caption": name} for name in names]), clips)
    assert found == names[:5]
    found = texts(table(tmp_path / "l.csv", [{"video": "a.mp4", "caption": "whose?"}]), clips)
    assert found[:3] == ["[a.mp4 could be any of 2 videos (x/a.mp4, y/a.mp4); name it with its folder]"] * 2 + [
        "[no caption for this source]"
    ]
    rows = [{"video": f"{folder}/b.mov", "caption": folder} for folder in ("one", "two")]
    assert texts(table(tmp_path / "l.csv", rows), clips)[4] == (
        "[the list has several that could be it: one/b.mov, two/b.mov]"
    )


def test_the_first_key_that_is_there_counts(tmp_path: Path) -> None:
    rows = [{"video": "in/vidA.mp4", "caption": "a walk"}, {"image": "007.mp4", "caption": "seven"}]
    assert texts(as_json(tmp_path / "l.json", rows))[:3] == ["a walk", "a walk", "seven"]
    (tmp_path / "l.csv").write_text("\n \nid,source,caption\n,vidA.mp4,a walk\nother-clip,vidA.mp4,of another clip\n")
    assert texts(tmp_path / "l.csv") == ["a walk", "a walk", *["[no caption for this id]"] * 2]


def test_joining_takes_time_in_proportion(tmp_path: Path) -> None:
    """Counted, not timed: names that all share their last component are not compared with each other."""
    import sys

    def steps(count: int) -> int:
        clips = [clip(f"c{n}", f"/d/c{n}.mp4", f"{n:05d}/video.mp4", (0.0, 4.0)) for n in range(count)]
        rows = [{"source": f"{n:05d}/video.mp4", "caption": str(n)} for n in range(count)]
        listed, calls = table(tmp_path / "l.csv", rows), 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal calls
            calls += "opensora_repro" in frame.f_code.co_filename
            return trace if "opensora_repro" in frame.f_code.co_filename else None

        sys.settrace(trace)
        found = captions_of(listed, clips)
        sys.settrace(None)
        assert [caption.text for caption in found] == [str(n) for n in range(count)]
        return calls

    assert steps(400) < 4.4 * steps(100)


def test_large_lists_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora_repro.data import tables

    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    rows = [{"id": f"x{i}", "caption": "other"} for i in range(10)] + [{"id": "c2", "caption": None}]
    for suffix in ("csv", "parquet"):
        found = texts(table(tmp_path / f"l.{suffix}", rows))
        assert found[2] == "[its caption (row 11 of the list) is empty]"


def test_clips_of_a_whole_file_and_of_an_unknown_part(tmp_path: Path) -> None:
    rows = [{"source": "007.mp4", "start_frame": 0, "end_frame": 40, "caption": "all of it"},
            {"source": "vidA.mp4", "start_frame": 0, "end_frame": 40, "caption": "a part"}]  # fmt: skip
    clips = [CLIPS[2], clip("c9", "/d/clips/vidA-9.mp4", "vidA.mp4")]
    found = texts(table(tmp_path / "l.csv", rows), clips)
    assert found == ["all of it", "[the manifest has no start_frame and end_frame of it]"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.json", "[1, 2]", "expected a list of objects"),
        ("a.json", "[]", "expected a list of objects"),
        ("a.json", "[" * 200_000, "cannot be read as JSON"),
        ("a.jsonl", '{"id": 1}\n', "column caption missing"),
        ("a.csv", "caption,other\nx,y\n", "expected the columns id, or source"),
        ("a.csv", "id,caption\n,x\n", "row 1: id is empty"),
        ("a.csv", "", "cannot be read as csv"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
        ("a.xlsx", "", "expected a folder, or a list"),
        ("missing.csv", None, "no such file or folder"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        texts(tmp_path / name)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


# ---- a file a clip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "side"
    (folder / "sub").mkdir(parents=True)
    return folder


def test_files_by_id_and_by_name(files: Path) -> None:
    (files / "sub" / "c0.txt").write_text("by id\n")
    as_json(files / "vidA-1.json", {"url": "x", "caption": "by name"})
    as_json(files / "sub" / "007.json", ["", {"text": "of a list"}])
    (files / "c3.txt").write_bytes(b"\xef\xbb\xbftext before json")
    as_json(files / "c3.json", {"caption": "json"})
    assert texts(files) == ["by id", "by name", "of a list", "text before json"]


def test_files_with_the_videos_ending_and_of_sources(files: Path) -> None:
    (files / "vidA.mp4.txt").write_text("of the source")
    (files / "c1.mp4.txt").write_text("by id")
    (files / "007.mp4.json").write_text('{"text": "seven"}')
    (files / "sceneX.mp4.txt").write_text("X")
    assert texts(files) == ["of the source", "by id", "seven", "X"]
    (files / "vidA-0.txt").write_text("its own")
    assert texts(files)[:2] == ["its own", "by id"]


def test_files_beside_the_clip_and_at_the_sources_place(tmp_path: Path, files: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.txt").write_text("beside")
    (files / "sub" / "b.txt").write_text("the sub one")
    (files / "b.txt").write_text("the upper one")
    clips = [clip("x", f"{tmp_path}/clips/a.mp4"), clip("y", "/in/sub/b.mp4", "sub/b.mp4"),
             clip("z", "/in/b.mp4", "b.mp4")]  # fmt: skip
    join._names_in.cache_clear()
    assert texts(files, clips) == ["beside", "the sub one", "the upper one"]


def test_a_name_that_is_not_one_clips_own_is_no_key(files: Path) -> None:
    (files / "b.txt").write_text("whose?")
    clips = [clip("y", "/one/b.mp4", "/one/b.mp4"), clip("z", "/two/b.mp4", "/two/b.mp4")]
    assert texts(files, clips) == ["[2 clips are called b; name its sidecar file by its id]"] * 2
    (files / "sub" / "b.txt").write_text("which?")
    assert texts(files, clips[:1]) == ["[several sidecar files for it: b, sub/b]"]


def test_files_that_are_no_captions(files: Path) -> None:
    (files / "c0.txt").write_bytes(b"\xff\xfe\x00")
    (files / "c1.json").write_text('{"title": "x"}')
    (files / "c2.txt").write_text(" \n\u200b")
    os.mkfifo(files / "c3.txt")
    clips = [*CLIPS, clip("../../secret", "/d/e.mp4"), clip("c5", "/d/f.mp4"), clip("c6", "/d/g.mp4")]
    (files.parent / "secret.txt").write_text("from outside")
    (files / "c5.json").write_text("[" * 300_000)
    (files / "c6.txt").write_bytes(b"x" * (1 << 21))
    assert texts(files, clips) == [
        "[c0.txt: no UTF-8 text]",
        "[c1.json: no JSON, or none of the keys caption, text, description, captions, texts, prompt in it]",
        "[its caption (c2.txt) is empty]",
        "[c3.txt: no regular file]",
        "[no file e.txt or e.json for it]",
        "[c5.json: no JSON, or none of the keys caption, text, description, captions, texts, prompt in it]",
        "[c6.txt: larger than a caption (2097152 bytes)]",
    ]


def test_a_clip_of_a_source_of_hours_is_looked_for_among_few_spans() -> None:
    draw = random.Random(0)
    spans = [Entry(row, f"a dog {row}", start := draw.randint(0, 200) / 2, start + draw.choice((0, 0.5, 1, 3, 30)))
             for row in range(1, 200)]  # fmt: skip
    found = Spans(spans)
    for _ in range(300):
        start = draw.randint(0, 200) / 2
        end = start + draw.choice((0, 0.5, 1, 4))
        assert match(found.around(start, end), start, end) == match(spans, start, end)
    day = Spans([Entry(row, "a dog", 2.0 * row, 2.0 * row + 2) for row in range(43_200)])
    assert [entry.row for entry in day.around(500.0, 503.0)] == [250, 251]
