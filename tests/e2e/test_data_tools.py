from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from data_tools import caption, split
from data_tools import filter as filter_tool
from opensora_repro import files
from opensora_repro.config import DataConfig
from opensora_repro.data import preflight
from opensora_repro.data.jobs.records import RECORDS_FILE
from opensora_repro.data.manifest import read_manifest as read_table_of
from opensora_repro.data.split.options import Options, recipe_options
from opensora_repro.data.split.source import METHOD
from opensora_repro.data.video import probe
from tests.frames import read_manifest, read_table, write_manifest
from tests.job_records import recorded

SCENES = [(40, 8), (200, 14), (90, 5), (150, 12)]  # brightness of the left half, frames


def film(path: Path, scenes: list[tuple[int, int]] = SCENES, size: int = 64, rate: int = 12) -> None:
    """Write a video of still scenes with a little noise."""
    noise = np.random.default_rng(len(scenes))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for level, count in scenes:
            for _ in range(count):
                frame = noise.integers(0, 6, (size, size, 3), dtype=np.uint8)
                frame[:, : size // 2] += np.uint8(level)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    folder = tmp_path / "footage"
    (folder / "sub").mkdir(parents=True)
    film(folder / "one, 'two'.MP4")
    film(folder / "sub" / "-dash 视频.mp4", [(60, 20), (180, 20)])
    (folder / "captions.csv").write_text("source,caption\n")
    return folder


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_split_writes_clips_with_their_lineage(footage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert split.main([str(footage), "--out", str(out)]) == 0
    clips = read_manifest(out / "manifest.parquet", need_captions=False)
    first = clips[clips["source"] == "one, 'two'.MP4"]
    assert list(zip(first["start_frame"], first["end_frame"], strict=True)) == [(0, 8), (8, 22), (27, 39)]
    assert first["start_time"].tolist() == pytest.approx([0, 8 / 12, 27 / 12])
    assert first["end_time"].tolist() == pytest.approx([8 / 12, 22 / 12, 39 / 12])
    assert clips["source"].tolist()[3:] == ["sub/-dash 视频.mp4"] * 2
    assert set(clips["caption"]) == {""}
    assert not clips["resplit"].any()
    for row in clips.to_dict("records"):
        info = probe(row["path"])
        assert (info.num_frames, info.height, info.width) == (row["num_frames"], 64, 64)
        assert row["num_frames"] == row["end_frame"] - row["start_frame"]
        assert (row["fps"], info.fps) == (pytest.approx(12), pytest.approx(12))
    (rejected,) = read_table(out / "rejects.parquet").to_dict("records")
    assert rejected["id"] == f"{first['id'].iloc[0].split('-')[0]}-000022-000027"
    assert (rejected["source"], rejected["stage"]) == ("one, 'two'.MP4", "split")
    assert (rejected["start_frame"], rejected["end_frame"]) == (22, 27)
    assert rejected["reason"] == "5 frames, --min-frames is 8"


def test_clips_fit_the_config_that_they_are_for(
    footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film(footage / "large.mp4", [(60, 40)], size=96)
    config = tmp_path / "stage.toml"
    config.write_text("[data]\nnum_frames = 4\nframe_interval = 2\nheight = 48\nwidth = 64\n[sample]\nfps = 3\n")
    how = [str(footage), "--out", str(tmp_path / "out"), f"--for-training={config}"]
    assert split.main(how) == 0
    clips = read_manifest(tmp_path / "out" / "manifest.parquet", need_captions=False)
    assert clips["fps"].tolist() == pytest.approx([6] * 4)
    assert clips["num_frames"].tolist() == [20, 7, 10, 10]  # 7 are needed: the scenes of 8, 5 and 12 frames are out
    assert set(clips["height"]) == set(clips["width"]) == {64}
    reasons = read_table(tmp_path / "out" / "rejects.parquet")["reason"].tolist()
    assert reasons == ["4 frames, --min-frames is 7", "3 frames, --min-frames is 7", "6 frames, --min-frames is 7"]
    assert split.main([*how, "--min-frames=2", "--fps=12", "--short-side=32"]) == 0  # what is given counts
    clips = read_manifest(tmp_path / "out" / "manifest.parquet", need_captions=False)
    assert (len(clips), set(clips["height"])) == (7, {32})
    assert clips["fps"].tolist() == pytest.approx([12] * 7)
    for keys, rate in (("fps = 12.5", "12.5"), ('frame_sampling = "uniform"', "")):  # every frame of theirs counts
        config.write_text(f"[data]\nnum_frames = 4\nwidth = 48\n{keys}\n")
        assert recipe_options(str(config)) == {"min_frames": 4, "short_side": 256, "fps": rate}
    buckets = '[[data.buckets]]\nnum_frames = 2\nresolution = "96x96"\nkeep = 0.0\n[[data.buckets]]\nnum_frames = 8\n'
    config.write_text(f'[data]\nfps = 24\n{buckets}resolution = "64x48"\n')  # what one without clips takes is lost
    assert recipe_options(str(config)) == {"min_frames": 8, "short_side": 48, "fps": "24"}
    with pytest.raises(SystemExit):
        split.main(["--for-training", str(footage), "--out", str(tmp_path / "out")])
    assert "is no .toml; write the input before it" in capsys.readouterr().err
    assert split.main([str(footage), "--out", str(tmp_path / "out"), "--for-training=absent.toml"]) == 2
    assert "--for-training: config absent.toml: cannot be read" in capsys.readouterr().err


def test_footage_slower_than_its_clips_is_told(
    footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the split that repeats its frames, and by what looks at the clips before a training; filter knows them."""
    film(footage / "quick.mp4", rate=24)
    out = tmp_path / "out"
    assert split.main([str(footage), "--out", str(out), "--fps", "12"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert split.main([str(footage), "--out", str(out), "--fps", "24"]) == 0
    words = capsys.readouterr().err
    assert "warning: 6 of 9 clips were filmed at fewer frames a second (from 12 on) than --fps 24, so that" in words
    clips = read_table_of(out / "manifest.parquet", need_captions=False)
    (told,) = preflight.warnings(preflight.survey(clips, DataConfig(num_frames=8, height=64, width=64, fps=24.0), out))
    assert told.startswith("67% of the clips") and "lower data.fps (the slowest have 12)" in told
    expression = told.rpartition("--keep ")[2].strip("'")
    assert expression in words
    assert filter_tool.main([str(out / "manifest.parquet"), "--out", str(tmp_path / "kept"), "--keep", expression]) == 0
    assert set(read_manifest(tmp_path / "kept" / "manifest.parquet", need_captions=False)["source"]) == {"quick.mp4"}


def test_split_again_does_nothing_and_new_files_are_added(footage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert split.main([str(footage), "--out", str(out)]) == 0
    before = stamps(out)
    assert split.main([str(footage), "--out", str(out)]) == 0
    assert stamps(out) == before
    film(footage / "later.mp4", [(100, 11)])
    shutil.copy(footage / "later.mp4", footage / "twin.mp4")
    os.utime(footage / "sub" / "-dash 视频.mp4")  # content counts, not the clock
    assert split.main([str(footage), "--out", str(out)]) == 0
    after = stamps(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.parquet", "rejects.parquet", RECORDS_FILE}
    assert len(read_manifest(out / "manifest.parquet", need_captions=False)) == 6
    assert read_table(out / "rejects.parquet")["reason"].tolist()[-1] == "same content as later.mp4"


def test_sources_are_read_in_the_jobs_and_known_again_by_content(
    footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process reads no source, however many there are; a moved one is not split again, but is under options."""

    def unread(path: Path) -> str:
        raise AssertionError(f"{path} is read before the jobs")

    out = tmp_path / "out"
    monkeypatch.setattr(files, "sha256_of", unread)
    assert split.main([str(footage), "--out", str(out)]) == 0
    records, clips = recorded(out, "sources"), stamps(out / "clips")
    (footage / "one, 'two'.MP4").rename(footage / "moved.mp4")
    assert split.main([str(footage), "--out", str(out)]) == 0
    assert (recorded(out, "sources"), stamps(out / "clips")) == (records, clips)
    assert set(read_table(out / "manifest.parquet")["source"]) == {"moved.mp4", "sub/-dash 视频.mp4"}
    assert split.main([str(footage), "--out", str(out), "--crf", "30"]) == 0
    assert recorded(out, "sources").keys().isdisjoint(records)
    changed = stamps(out / "clips")
    assert split.main([str(footage), "--out", str(out)]) == 0
    assert recorded(out, "sources").keys() == records.keys() and stamps(out / "clips").keys() == changed.keys()
    assert {name: content for name, (_, content) in stamps(out / "clips").items()} == {
        name: content for name, (_, content) in clips.items()
    }


def test_split_restores_a_lost_clip(footage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert split.main([str(footage), "--out", str(out)]) == 0
    lost = next((out / "clips").glob("*.mp4"))
    content = lost.read_bytes()
    lost.unlink()
    assert split.main([str(footage), "--out", str(out)]) == 0
    assert lost.read_bytes() == content


def test_ids_follow_content_not_names(footage: Path, tmp_path: Path) -> None:
    assert split.main([str(footage), "--out", str(tmp_path / "a")]) == 0
    moved = tmp_path / "elsewhere" / "renamed.mp4"
    moved.parent.mkdir()
    shutil.copy(footage / "one, 'two'.MP4", moved)
    assert split.main([str(moved), "--out", str(tmp_path / "b")]) == 0
    one, two = (read_manifest(tmp_path / d / "manifest.parquet", need_captions=False) for d in "ab")
    assert two["id"].tolist() == one["id"].tolist()[:3]
    assert two["source"].tolist() == ["renamed.mp4"] * 3


def test_split_divides_long_scenes(footage: Path, tmp_path: Path) -> None:
    source = footage / "sub" / "-dash 视频.mp4"
    assert split.main(["--out", str(tmp_path / "out"), "--max-frames", "12", "--crf", "30", "--", str(source)]) == 0
    clips = read_manifest(tmp_path / "out" / "manifest.parquet", need_captions=False)
    assert clips["num_frames"].tolist() == [10, 10, 10, 10]
    assert clips["resplit"].all()


def test_every_bad_file_is_listed_or_split(videos_dir: Path, tmp_path: Path) -> None:
    """The odd but sound files give clips, the others a reason; small ones only, to be quick."""
    expected = json.loads((videos_dir / "bad/expected.json").read_text(encoding="utf-8"))
    folder = tmp_path / "in"
    folder.mkdir()
    for name in expected:
        source = videos_dir / "bad" / name
        if source.is_dir():
            (folder / name).mkdir()
        elif source.stat().st_size < 60_000:
            shutil.copy(source, folder / name, follow_symlinks=False)
    (folder / "no_target.mp4").symlink_to(tmp_path / "nowhere")
    assert split.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    clips = read_manifest(tmp_path / "out/manifest.parquet", need_captions=False)
    rejects = read_table(tmp_path / "out/rejects.parquet")
    reasons = dict(zip(rejects["source"], rejects["reason"], strict=True))
    frames = clips.groupby("source")["num_frames"].sum().to_dict()
    for path in folder.iterdir():
        outcome = expected.get(path.name, {"verdict": "reject"})
        if outcome["verdict"] != "accept":
            assert path.name in reasons
            assert path.name not in frames
        elif outcome["frames"] < 8:
            assert "--min-frames" in reasons[path.name]
        else:
            assert frames.get(path.name) == outcome["frames"] or reasons[path.name].startswith("same content as")
    assert reasons["trunc_mdat_half.mp4"] == "damaged: holds 29 of 90 frames"
    assert reasons["audio_only.mp4"] == "no video stream"
    assert reasons["no_target.mp4"] == "a link to a file that is not there"
    assert all("\n" not in reason and str(tmp_path) not in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--out", "o"], "no such file or folder"),
        (["empty", "--out", "o"], "no video in this folder"),
        (["text.mp4", "--out", "o"], "no clip came out"),
        (["text.mp4", "--out", "o", "--min-frames", "0"], "--min-frames 0: expected at least 1"),
        (["text.mp4", "--out", "o", "--max-frames", "4"], "--max-frames 4"),
        (["text.mp4", "--out", "o", "--crf", "99"], "--crf 99"),
        (["text.mp4", "--out", "o", "--threshold", "nan"], "--threshold nan"),
        (["text.mp4", "--out", "text.mp4/o"], "text.mp4"),
    ],
)
def test_split_mistakes(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    assert split.main(arguments) == 2
    errors = capsys.readouterr().err.strip()
    line = errors.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in errors


def test_a_killed_split_continues(tmp_path: Path, repo_dir: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        film(folder / f"{i}.mp4", [(30 + 10 * i, 30), (150, 30 + i), (90, 30)], size=96)
    command = [sys.executable, "-m", "data_tools.split", str(folder), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=repo_dir, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not recorded(tmp_path / "out", "sources") and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    done = recorded(tmp_path / "out", "sources")
    assert 1 <= len(done) < 4
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    assert split.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    assert split.main([str(folder), "--out", str(tmp_path / "fresh")]) == 0
    again, fresh = stamps(tmp_path / "out"), stamps(tmp_path / "fresh")
    assert again.keys() == fresh.keys()
    for name in fresh.keys() - {RECORDS_FILE}:
        assert again[name][1] == fresh[name][1], name
    assert recorded(tmp_path / "out", "sources") == recorded(tmp_path / "fresh", "sources")


@pytest.mark.parametrize("tool", ["probe", "split", "caption"])
def test_help_is_quick_and_light(repo_dir: Path, tool: str) -> None:
    code = f"import sys, data_tools.{tool} as t\ntry: t.main(['--help'])\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_dir, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--out DIR" in done.stdout
    loaded = done.stdout.splitlines()[-1]
    assert not any(f"'{name}'" in loaded for name in ("torch", "av", "cv2", "pandas", "scenedetect", "numpy"))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A manifest of five clips of two sources."""
    spans = [("a.mp4", 0, 16), ("a.mp4", 16, 30), ("a.mp4", 30, 62), ("sub/b.mp4", 0, 20), ("sub/b.mp4", 20, 44)]
    rows = [
        {"id": f"c{i}", "path": f"clips/c{i}.mp4", "caption": "", "num_frames": e - s, "fps": 8.0, "height": 64,
         "width": 64, "source": source, "start_frame": s, "end_frame": e, "start_time": s / 8, "end_time": e / 8}
        for i, (source, s, e) in enumerate(spans)
    ]  # fmt: skip
    path = tmp_path / "split" / "manifest.parquet"
    write_manifest(pd.DataFrame(rows), path)
    return path


def run_caption(clips: Path, sidecar: pd.DataFrame, out: Path) -> tuple[int, dict[str, str], dict[str, str]]:
    sidecar.to_csv(clips.parent / "list.csv", index=False)
    status = caption.main([str(clips), "--sidecar", str(clips.parent / "list.csv"), "--out", str(out)])
    if not (out / "manifest.parquet").exists():
        return status, {}, {}
    good, bad = read_table(out / "manifest.parquet"), read_table(out / "rejects.parquet")
    captions = dict(zip(good["id"], good["caption"], strict=True))
    return status, captions, dict(zip(bad["id"], bad["reason"], strict=True))


def test_captions_by_id_in_any_order(clips: Path, tmp_path: Path) -> None:
    listed = pd.DataFrame({"id": ["c4", "c1", "other", "c0", "c3"], "caption": ["four", "one", "x", "zero ", None]})
    status, captions, reasons = run_caption(clips, listed, tmp_path / "out")
    assert status == 0
    assert captions == {"c0": "zero", "c1": "one", "c4": "four"}
    assert reasons == {"c2": "no caption for this id", "c3": "its caption (row 5 of the list) is empty"}
    kept = read_manifest(tmp_path / "out" / "manifest.parquet")
    assert kept["path"].tolist() == [str(clips.parent / "clips" / f"c{i}.mp4") for i in (0, 1, 4)]


@pytest.mark.parametrize("unit", ["frame", "time"])
def test_captions_by_source_and_span(clips: Path, tmp_path: Path, unit: str) -> None:
    """Spans a frame or two off still match; a clip over two scenes, or outside all, is not given a wrong caption."""
    rows = [("b.mp4", 19, 44, "b late"), ("a.mp4", 45, 62, "a end"), ("a.mp4", 17, 30, "a middle")]
    rows += [("b.mp4", 0, 19, "b early"), ("a.mp4", 30, 45, "a third"), ("z/a.mp4", 0, 16, "another source")]
    listed = pd.DataFrame(rows, columns=["source", f"start_{unit}", f"end_{unit}", "caption"])
    if unit == "time":
        listed[["start_time", "end_time"]] /= 8
    status, captions, reasons = run_caption(clips, listed, tmp_path / "out")
    assert status == 0
    assert captions == {"c1": "a middle", "c3": "b early", "c4": "b late"}
    assert reasons == {
        "c0": "no caption's span holds its middle",
        "c2": "reaches over several captioned spans (rows 2, 5 of the list)",
    }


def test_caption_again_does_nothing(clips: Path, tmp_path: Path) -> None:
    listed = pd.DataFrame({"id": ["c0", "c1"], "caption": ["zero", "one"]})
    run_caption(clips, listed, tmp_path / "out")
    before = stamps(tmp_path / "out")
    run_caption(clips, listed, tmp_path / "out")
    assert stamps(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["c0"]}, "column caption missing"),
        ({"caption": ["x"]}, "expected the columns id, or source with"),
        ({"source": ["a.mp4"], "start_time": [0], "caption": ["x"]}, "expected the columns id, or source with"),
        ({"id": ["c0", "c0"], "caption": ["x", "y"]}, "rows 1 and 2 give id 'c0' different captions"),
        ({"id": ["zz"], "caption": ["x"]}, "no clip found its caption"),
        (
            {"source": ["a.mp4"], "start_frame": ["x"], "end_frame": [3], "caption": ["y"]},
            "row 1: start_frame, end_frame",
        ),
        ({"source": ["a.mp4"], "start_frame": [9], "end_frame": [3], "caption": ["y"]}, "row 1: start_frame 9"),
    ],
)
def test_caption_mistakes(
    clips: Path, tmp_path: Path, columns: dict[str, list], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, captions, _ = run_caption(clips, pd.DataFrame(columns), tmp_path / "out")
    assert (status, captions) == (2, {})
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("error: ") and errors.count("\n") == 1


def test_caption_will_not_overwrite_its_input(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = clips.read_bytes()
    pd.DataFrame({"id": ["c0"], "caption": ["x"]}).to_csv(clips.parent / "list.csv")
    assert caption.main([str(clips), "--sidecar", str(clips.parent / "list.csv"), "--out", str(clips.parent)]) == 2
    assert "the manifest's own folder" in capsys.readouterr().err
    assert clips.read_bytes() == content


def test_what_an_earlier_release_made_stays(footage: Path, tmp_path: Path) -> None:
    """It knew files by place, size and time of change, and their contents by another digest: clips keep their ids."""
    out, source = tmp_path / "out", footage / "one, 'two'.MP4"
    options = asdict(Options(detector="shots", threshold=None, min_frames=8, max_frames=0, crf=18))
    how = blake2b(json.dumps([METHOD, options]).encode(), digest_size=4).hexdigest()
    status = source.stat()
    told = f"-{how} {source} {status.st_size} {status.st_mtime_ns}"
    key, name = blake2b(told.encode(), digest_size=12).hexdigest(), f"0123456789abcdef-{how}"
    row = {"id": "0123456789abcdef-000000-000014", "path": "0123456789abcdef-000000-000014.mp4", "caption": "",
           "num_frames": 14, "fps": 12.0, "height": 64, "width": 64, "start_frame": 0, "end_frame": 14}  # fmt: skip
    for folder, file, record in (
        ("files", key, {"digest": name}),
        ("sources", name, {"clips": [row], "rejects": []}),
    ):
        (out / folder).mkdir(parents=True)
        (out / folder / f"{file}.json").write_text(json.dumps(record))
    (out / "clips").mkdir()
    film(out / "clips" / row["path"], [(40, 14)])
    assert split.main([str(footage), "--out", str(out)]) == 0
    clips = read_manifest(out / "manifest.parquet", need_captions=False)
    assert clips["id"].tolist()[0] == row["id"] and set(clips["source"][1:]) == {"sub/-dash 视频.mp4"}
    (out / "clips" / row["path"]).unlink()  # a clip that is lost is not believed
    assert split.main([str(footage), "--out", str(out)]) == 0
    assert len(read_manifest(out / "manifest.parquet", need_captions=False)) == 5
