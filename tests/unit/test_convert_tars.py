"""WebDataset archives from strangers, and archives of our own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools import convert
from opensora_repro.data.convert.tar_reader import split_key
from tests.frames import read_table, write_table


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), shade, np.uint8)).save(data, "PNG")
    return data.getvalue()


def tar(
    path: Path, members: list[tuple[str, bytes]], mode: str = "w", special: tuple[tuple[str, bytes], ...] = ()
) -> Path:
    """Write an archive of files, and of `special` members given by their type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind in special:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def run(given: Path, out: Path, *options: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    assert convert.main([str(given), "--out", str(out), "--workers", "1", *options]) == 0
    rows = read_table(out / "manifest.parquet").to_dict("records")
    rejects = read_table(out / "rejects.parquet").to_dict("records")
    return {row["id"]: row for row in rows}, {row["id"]: row["reason"] for row in rejects}


def test_no_member_decides_where_it_is_written(tmp_path: Path) -> None:
    special = (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("node.png", tarfile.CHRTYPE),
               ("pipe.png", tarfile.FIFOTYPE), ("block.mp4", tarfile.BLKTYPE),
               ("../made", tarfile.DIRTYPE))  # fmt: skip
    names = ["../../../up.png", "/absolute.png", "a/../../b.png", "dir/ok.png", "dir.d/ok.png", "é ü.png", "./dot.png"]
    path = tar(tmp_path / "in" / "evil.tar", [(name, png(at)) for at, name in enumerate(names)], special=special)
    rows, rejects = run(path, tmp_path / "out")
    assert list(rows) == ["../../../up", "/absolute", "a/../../b", "dir/ok", "dir.d/ok", "é ü", "dot"]
    assert list(rejects) == ["link", "hard", "node", "pipe", "block"]
    assert all("a link or device, not extracted" in reason for reason in rejects.values())
    media = tmp_path / "out" / "media" / "evil"
    assert len(list(media.iterdir())) == len(names)
    assert not any(p.is_symlink() or p.is_dir() for p in media.iterdir())
    for at, row in enumerate(rows.values()):
        assert (tmp_path / "out" / row["path"]).resolve().parent == media
        assert (tmp_path / "out" / row["path"]).read_bytes() == png(at)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_members_of_a_key_make_a_sample(tmp_path: Path) -> None:
    described = {"caption": "from json", "num_frames": "many", "height": 6, "likes": 3, "tags": ["a"], "path": "/etc",
                 "large": 2**70, "start_time": 1, "fps": float("nan"), "label": True, "broken": "\ud800"}  # fmt: skip
    data = json.dumps(described).encode()
    members = [
        ("a.png", png(1)), ("a.txt", "  ein Süßer\n".encode()), ("a.cls", b"7"), ("a.json", data), ("b.json", data),
        ("b.seg.png", png(2)), ("b.png", png(3)),
        ("c.json", b"[1, 2"), ("c.txt", b"\xff\xfe"), ("c.png", png(4)), ("c.cls", b"x"),
        ("d.txt", b"no picture"), ("d.npz", b"1"), ("a.png", png(5)), ("a.txt", b"again"),
        ("README.md", b"# of no sample"), (".hidden.png", b"x"), ("e.json", b"{" * 100_000), ("e.PNG", png(6)),
    ]  # fmt: skip
    rows, rejects = run(tar(tmp_path / "t.tar.gz", members, "w:gz"), tmp_path / "out")
    assert list(rows) == ["a", "b", "e"]
    a, b = rows["a"], rows["b"]
    assert (a["caption"], a["label"], a["likes"], a["tags"], a["start_time"]) == ("ein Süßer", 7, 3, '["a"]', 1.0)
    assert (a["num_frames"], a["height"], a["width"], a["fps"]) == (1, 6, 8, 0.0)  # from the file, as it was wrong
    assert (b["caption"], b["large"], b["broken"]) == ("from json", str(2**70), "\\ud800")
    assert (tmp_path / "out" / b["path"]).read_bytes() == png(2)
    assert rejects == {
        "c": "t.tar.gz: its caption (txt) is no UTF-8 text",
        "d": "t.tar.gz: no video or picture of this key (has npz, txt)",
        "a": "t.tar.gz: its key is there twice",
        "README": "t.tar.gz: no video or picture of this key (has md)",
    }


def files_below(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_members_of_a_sample_may_lie_apart(cases_dir: Path, tmp_path: Path) -> None:
    rows, rejects = run(cases_dir / "members_apart", tmp_path / "case")
    assert sorted(rows) == list("abcd") and not rejects
    assert all(row["caption"] and row["num_frames"] == 20 for row in rows.values())
    members = [(f"{n}.json", b'{"likes": %d}' % at) for at, n in enumerate("xy", start=1)]
    members += [(f"{n}.png", png(at)) for at, n in enumerate("xy")]
    members += [(f"{n}.txt", b"\xef\xbb\xbftext of " + n.encode()) for n in "xy"]
    rows, rejects = run(tar(tmp_path / "in.tar", members), tmp_path / "out")
    assert [(row["caption"], row["likes"]) for row in rows.values()] == [("text of x", 1), ("text of y", 2)]
    assert not rejects


def test_two_videos_share_no_key_silently(cases_dir: Path, tmp_path: Path) -> None:
    video = (cases_dir / "captions" / "vids" / "a.mp4").read_bytes()
    other = (cases_dir / "captions" / "vids" / "b.mp4").read_bytes()
    members = [
        ("two.mp4", video), ("two.webm", other), ("two.txt", b"whose?"),
        ("clip.01.mp4", video), ("clip.01.txt", b"one"), ("clip.02.mp4", other), ("clip.02.txt", b"two"),
        ("same.mp4", video), ("same.mp4", other), ("same.txt", b"whose?"),
        ("aid.depth.mp4", other), ("aid.mp4", video), ("aid.jpg", png(1)), ("aid.txt", b"plain"),
        ("again.mp4", video), ("again.txt", b"first"), ("pic.01.jpg", png(1)), ("pic.02.jpg", png(2)),
        ("again.mp4", other), ("again.txt", b"second"),
    ]  # fmt: skip
    rows, rejects = run(tar(tmp_path / "t.tar", members), tmp_path / "out", "--no-probe")
    assert {key: row["caption"] for key, row in rows.items()} == {"aid": "plain", "again": "first"}
    assert {(tmp_path / "out" / row["path"]).read_bytes() for row in rows.values()} == {video}
    shared = "t.tar: several have this key, which ends at a name's first dot: "
    assert rejects == {
        "two": f"{shared}two.mp4, two.webm", "clip": f"{shared}clip.01.mp4, clip.02.mp4",
        "pic": f"{shared}pic.01.jpg, pic.02.jpg", "same": "t.tar: same.mp4 is there twice",
        "aid": "t.tar: aid.depth.mp4 is another video of this key, left out", "again": "t.tar: its key is there twice",
    }  # fmt: skip
    assert len(files_below(tmp_path / "out" / "media")) == 2


def test_keys_that_start_again_in_each_archive(tmp_path: Path) -> None:
    for shard in range(3):
        members = [(f"{n:06d}.png", png(10 * shard + n)) for n in range(2)]
        described = [("000000.json", json.dumps({"id": f"own{shard}" if shard == 2 else "000000"}).encode())]
        tar(tmp_path / "in" / "part" / f"{shard:03d}.tar", members + described)
    rows, rejects = run(tmp_path / "in", tmp_path / "out", "--from", "webdataset")
    assert not rejects
    assert list(rows) == ["part/000/000000", "part/000/000001", "part/001/000000", "part/001/000001", "own2",
                          "part/002/000001"]  # fmt: skip
    shades = [Image.open(tmp_path / "out" / row["path"]).getpixel((0, 0))[0] for row in rows.values()]
    assert shades == [0, 1, 10, 11, 20, 21]
    rows, _ = run(tmp_path / "in" / "part" / "001.tar", tmp_path / "one")
    assert list(rows) == ["000000", "000001"]


def test_what_is_rejected_is_deleted_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    good = [("good.png", png(1)), ("good.txt", b"fine"), ("bad.png", b"no picture"), ("id.json", b'{"id": "one"}'),
            ("id.png", png(2))]  # fmt: skip
    tar(tmp_path / "in" / "a.tar", good)
    tar(tmp_path / "in" / "b.tar", [("other.json", b'{"id": "one"}'), ("other.png", png(3)), ("x.txt", b"alone")])
    rows, rejects = run(tmp_path / "in", tmp_path / "out")
    assert (list(rows), sorted(rejects)) == (["good", "one"], ["bad", "one", "x"])
    assert len(files_below(tmp_path / "out" / "media")) == 2
    first = files_below(tmp_path / "out" / "tars")
    assert run(tmp_path / "in", tmp_path / "out") == (rows, rejects)
    assert files_below(tmp_path / "out" / "tars") == first
    (tmp_path / "in" / "a.tar").unlink()  # what was rejected for its sake comes back
    rows, rejects = run(tmp_path / "in", tmp_path / "out")
    assert (list(rows), sorted(rejects)) == (["one"], ["x"])


def test_an_archive_holds_no_more_than_it_may(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [("small.png", png(1)), ("large.png", os.urandom(30_000)), ("large.txt", b"x"), ("text.png", png(2)),
             ("text.txt", b"x" * ((1 << 20) + 1))]  # fmt: skip
    path = tar(tmp_path / "t.tgz", sizes, "w:gz")
    rows, rejects = run(path, tmp_path / "out", "--max-bytes", "20K")
    assert list(rows) == ["small"]
    assert rejects == {"large": "t.tgz: large.png has 30,000 bytes, --max-bytes is 20,000",
                       "text": "t.tgz: text.txt has 1,048,577 bytes, a caption may have 1,048,576"}  # fmt: skip
    assert len(files_below(tmp_path / "out" / "media")) == 1
    members = [("z.png", png(3)), ("a.png", png(1)), ("b.png", bytes(5 << 20)), ("c.png", png(2))]
    bomb = tar(tmp_path / "b.tgz", members, "w:gz")
    assert bomb.stat().st_size < 10_000
    rows, rejects = run(bomb, tmp_path / "bomb", "--max-total", "4M", "--no-probe")
    assert list(rows) == ["z"]
    assert "b.tgz: holds more than 4,000,000 bytes, the limit of --max-total" in rejects[""]
    assert len(files_below(tmp_path / "bomb" / "media")) == 1
    assert convert.main([str(tmp_path / "x.csv"), "--out", str(tmp_path / "o"), "--max-total", "1G"]) == 2
    capsys.readouterr()


def test_captions_in_lists_and_with_marks(tmp_path: Path) -> None:
    members = [("a.png", png(1)), ("a.json", b'\xef\xbb\xbf{"caption": ["", "the first"], "text": "no"}'),
               ("b.png", png(2)), ("b.json", b'{"caption": "S\xfc"}'),
               ("c.png", png(3)), ("c.txt", "x".encode("utf-16-le"))]  # fmt: skip
    rows, rejects = run(tar(tmp_path / "t.tar", members), tmp_path / "out")
    assert {key: row["caption"] for key, row in rows.items()} == {"a": "the first"}
    assert rejects == {"b": "t.tar: its JSON is no UTF-8 text", "c": "t.tar: its caption (txt) is no UTF-8 text"}


def test_a_damaged_archive_gives_what_comes_before(tmp_path: Path) -> None:
    whole = tar(tmp_path / "in" / "a.tar", [(f"s{n}.png", png(n)) for n in range(9)])
    (tmp_path / "in" / "cut.tar").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "in" / "no.tar").write_bytes(b"no archive")
    zipped = tar(tmp_path / "in" / "z.tgz", [(f"z{n}.png", os.urandom(3000)) for n in range(9)], "w:gz")
    zipped.write_bytes(zipped.read_bytes()[:15_000])
    whole.unlink()
    assert convert.main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    rejects = read_table(tmp_path / "out" / "rejects.parquet").to_dict("records")
    told = [(row["path"], row["reason"].partition(": ")[2].partition(":")[0]) for row in rejects if not row["id"]]
    assert told == [(name, "cannot be read to its end") for name in ("cut.tar", "no.tar", "z.tgz")]
    rows = read_table(tmp_path / "out" / "manifest.parquet")
    assert 1 <= len(rows) < 9
    media = [p for p in (tmp_path / "out" / "media").rglob("*") if p.is_file()]
    kept = {row["path"] for row in rows.to_dict("records")} | {row["path"] for row in rejects}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in media} <= kept


def test_an_archive_that_is_cut_between_members_is_told(tmp_path: Path) -> None:
    """`tarfile` itself takes a header that is cut, or missing, for the end; what came last may lack its caption."""
    members = [(f"s{n}.{kind}", data) for n in range(3) for kind, data in (("png", png(n)), ("txt", b"a"))]
    whole = tar(tmp_path / "in" / "class" / "whole.tar", members).read_bytes()
    for name, length in (("cut", 1024 * 5), ("in_header", 1024 * 5 + 100)):
        (tmp_path / "in" / "class" / f"{name}.tar").write_bytes(whole[:length])
    rows, _ = run(tmp_path / "in", tmp_path / "out")
    assert sorted(rows) == [f"class/{name}/s{n}" for name in ("cut", "in_header") for n in (0, 1)] + [
        f"class/whole/s{n}" for n in (0, 1, 2)
    ]
    told = read_table(tmp_path / "out" / "rejects.parquet")["reason"].tolist()
    assert len(told) == 4 and sum("cannot be read to its end: unexpected end" in reason for reason in told) == 2


def test_keys_end_at_the_first_dot_of_the_last_part() -> None:
    assert split_key("a/b.c/d.e.PNG") == ("a/b.c/d", "e.png")
    assert split_key("./x.mp4") == ("x", "mp4")
    assert split_key("d/.x.mp4") == ("", "x.mp4")
    assert split_key("plain") == ("plain", "")


def test_archives_are_the_same_bytes_and_leave_out_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    rows = []
    for at, name in enumerate(["x.1", "x_1", "y", "gone", "-dash", "no"]):
        path = tmp_path / "clips" / (f"{at}.png" if name != "no" else "kindless")
        if name != "gone":
            path.write_bytes(png(at))
        rows.append({"id": name, "path": str(path), "caption": "" if at == 1 else f"c{at}", "num_frames": 1, "fps": 0.0,
                     "height": 6, "width": 8, "label": at})  # fmt: skip
    write_table(pd.DataFrame(rows), tmp_path / "m.parquet")
    arguments = [str(tmp_path / "m.parquet"), "--to", "webdataset", "--shard-size", "4", "--out"]
    assert convert.main([*arguments, str(tmp_path / "one"), "--workers", "1"]) == 0
    os.utime(tmp_path / "clips" / "0.png", (1, 1))
    assert convert.main([*arguments, str(tmp_path / "two"), "--workers", "2"]) == 0
    first, second = (tmp_path / "one/shards/000000.tar"), (tmp_path / "one/shards/000001.tar")
    assert first.read_bytes() == (tmp_path / "two/shards/000000.tar").read_bytes()
    with tarfile.open(first) as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive}  # type: ignore[union-attr]
    keys = list(dict.fromkeys(name.partition(".")[0] for name in members))
    assert len(keys) == 3
    assert keys[0].startswith("x_1-")
    assert keys[1:] == ["x_1", "y"]
    assert [name for name in members if name.startswith("y.")] == ["y.png", "y.txt", "y.cls", "y.json"]
    assert "x_1.txt" not in members
    assert json.loads(members[f"{keys[0]}.json"]) == {k: v for k, v in rows[0].items() if k != "path"}
    with tarfile.open(second) as archive:
        assert archive.getnames()[0] == "-dash.png"
    rejects = read_table(tmp_path / "one" / "rejects.parquet")
    assert dict(zip(rejects["id"], rejects["reason"], strict=True)) == {
        "gone": "no such file", "no": "a file without an extension to tell its kind: kindless"
    }  # fmt: skip


