"""`convert` between its formats, and what it does with rows that cannot be taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools import convert
from opensora_repro.data.convert import tables
from opensora_repro.data.write import write_video
from tests.frames import read_manifest, read_table, write_table


def run(given: Path | str, out: Path, *options: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the result's rows and the rejects."""
    code = convert.main([str(given), "--out", str(out), "--workers", "1", *options])
    results = [p for p in (out / "manifest.parquet", out / "manifest.csv", out / "urls.parquet") if p.exists()]
    rows = read_table(results[0]).to_dict("records") if results else []
    rejects = read_table(out / "rejects.parquet").to_dict("records")
    assert code == (0 if rows or not results else 2)
    assert {row["stage"] for row in rejects} <= {"convert"}
    assert not list(out.rglob(".*.tmp"))
    return rows, rejects


def reasons(rejects: list[dict[str, Any]]) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in rejects}


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(path)
    return path


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    root = tmp_path / "UCF"
    for label, name in enumerate(("ApplyEyeMakeup", "YoYo")):
        for group in (1, 2):
            frames = np.full((3 + group, 16, 32, 3), 40 * label + 10 * group, np.uint8)
            path = root / name / f"v_{name}_g0{group}_c01.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, frames, fps=8)
            path.rename(path.with_suffix(".avi"))
    (root / "YoYo" / "v_YoYo_g03_c01.avi").touch()
    return root


def test_ucf101_gives_captions_labels_and_lengths(ucf: Path, tmp_path: Path) -> None:
    rows, rejects = run(ucf, tmp_path / "out")
    assert [(row["caption"], row["label"], row["num_frames"]) for row in rows] == [
        ("apply eye makeup", 0, 4), ("apply eye makeup", 0, 5), ("yo yo", 1, 4), ("yo yo", 1, 5)
    ]  # fmt: skip
    assert [(row["height"], row["width"], row["fps"]) for row in rows] == [(16, 32, 8.0)] * 4
    assert rows[0]["path"] == "../UCF/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi"
    assert reasons(rejects) == {"YoYo/v_YoYo_g03_c01.avi": "the file is empty"}
    assert len(read_manifest(tmp_path / "out" / "manifest.parquet")) == 4
    ucf.rename(tmp_path / "elsewhere")
    again, _ = run(tmp_path / "elsewhere", tmp_path / "out2")
    assert [row["id"] for row in again] == [row["id"] for row in rows]


def test_ucf101s_own_lists_choose_files_and_number_classes(ucf: Path, tmp_path: Path) -> None:
    (tmp_path / "classInd.txt").write_text("1 Archery\n2 YoYo\n")
    lines = ["YoYo/v_YoYo_g01_c01.avi 2", "ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.avi 1", "YoYo/v_YoYo_g09_c01.avi 2"]
    (tmp_path / "train.txt").write_text("\r\n".join(lines))
    options = ["--classes", str(tmp_path / "classInd.txt"), "--list", str(tmp_path / "train.txt")]
    rows, rejects = run(ucf, tmp_path / "out", *options)
    assert [(row["class"], row["label"], row["caption"]) for row in rows] == [("YoYo", 1, "yo yo")]
    told = reasons(rejects)
    assert told["ApplyEyeMakeup/v_ApplyEyeMakeup_g02_c01.avi"].startswith("unknown class ApplyEyeMakeup: not in")
    assert told["YoYo/v_YoYo_g09_c01.avi"].endswith("there is no such file")
    assert len(told) == 2


