"""The preview: it shows what training reads, its figures are the dry run's, and what others wrote stays text."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from data_tools import preview
from opensora_repro.config import Config, DataConfig, load_config
from opensora_repro.data.buckets import global_batch_sizes
from opensora_repro.data.dataset import Clip, ClipDataset
from opensora_repro.data.manifest import MANIFEST, read_manifest
from opensora_repro.data.preview.samples import make_sample
from opensora_repro.data.write import write_png, write_video
from opensora_repro.training.preflight import clips
from tests.frames import write_manifest
from tests.tiny_models import make_tiny_text

BUCKETS = (
    '[{num_frames = 4, resolution = "48x48", ratios = ["1:1", "16:9"], keep = 0.5},'
    ' {num_frames = 4, resolution = "24x24", ratios = ["1:1", "16:9", "9:16"]},'
    ' {num_frames = 1, resolution = "24x24", batch_size = 3, keep = 0.5}]'
)
NASTY = "</small><script>alert(1)</script> \u202e'\""


def gradient(frames: int, height: int, width: int) -> np.ndarray:
    """Every place and frame has a colour of its own."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 0] = np.linspace(0, 255, width)[None, None]
    video[..., 1] = np.linspace(0, 255, height)[None, :, None]
    video[..., 2] = np.linspace(40, 220, frames)[:, None, None]
    return video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide and square clips, a picture, one too short, one too small, one damaged, one that is not there."""
    root = tmp_path_factory.mktemp("preview")
    make_tiny_text(root / "text")
    rows: list[dict[str, Any]] = []

    def add(name: str, frames: int, height: int, width: int, **more: Any) -> None:
        path = root / f"{len(rows)}.{'png' if frames == 1 else 'mp4'}"
        if frames == 1:
            write_png(path, gradient(1, height, width)[0])
        else:
            write_video(path, gradient(frames, height, width), 12)
        rows.append({
            "id": name, "path": path.name, "caption": "a red circle", "num_frames": frames, "fps": 12.0,
            "height": height, "width": width, **more,
        })  # fmt: skip

    for i in range(8):
        add(f"wide {i}", 12, 64, 128, caption="one two three forty six" if i % 2 else f"clip {NASTY}")
        add(f"square {i}", 12, 64, 64)
    for i in range(4):
        add(f"{NASTY} {i}", 1, 40, 60)
    add("short", 4, 64, 64)
    add("small", 12, 16, 16)
    add("damaged", 12, 48, 26)
    (root / rows[-1]["path"]).write_bytes(b"no video at all")
    rows.append({**rows[0], "id": "gone", "path": "gone.mp4"})
    write_manifest(pd.DataFrame(rows), root / "manifest.parquet")
    (root / "empty.toml").touch()
    return root


def overrides(folder: Path, buckets: str = BUCKETS) -> list[str]:
    return [
        f"text.path={folder / 'text'}", "model.model_max_length=20", "data.frame_interval=2", "run.seed=3",
        "train.batch_size=2", *([f"data.buckets={buckets}"] if buckets else ["data.num_frames=6", "data.height=32"]),
    ]  # fmt: skip


def run(folder: Path, out: Path, *given: str) -> int:
    options = ["--config", str(folder / "empty.toml"), "--out", str(out), "--workers", "1", "--samples", "2"]
    return preview.main([str(folder / "manifest.parquet"), *options, *given])


def text_of(markup: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", markup).split())


def table_of(source: str) -> list[list[str]]:
    """The bucket's cells, as the dry run's lines have them."""
    found = re.findall(r"<tr><th><a href[^>]*>([^<]*)</a></th>(.*?)</tr>", source)
    return [[*name.split(), *text_of(cells).split()] for name, cells in found]


def dry_run(cfg: Config, manifest: Path) -> list[list[str]]:
    lines = list(clips(cfg, read_manifest(manifest), "clips of", "m", global_batch_sizes(cfg, 1), here=True))
    start = next(i for i, line in enumerate(lines) if line.split()[0] == "bucket")
    return [line.split() for line in lines[start + 1 :] if line.split()[1] == "x"]


def test_the_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path, *overrides(folder)) == 0
    said = capsys.readouterr()
    source = (tmp_path / "preview.html").read_text(encoding="utf-8")
    told = text_of(source)

    cfg = load_config(folder / "empty.toml", overrides(folder))
    rows = table_of(source)
    assert len(rows) == 6 and rows == dry_run(cfg, folder / "manifest.parquet")
    headings = re.findall(r'<h3 id="bucket-\d+">([^<]*)</h3>', source)
    assert headings == [" ".join(row[:3]) for row in rows]

    assert "one two three fort<s>y six</s>" in source
    for name, count in (("missing", 1), ("too short", 1), ("too small", 1), ("not kept", 2)):
        assert f"<h3>{name}: {count}</h3>" in source
    assert "gone.mp4" in told and "no picture: no such file" in told
    assert len(re.findall("<svg ", source)) == 4

    assert "<script" not in source and "\u202e" not in source and "\\u202e" in source
    assert "default-src 'none'" in source and not re.search(r"url\(|@import|://|\bon\w+=", source)

    damaged = "cannot be decoded"
    assert f"cannot be read: {damaged}" in told and "1 of them cannot be read" in said.out
    (warning,) = (line for line in said.err.splitlines() if line.startswith("warning: "))
    assert damaged in warning

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.html")}
    assert run(folder, tmp_path, *overrides(folder)) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.html")} == before


def test_samples_are_those_of_training(folder: Path) -> None:
    """In pixels, but for JPEG: the frames, and the part of the whole picture that is bright."""
    table, shape = read_manifest(folder / "manifest.parquet"), (4, 32, 48)
    cfg = DataConfig(frame_interval=2)
    flipped = set()
    for index in (0, 2, 4, 6):
        row = {name: table[name][index].as_py() for name in MANIFEST}
        found = make_sample({"row": row, "shape": shape, "data": {"frame_interval": 2}, "seed": 3})
        sample = ClipDataset(table, cfg, 3).load(0, index, shape)
        assert isinstance(sample, Clip)
        flipped.add(found["flipped"])
        assert (found["first"], found["last"]) == (sample.indices[0], sample.indices[0] + 6)
        shown, expected = picture(found["frames"]), np.concatenate(list(sample.pixels.numpy()), axis=1)
        assert np.abs(shown - expected).mean() < 3
        whole, (top, left) = picture(found["whole"]), sample.corner
        assert whole.shape == (32, 64, 3) and found["cut"] == 0.25 and found["scale"] == 0.5
        kept = sample.pixels[0].numpy()[:, ::-1] if sample.flipped else sample.pixels[0].numpy()
        inside = whole[top + 6 : top + 26, left + 6 : left + 42]
        assert np.abs(inside - kept[6:26, 6:42]).mean() < 5
        assert inside.mean() > 2 * np.delete(whole, range(left, left + 48), axis=1).mean()
    assert flipped == {False, True}


def test_a_packed_run_by_time(folder: Path, tmp_path: Path) -> None:
    """Figures are the dry run's; clips of 12 frames a second show each frame twice."""
    given = ["data.fps=24", "data.frame_interval=1", "data.packing_tokens=4096", f"text.path={tmp_path / 'gone'}"]
    given = [*overrides(folder, '[{num_frames = 8, resolution = "48x48"}]'), *given]
    assert run(folder, tmp_path, *given) == 0
    source = (tmp_path / "preview.html").read_text(encoding="utf-8")
    cfg = load_config(folder / "empty.toml", given)
    assert table_of(source) == dry_run(cfg, folder / "manifest.parquet")
    assert "taken at 24 fps" in source and "4 of them come again" in source
    assert "<h3>frames at data.fps = 24</h3>" in source and "so that frames repeat and motion halts" in source


