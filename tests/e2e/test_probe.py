"""`probe` on the reference data's bad files: the verdict that is expected of each, and no good file lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import probe, split
from opensora_repro.data.probe.rows import probe_file
from opensora_repro.data.video import read_frames
from tests.frames import read_manifest, read_table

# Both carry a pixel aspect that the list's display sizes leave out.
STRETCHED = {"odd_321x241_yuv444.mp4": (241, 428), "tiny_16x16.mp4": (16, 28)}


def run(given: Path | str, out: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return rows and rejects by name."""
    assert probe.main([str(given), "--out", str(out), *options]) == 0
    rows = read_manifest(out / "manifest.parquet", need_captions=False).to_dict("records")
    rejects = read_table(out / "rejects.parquet").to_dict("records")
    assert {row["stage"] for row in rejects} <= {"probe"}
    return {row["source"]: row for row in rows}, {row["source"]: row for row in rejects}


@pytest.fixture
def mixed(videos_dir: Path, tmp_path: Path) -> Path:
    """The bad files, good ones beside them, and a link that does dangle (the copy's is a small file)."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (videos_dir / "bad").iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "good.mp4").symlink_to(videos_dir / "long_dev_vfr.mp4")
    (folder / "no target.mp4").symlink_to(tmp_path / "nowhere")
    return folder


@pytest.mark.parametrize("options", [(), ("--decode",)])
def test_every_verdict(videos_dir: Path, mixed: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    expected = json.loads((videos_dir / "bad/expected.json").read_text(encoding="utf-8"))
    rows, rejects = run(mixed, tmp_path / "out", "--workers", "2", *options)
    for name, entry in expected.items():
        if entry["verdict"] != "accept":
            assert name in rejects, name
            assert name not in rows, name
            continue
        row = rows[name]
        assert row["num_frames"] == entry["frames"], name
        size = STRETCHED.get(name, (entry["display_h"], entry["display_w"]))
        assert (row["height"], row["width"]) == size, name
        stored = (entry.get("coded_h", row["coded_height"]), entry.get("coded_w", row["coded_width"]))
        assert (row["coded_height"], row["coded_width"], row["rotation"]) == (*stored, entry.get("rotation", 0)), name
    assert set(rows) == {n for n, e in expected.items() if e["verdict"] == "accept"} | {"good.mp4"}
    assert rows["good.mp4"]["num_frames"] == 1497
    reasons = {name: row["reason"] for name, row in rejects.items()}
    assert reasons["zero_bytes.mp4"] == "the file is empty"
    assert reasons["audio_only.mp4"] == "no video stream"
    assert reasons["directory.mp4"] == "is a folder"
    assert reasons["no target.mp4"] == "a link to a file that is not there"
    assert reasons["trunc_mdat_half.mp4"] == "damaged: holds 29 of 90 frames"
    assert reasons["corrupt_middle.mp4"].startswith("damaged: 2 of 90 frames are broken")
    assert all("\n" not in reason and str(tmp_path) not in reason for reason in reasons.values())


def test_facts(mixed: Path, tmp_path: Path) -> None:
    rows, _ = run(mixed, tmp_path / "out", "--workers", "2")
    assert [n for n, row in rows.items() if not row["constant_fps"]] == [
        "good.mp4", "rotated_180_phone.mp4", "vfr_30_10_4fps.mp4"
    ]  # fmt: skip
    assert rows["audio_longer_than_video.mp4"]["duration"] == pytest.approx(1.0)
    assert rows["av1.mp4"]["codec"] == "av1"
    assert rows["hevc_10bit.mp4"]["pixel_format"] == "yuv420p10le"
    assert rows["cover_art.mp4"]["audio"]
    assert not rows["vp9.webm"]["audio"]
    twins = [n for n, row in rows.items() if row["same_as"] == "-leading-dash.mp4"]
    assert len(twins) == 3
    assert rows[twins[0]]["id"].startswith(rows["-leading-dash.mp4"]["id"])
    frames = read_frames(rows["rotated_90.mp4"]["path"], start=0, count=1)
    assert tuple(frames.shape[1:3]) == (rows["rotated_90.mp4"]["height"], rows["rotated_90.mp4"]["width"])


def test_probing_again_does_nothing_and_a_changed_file_is_seen(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(mixed, out, "--workers", "2")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    began = time.monotonic()
    assert run(mixed, out)[0] == first[0]
    assert time.monotonic() - began < 5
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    (mixed / "good.mp4").unlink()
    (mixed / "good.mp4").write_bytes(b"no video any more")
    rows, rejects = run(mixed, out)
    assert "good.mp4" not in rows
    assert rejects["good.mp4"]["reason"].startswith("cannot be decoded")


def test_each_bad_file_alone_is_quick(videos_dir: Path) -> None:
    """In one process, so that it is the file that is timed."""
    for path in sorted((videos_dir / "bad").iterdir()):
        for decode in (False, True):
            began = time.process_time()
            probe_file({"path": str(path), "decode": decode, "contents": ["0" * 64]})
            assert time.process_time() - began < 2, path.name


def test_a_table_keeps_its_ids_and_columns(videos_dir: Path, tmp_path: Path) -> None:
    bad = videos_dir / "bad"
    table = tmp_path / "list.csv"
    lines = ["path,id,caption,likes", f"{bad}/vp9.webm,one,a street,3", f"{bad}/all_black.mp4,two,,4"]
    table.write_text("\n".join([*lines, f"{bad}/zero_bytes.mp4,three,x,5", f"{bad}/av1.mp4,one,x,6"]))
    assert probe.main([str(table), "--out", str(tmp_path / "out")]) == 0
    rows = read_manifest(tmp_path / "out/manifest.parquet", need_captions=False)
    assert rows[["id", "caption", "likes", "num_frames"]].to_numpy().tolist() == [
        ["one", "a street", 3, 48], ["two", "", 4, 60]
    ]  # fmt: skip
    rejects = read_table(tmp_path / "out/rejects.parquet")
    assert rejects[["id", "reason"]].to_numpy().tolist() == [
        ["three", "the file is empty"], ["one", "another row has this id"]
    ]  # fmt: skip


def test_split_takes_probes_manifest(videos_dir: Path, tmp_path: Path) -> None:
    pattern = str(videos_dir / "bad" / "[atv][lpv]*.*")
    rows, _ = run(pattern, tmp_path / "facts")
    assert set(rows) == {"all_black.mp4", "av1.mp4", "vp9.webm"} & set(rows)
    assert split.main([str(tmp_path / "facts/manifest.parquet"), "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    clips = read_manifest(tmp_path / "out/manifest.parquet", need_captions=False)
    assert clips.groupby("source")["num_frames"].sum().to_dict() == {n: r["num_frames"] for n, r in rows.items()}
    ids = {row["source"]: row["id"] for row in rows.values()}
    assert all(row["id"].startswith(ids[row["source"]]) for row in clips.to_dict("records"))


def test_pictures_are_videos_of_one_frame(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.jpg").write_text("x")
    rows, rejects = run(tmp_path / "in", tmp_path / "out", "--images")
    assert (rows["a.png"]["num_frames"], rows["a.png"]["height"], rows["a.png"]["width"]) == (1, 6, 8)
    assert list(rejects) == ["b.jpg"]


def test_nothing_readable_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("text")
    assert probe.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert "no file can be read; the reasons are in" in capsys.readouterr().err
    assert len(read_table(tmp_path / "out" / "rejects.parquet")) == 1


def test_a_pipe_named_like_a_video_does_not_hang(videos_dir: Path, tmp_path: Path, repo_dir: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "good.webm").symlink_to(videos_dir / "bad/vp9.webm")
    command = [sys.executable, "-m", "data_tools.probe", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=repo_dir, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    (rejected,) = read_table(tmp_path / "out" / "rejects.parquet").to_dict("records")
    assert rejected["reason"] == "is no regular file"