@pytest.mark.parametrize("moment", [0.0, pytest.param(0.2, marks=pytest.mark.exhaustive)])
def test_killed_and_run_again_equals_a_run_in_peace(tmp_path: Path, repo_dir: Path, moment: float) -> None:
    for number in range(3):
        tar(
            tmp_path / "in" / f"{number}.tar", [(f"s{number}_{n}.png", png(n) + os.urandom(300_000)) for n in range(20)]
        )
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data_tools.convert", str(tmp_path / "in"), "--workers", "2", "--out"]
    process = subprocess.Popen([*command, str(out)], cwd=repo_dir, stderr=subprocess.DEVNULL)
    while not any((out / "media").glob("*/*.png")):
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.parquet").exists()
    for folder in (out, tmp_path / "peace"):
        assert convert.main([str(tmp_path / "in"), "--workers", "2", "--out", str(folder)]) == 0
    files = {p.relative_to(tmp_path / "peace") for p in (tmp_path / "peace").rglob("*") if p.is_file()}
    media = {name for name in files if name.parts[0] == "media"}
    assert len(media) == 60
    assert {p.relative_to(out) for p in (out / "media").rglob("*") if p.is_file()} == media
    for name in (*media, Path("manifest.parquet"), Path("rejects.parquet")):
        assert (out / name).read_bytes() == (tmp_path / "peace" / name).read_bytes()