def picture(found: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found["jpeg"])))).astype(int)


def test_one_size_and_no_text_encoder(folder: Path, tmp_path: Path) -> None:
    """Captions stand whole, and the page says why."""
    assert run(folder, tmp_path, *overrides(folder, ""), "data.width=48", f"text.path={tmp_path / 'gone'}") == 0
    source = (tmp_path / "preview.html").read_text(encoding="utf-8")
    assert [row[:3] for row in table_of(source)] == [["6", "x", "32x48"]]
    assert f"how far it reads them: text.path={tmp_path / 'gone'}: no such folder" in source
    assert "<h3>too short: 5</h3>" in source and "too small" not in source and "not kept" not in source


def test_where_no_clip_can_be_used_the_page_tells_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = '[{num_frames = 4, resolution = "1080p"}]'
    assert run(folder, tmp_path, *overrides(folder, huge), "text.path=gone/text") == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "none of the 24 clips can be used" in line
    assert "too small: 18" in (tmp_path / "preview.html").read_text(encoding="utf-8")


def test_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, config = str(folder / "manifest.parquet"), str(folder / "empty.toml")
    for options, message in (
        (["gone.parquet", "--config", config], "gone.parquet"),
        ([manifest, "--config", "gone.toml"], "config gone.toml: cannot be read"),
        ([manifest, "data.heigth=3", "--config", config], "did you mean data.height"),
        ([manifest, "--config", config, "--samples", "0"], "--samples 0: expected at least 1"),
    ):
        assert preview.main([*options, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