def test_imagenet_takes_its_captions_from_the_synset_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "ILSVRC"
    for at, name in enumerate(("train/n01440764/n01440764_1", "train/n01443537/n01443537_7", "val/n01440764/v1")):
        picture(root / f"{name}.JPEG", at)
    picture(root / "val" / "loose.JPEG", 9)
    (tmp_path / "synsets.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    rows, rejects = run(root, tmp_path / "out", "--classes", str(tmp_path / "synsets.txt"))
    assert [(row["caption"], row["label"], row["split"], row["num_frames"]) for row in rows] == [
        ("tench, Tinca tinca", 0, "train", 1), ("goldfish, Carassius auratus", 1, "train", 1),
        ("tench, Tinca tinca", 0, "val", 1),
    ]  # fmt: skip
    assert reasons(rejects) == {"val/loose.JPEG": "lies in no class folder"}
    assert "give no captions" not in capsys.readouterr().err
    rows, _ = run(root, tmp_path / "out2")
    assert {row["caption"] for row in rows} == {""}
    assert "--classes FILE would" in capsys.readouterr().err
    (tmp_path / "synsets.txt").write_text("n01440764 tench\nn01440764 goldfish\n")
    options = ["--out", str(tmp_path / "out"), "--classes", str(tmp_path / "synsets.txt")]
    assert convert.main([str(root), *options]) == 2
    assert "line 2: class n01440764 is there twice" in capsys.readouterr().err


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three clips with columns of a user's own, an id that is no file name and a caption that needs quotes."""
    rows = []
    for at, (name, caption) in enumerate([("a.b/c", 'says "hi",\nthen'), ("two", "a cat"), ("3", "ein Süßer")]):
        path = picture(tmp_path / "clips" / f"clip {at}.png", at)
        rows.append({"id": name, "path": f"../clips/{path.name}", "caption": caption, "num_frames": 1, "fps": 0.0,
                     "height": 6, "width": 8, "motion": 0.5 * at, "label": at, "likes": f"x{at}"})  # fmt: skip
    write_table(pd.DataFrame(rows), tmp_path / "in" / "manifest.parquet")
    return tmp_path / "in" / "manifest.parquet"


def same(one: list[dict[str, Any]], other: list[dict[str, Any]], folder: Path, of: Path, *left_out: str) -> bool:
    """Whether rows hold the same, and their paths files of the same content."""
    for a, b in zip(one, other, strict=True):
        if (folder / a["path"]).read_bytes() != (of / b["path"]).read_bytes():
            return False
        if {k: v for k, v in a.items() if k not in ("path", *left_out)} != {
            k: v for k, v in b.items() if k not in ("path", *left_out)
        }:
            return False
    return True


def test_there_and_back_through_every_format(manifest: Path, tmp_path: Path) -> None:
    rows = read_table(manifest).to_dict("records")
    csv, _ = run(manifest, tmp_path / "csv", "--to", "csv")
    assert same(csv, rows, tmp_path / "csv", manifest.parent)
    back, _ = run(tmp_path / "csv" / "manifest.csv", tmp_path / "deep" / "csv2")
    assert same(back, rows, tmp_path / "deep" / "csv2", manifest.parent)
    run(manifest, tmp_path / "tar", "--to", "webdataset", "--shard-size", "2")
    assert [p.name for p in sorted((tmp_path / "tar/shards").iterdir())] == ["000000.tar", "000001.tar"]
    back, rejects = run(tmp_path / "tar" / "shards", tmp_path / "tar2")
    assert not rejects
    assert same(back, rows, tmp_path / "tar2", manifest.parent)
    run(manifest, tmp_path / "os", "--to", "opensora")
    lines = pd.read_csv(tmp_path / "os" / "opensora.csv", header=None)
    assert lines[0].tolist() == [str(tmp_path / "clips" / f"clip {n}.png") for n in range(3)]
    assert (lines[1].tolist(), lines[2].tolist()) == ([row["caption"] for row in rows], [1, 1, 1])
    back, _ = run(tmp_path / "os" / "opensora.csv", tmp_path / "os2")
    assert same(back, rows, tmp_path / "os2", manifest.parent, "id", "motion", "label", "likes")
    assert len({row["id"] for row in back}) == 3


def test_a_second_run_touches_nothing_and_a_lost_file_comes_back(manifest: Path, tmp_path: Path) -> None:
    shards = tmp_path / "tar" / "shards"

    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for f in ("tar", "back") for p in (tmp_path / f).rglob("*") if p.is_file()}

    def both() -> None:
        run(manifest, tmp_path / "tar", "--to", "webdataset", "--shard-size", "2")
        run(shards, tmp_path / "back")

    both()
    first = state()
    content = {p: p.read_bytes() for p in first}
    both()
    assert state() == first
    lost = [shards / "000001.tar", next((tmp_path / "back/media/000000").iterdir())]
    for path in lost:
        path.unlink()
    both()
    assert {p: p.read_bytes() for p in lost} == {p: content[p] for p in lost}
    assert (shards / "000000.tar").stat().st_mtime_ns == first[shards / "000000.tar"]
    run(manifest, tmp_path / "tar", "--to", "webdataset", "--shard-size", "3")
    assert [p.name for p in shards.iterdir()] == ["000000.tar"]  # what was left of the smaller ones is gone
    run(manifest, tmp_path / "tar", "--to", "webdataset", "--shard-size", "2")
    assert {p: p.read_bytes() for p in shards.iterdir()} == {p: content[p] for p in content if p.parent == shards}


