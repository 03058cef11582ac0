"""The demo's report: everything inside one file, all text escaped, unfinished runs shown as far as they are."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opensora_repro.config import ConfigError, load_config
from opensora_repro.data.write import write_png, write_video
from opensora_repro.demo import report
from opensora_repro.report.curves import Series, chart, smoothed, ticks
from tests.frames import write_manifest

VOID = {"meta", "img", "br", "path", "circle", "polyline"}
NASTY = 'a <b>"red"</b> & square'


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def sources(self, tag: str) -> list[str]:
        return [attrs["src"] or "" for name, attrs in self.tags if name == tag and "src" in attrs]


def moving_square(frames: int = 8, side: int = 64) -> np.ndarray:
    video = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        video[t, 20:40, 4 + 4 * t : 24 + 4 * t, 0] = 255
    return video


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished demo run in small, with real videos, pictures, metrics and a manifest."""
    root = tmp_path / "demo"
    for number, stage in enumerate(report.STAGES):
        folder = root / stage
        (folder / "samples").mkdir(parents=True)
        lines = [{"step": i, "loss": None if i == 3 else 1 / i, "grad_norm": 1.0} for i in range(1, 50)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 50, "lo')
        (folder / "validation.jsonl").write_text('{"step": 10, "loss": 0.5}\n{"step": 40, "loss": 0.25}\n')
        prompts = json.dumps([NASTY, "second prompt"])
        (folder / "config.toml").write_text(f'[run]\ndir = "x"\n[sample]\nprompts = {prompts}\n')
        for step in (5, 40):
            samples = folder / "samples" / f"step-{step:08d}"
            write_png(samples / "grid.png", moving_square()[number])
            for i in range(2):
                if stage == "stage1":
                    write_png(samples / f"{i:04d}.png", moving_square()[i])
                else:
                    write_video(samples / f"{i:04d}.mp4", moving_square(), 8)
    rows = []
    for i in range(3):
        path = root / "clips" / f"{i}.mp4"
        write_video(path, moving_square(), 8)
        rows.append(
            {"id": str(i), "path": str(path), "caption": f"{NASTY} {i}", "num_frames": 8, "fps": 8.0, "height": 64,
             "width": 64, "source": "film/long_0.mp4", "start_frame": 8 * i, "end_frame": 8 * i + 8,
             "start_time": 1.0 * i, "end_time": 1.0 * i + 1, "resplit": False}
        )  # fmt: skip
    write_manifest(pd.DataFrame(rows), root / "train.parquet")
    return root


def summary(run: Path) -> dict[str, Any]:
    path = run / "clips" / "0.mp4"
    good = {"colour": "red", "shape": "square", "direction": "right"}
    records = [
        {"group": "seen", "format": "1:1", "caption": "a red square moving right", "path": str(path),
         "seen": good, "agrees": dict.fromkeys(good, True)},
        {"group": "never trained", "format": "3:2", "caption": NASTY, "path": str(path),
         "seen": {**good, "shape": None}, "agrees": {"colour": True, "shape": False, "direction": True}},
    ]  # fmt: skip
    table = {
        "seen 1:1": {"colour": 1.0, "shape": 1.0, "direction": 1.0},
        "never trained 3:2": {"colour": 1.0, "shape": 0.875, "direction": 1.0},
    }
    return {"adherence": table, "records": records, "seconds": {"data": 30.0, "stage1": 90.0}}


def test_a_colour_that_an_adapter_taught_is_a_row_of_the_table(run: Path, tmp_path: Path) -> None:
    taught = {"white": {"colour": 0.75, "shape": 1.0, "direction": 1.0}}
    report.write_report(run, tmp_path / "report.html", title="t", summary=summary(run) | {"seventh": taught})
    page = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "with an adapter: white" in page.text and "0.75" in page.text


def test_a_finished_run_is_shown_whole(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.html"
    report.write_report(run, out, title="Three <stages>", summary=summary(run))
    text = out.read_text(encoding="utf-8")
    page = Reader(text)
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    assert "Three <stages>" in page.text
    assert "2.0 minutes on this machine (data 0.5, stage1 1.5)" in page.text
    assert "0.88" in page.text
    assert "1 long video, cut into 3 clips" in page.text
    assert page.text.count("After step 40:") == 3
    assert "frames 8 to 16" in page.text
    assert "as asked" in page.text
    assert page.text.count("never trained 3:2") == 2  # the table's row, the gallery's part
    assert "shape: none seen" in page.text
    assert sum(tag == "polyline" for tag, _ in page.tags) == 3
    assert sum(tag == "circle" for tag, _ in page.tags) == 6
    assert len(page.sources("video")) == 2 * 2 + 2
    assert len(page.sources("img")) == 2 + 3  # stage 1's pictures, three clips


def test_nothing_is_fetched_and_media_are_the_files(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.write_report(run, out, title="t", summary=summary(run))
    text = out.read_text(encoding="utf-8")
    page = Reader(text)
    assert not {"link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|file:", text)
    for tag, kind in (("img", "data:image/"), ("video", "data:video/mp4;base64,")):
        assert all(source.startswith(kind) for source in page.sources(tag))
    video = page.sources("video")[-1].split(",", 1)[1]
    assert base64.b64decode(video) == (run / "clips" / "0.mp4").read_bytes()
    assert out.stat().st_size < report.MAX_BYTES


def test_captions_are_text_not_markup(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.write_report(run, out, title="t", summary=summary(run))
    page = Reader(out.read_text(encoding="utf-8"))
    assert page.text.count(NASTY) == 3 + 3 + 1  # the stages' samples, the clips, the gallery
    assert not any(name == "b" and not attrs for name, attrs in page.tags)


def test_an_empty_run_says_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.write_report(tmp_path, out, title="t", summary={})
    page = Reader(out.read_text(encoding="utf-8"))
    for line in (
        "not measured yet",
        "no step written yet",
        "no clips yet",
        "no samples written yet",
        "nothing sampled",
    ):
        assert line in page.text


def test_missing_and_too_large_videos_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = summary(run)
    given["records"][0]["path"] = str(run / "gone.mp4")
    monkeypatch.setattr(report, "MAX_BYTES", 1_000_100)
    out = tmp_path / "report.html"
    report.write_report(run, out, title="t", summary=given)
    page = Reader(out.read_text(encoding="utf-8"))
    assert page.sources("video") == []
    assert "gone.mp4: file is missing" in page.text
    assert "0.mp4: left out, the page would grow too large" in page.text


def test_curve_keeps_to_its_frame() -> None:
    points = [(float(i), 100.0 if i == 1 else 1 / i) for i in range(1, 1001)]
    lines = [Series("training", [*points, (1001.0, float("nan"))]), Series("held out", [(500.0, 0.5)], dots=True)]
    curve = chart("loss", lines, from_zero=True)
    assert curve is not None
    numbers, dots = (line.points for line in curve.series)
    assert 100 < len(numbers) <= 240
    assert all(0 <= x <= 360 and 0 <= y <= 220 for x, y in numbers)
    assert numbers[-1][1] > numbers[1][1]  # a smaller loss is lower on the page
    assert len(dots) == 1
    assert smoothed([(1.0, 2.0), (3.0, 4.0)], count=1) == [(2.0, 3.0)]
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert ticks(0, 1200) == [0, 500, 1000]
    assert chart("loss", [Series("training", [])]) is None


def test_the_fixture_config_is_one_the_stages_read(run: Path) -> None:
    assert load_config(run / "stage1" / "config.toml").sample.prompts == (NASTY, "second prompt")
    with pytest.raises(ConfigError):
        load_config(run / "stage9" / "config.toml")
