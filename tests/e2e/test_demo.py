"""The demo end to end, a few steps of each stage: real files in, real files and a report out."""

import json
import subprocess
from pathlib import Path

import av
import pytest

from opensora_repro.demo.shapes import motions
from stages.demo import STILLS_A_CLIP
from tests.frames import read_manifest
from tests.preloaded_python import preloaded_python

TINY = [
    "train.steps=2", "optim.warmup_steps=0", "optim.decay_steps=0", "train.batch_size=2", "checkpoint.every=2",
    "validation.every=2", "validation.max_samples=2", "sample.every=2", "sample.steps=2",
    'sample.prompts=["a red square moving left"]', "data.num_workers=0", "data.cache=",
]  # fmt: skip


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    with preloaded_python(tmp_path_factory.mktemp("python")) as program:
        yield program


def demo(python, root, *extra):
    command = [python, "-m", "stages.demo", "--dir", str(root), "--videos", "1", "--hq-videos", "1"]
    return subprocess.run([*command, "--prompts", "2", "--given", "1", *extra, *TINY], capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(python, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    done = demo(python, root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root, done.stdout


def test_it_leaves_checkpoints_videos_and_a_report(finished):
    root, printed = finished
    for stage in ("stage1", "stage2", "stage3"):
        assert (root / stage / "checkpoints" / "step-00000002" / "ema.safetensors").exists()
    for name, size in {"1x1": (96, 96), "3x2": (96, 64), "2x3": (64, 96)}.items():
        files = sorted((root / "samples" / name).glob("*.mp4"))
        assert [f.name for f in files] == ["0000.mp4", "0001.mp4", "0002.mp4", "0003.mp4"]
        with av.open(str(files[0])) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == size and sum(1 for _ in container.decode(stream)) == 12
    report = (root / "report.html").read_text()
    assert "report.html" in printed and "never trained" in printed
    assert "<svg" in report and "<video" in report and "http://" not in report.replace("http://www.w3.org", "")
    assert 'href="report/report.html"' in report and (root / "report" / "report.html").exists()
    assert (root / "card.md").exists()
    summary = json.loads((root / "adherence.json").read_text())
    assert [record["task"] for record in summary["given"]] == ["first", "extend", "loop", "join"]
    assert all(Path(record["path"]).exists() for record in summary["given"]) and "joined" in report
    rows = [f"{group} {name}" for group in ("seen", "never trained") for name in ("1:1", "3:2", "2:3")]
    assert list(summary["adherence"]) == rows and len(summary["records"]) == 12
    assert all(row in report for row in rows)


def test_every_cut_is_found_and_every_caption_on_its_clip(finished):
    root, _ = finished
    clips = read_manifest(root / "train.parquet")
    trained = sorted(m.caption for m in motions(held_out=False))
    back = clips["caption"].str.endswith(" and back")
    assert sorted(clips[back]["caption"]) == sorted(m.caption for m in motions(held_out=False, returns=True))
    for size in ((96, 96), (96, 64), (64, 96)):  # of each format one long video, which shows each trained motion once
        own = ~back & (clips["width"] == size[0]) & (clips["height"] == size[1])
        assert sorted(clips[own]["caption"]) == trained
    assert (clips["num_frames"] == 23).all() and (clips["end_frame"] - clips["start_frame"] == 23).all()
    captions = (root / "footage" / "captions.csv").read_text().splitlines()[1:]
    listed = {tuple(line.split(",")) for line in captions}
    for row in clips.to_dict("records"):
        name = row["source"].split("/")[-1]
        assert (name, str(row["start_frame"]), str(row["end_frame"]), row["caption"]) in listed
    square = ~back & (clips["width"] == clips["height"])
    images = read_manifest(root / "stage1.parquet")
    assert len(images) == STILLS_A_CLIP * square.sum() and not images["caption"].str.contains("moving").any()
    best = read_manifest(root / "stage3.parquet")
    assert (best["num_frames"] == 1).sum() == -(-(~back).sum() // 2)  # a still of every other clip, of each format


@pytest.mark.exhaustive  # stages and tools that are run again have tests of their own
def test_run_again_it_trains_nothing_again(python, finished):
    root, _ = finished
    before = (root / "stage2" / "metrics.jsonl").read_bytes()
    assert demo(python, root).returncode == 0
    assert (root / "stage2" / "metrics.jsonl").read_bytes() == before


def test_a_mistake_ends_the_demo_before_anything_is_filmed(python, tmp_path):
    done = demo(python, tmp_path, "model.hiden_size=8")
    assert done.returncode == 2
    assert "hidden_size" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