def test_rows_that_cannot_be_taken_are_told(tmp_path: Path) -> None:
    good = picture(tmp_path / "a.png", 1)
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "folder.mp4").mkdir()
    facts = "1,0,6,8"
    lines = [
        "id,path,caption,num_frames,fps,height,width",
        f"one,a.png,x,{facts}", f"one,a.png,y,{facts}", f"two,,x,{facts}",
        "three,gone.mp4,x,,,,", "four,folder.mp4,x,,,,", "five,broken.jpg,x,,,,", f"six,a.png,,{facts}",
        ",a.png,z,,,,", ",a.png,z,,,,", ",a.png,other,,,,", "seven,trusted.mp4,x,16,24,6,8",
        "eight,gone2.mp4,x,16,0,6,8",
    ]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(lines))
    rows, rejects = run(tmp_path / "t.csv", tmp_path / "out")
    assert [row["id"] for row in rows[:2]] == ["one", "six"]
    assert [row["id"] for row in rows[4:]] == ["seven"]  # what a row tells is believed
    content, with_caption = rows[2]["id"], rows[3]["id"]
    assert (len(content), with_caption[:17]) == (16, f"{content}-")
    assert [(row["id"], row["reason"]) for row in rejects] == [
        ("two", "row 3: path is empty"), ("three", "no such file"), ("four", "is no regular file"),
        ("five", rejects[3]["reason"]), ("eight", "no such file"), ("one", "another row has this id"),
        (rejects[6]["id"], "another row has this file and caption"),
    ]  # fmt: skip
    assert rejects[3]["reason"].startswith("cannot be read as an image")
    convert.main([str(tmp_path / "t.csv"), "--out", str(tmp_path / "os"), "--to", "opensora", "--workers", "1"])
    assert "caption is empty" in read_table(tmp_path / "os" / "rejects.parquet")["reason"].tolist()
    assert str(good) in (tmp_path / "os" / "opensora.csv").read_text()


def test_without_probing_files_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "os.csv").write_text("/data/a.mp4, a dog ,120\n/data/b.mp4,,8\n/data/a.mp4,again,120\n")
    rows, rejects = run(tmp_path / "os.csv", tmp_path / "out", "--no-probe")
    assert not rejects
    assert [row["caption"] for row in rows] == ["a dog", "", "again"]
    assert [row["num_frames"] for row in rows] == [120, 8, 120]
    assert all(np.isnan(row["fps"]) for row in rows)
    assert len({row["id"] for row in rows}) == 3


PANDA = """videoID,url,timestamp,caption,matching_score
---4I,https://www.youtube.com/watch?v=---4I,"[['0:00:16.300', '0:00:32.566'], ['1:01:50.000', '1:01:58.8']]",\
"['A man''s dog, ""Rex"".', 'Two']","[0.45, 0.5]"
bad1,https://x,"[['0:00:16.300', '0:00:32.566']]","['a', 'b']","[0.4]"
bad2,https://x,"__import__('os').system('touch bad')","['a']","[0.4]"
bad3,https://x,"[['0:00:09', '0:00:02']]","['a']","[0.4]"
"""


def test_panda70m_becomes_a_row_for_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text(PANDA.replace("'A man''s", '""A man\'s').replace('""Rex"".\'', 'Rex.""'))
    rows, rejects = run("p.csv", tmp_path / "out")
    assert [(row["id"], row["start_time"], row["end_time"]) for row in rows] == [
        ("---4I-00016300-00032566", 16.3, 32.566), ("---4I-03710000-03718800", 3710.0, 3718.8)
    ]  # fmt: skip
    assert [(row["caption"], row["source"], row["matching_score"]) for row in rows] == [
        ("A man's dog, Rex.", "---4I", 0.45), ("Two", "---4I", 0.5)
    ]  # fmt: skip
    assert [(row["id"], row["reason"]) for row in rejects] == [
        ("bad1", "row 2: 1 timestamps, 2 captions, 1 scores"), ("bad2", rejects[1]["reason"]),
        ("bad3", "row 4: from 9 to 2 seconds is no span"),
    ]  # fmt: skip
    assert not Path("bad").exists()


def scene(cut: list[int], name: str) -> dict[str, Any]:
    return {"scene_cut": cut, "clip_id": name, "caption": f"scene {name}"}


def test_hdvg_becomes_a_row_for_each_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = {
        "gp.k.8.mp4": {"span": ["00:01:46.479", "00:01:57.009"], "fps": 30.0,
                       "scene_split": [scene([9, 39], "gp.k.8_1"), scene([39, -1], "gp.k.8_2")]},
        "gp.k.9.mp4": {"span": ["00:01:57.009"], "fps": 30.0, "scene_split": []},
    }  # fmt: skip
    videos = [{"url": f"https://youtu.be/{n}", "clip": clips if n == 0 else {}} for n in range(50)]
    texts = [json.dumps(videos), json.dumps(videos, indent=1), json.dumps({str(n): v for n, v in enumerate(videos)}),
             "\n".join(map(json.dumps, videos))]  # fmt: skip
    monkeypatch.setattr(tables, "CHUNK", 1024)
    for at, text in enumerate(texts):
        (tmp_path / f"hdvg_{at}.json").write_text(text)
        assert list(tables.json_elements(tmp_path / f"hdvg_{at}.json")) == videos
        rows, rejects = run(tmp_path / f"hdvg_{at}.json", tmp_path / f"out{at}")
        assert [(row["id"], row["start_time"], row["end_time"]) for row in rows] == [
            ("gp.k.8_1", 106.779, 107.779), ("gp.k.8_2", 107.779, 117.009)
        ]  # fmt: skip
        assert {row["source"] for row in rows} == {"gp.k"}
        assert [row["id"] for row in rejects] == ["gp.k.9.mp4"]
    (tmp_path / "hdvg_0.json").write_text(texts[0][:-100])
    assert convert.main([str(tmp_path / "hdvg_0.json"), "--out", str(tmp_path / "out")]) == 2


def test_a_folder_of_hdvg_files_is_one_dataset(tmp_path: Path) -> None:
    for at in range(3):
        clips = {f"v{at}.0.mp4": {"span": ["0:0:0", "0:0:5"], "fps": 25, "scene_split": [scene([0, -1], f"v{at}.0_0")]}}
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"hdvg_{at}.json").write_text(json.dumps([{"url": "u", "clip": clips}]))
    rows, _ = run(tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in rows] == ["v0.0_0", "v1.0_0", "v2.0_0"]


def test_doubts_and_mistakes_are_answered_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "cats" / "a" / "1.png", 1)
    (tmp_path / "no.csv").write_text("a,b,c,d\n1,2,3,4\n")
    (tmp_path / "url.csv").write_text("id,url\n1,http://x\n")
    (tmp_path / "x.json").write_text("[1]")
    (tmp_path / "m.csv").write_text("path,num_frames\na.mp4,many\n")
    (tmp_path / "p.csv").write_text(PANDA.splitlines()[0] + "\n")

    def line(given: str, *options: str) -> str:
        assert convert.main([str(tmp_path / given), "--out", str(tmp_path / "out"), *options]) == 2
        (told,) = capsys.readouterr().err.strip().splitlines()
        return told.removeprefix("error: ")

    assert "1 folders with pictures in them" in line("cats")
    assert "Pass --from, one of manifest" in line("cats")
    assert "has the columns a, b, c, d: which format?" in line("no.csv")
    assert "4 columns, expected 2, 3 or 8 without a header" in line("no.csv", "--from", "opensora")
    assert "pass it to data_tools.download" in line("url.csv")
    assert "JSON whose entries have no url and clip" in line("x.json")
    assert "no such file or folder" in line("gone.csv")
    assert "column num_frames, expected int64" in line("m.csv", "--no-probe")
    assert "--to webdataset: panda70m names no files yet" in line("p.csv", "--to", "webdataset")
    assert "--classes: only for class folders, INPUT is manifest" in line("m.csv", "--classes", "x")
    assert "--shard-size 0: expected at least 1" in line("m.csv", "--shard-size", "0")
    assert "no tar archive" in line("cats", "--from", "webdataset")
    write_table(pd.DataFrame([{"path": "a.png"}]), tmp_path / "out" / "manifest.parquet")
    assert "is INPUT itself" in line("out/manifest.parquet")
    shutil.rmtree(tmp_path / "out")
    rows, _ = run(tmp_path / "cats", tmp_path / "out", "--from", "imagenet")
    assert rows[0]["caption"] == "a"
