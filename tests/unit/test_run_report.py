"""The page about runs: what it shows, that others' words stay words, how large it gets, and how fast it is drawn."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.config import Config, dump_toml
from opensora_repro.report.curves import Series, chart
from opensora_repro.report.page import write_report
from opensora_repro.report.read import read_run, read_runs
from stages import report
from tests.made_runs import make_run


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.tags, self.words = path.read_text(), list[tuple[str, dict[str, Any]]](), list[str]()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = make_run(tmp_path_factory.mktemp("runs") / "one")
    assert report.main([str(run), "--price-per-gpu-hour", "2"]) == 0
    return Page(run / "report.html")


def test_it_tells_what_a_run_has(page: Page) -> None:
    for told in (
        "400 of 400", "stage2_video", "captions", "Evaluation: caption gap", "Held-out loss by noise level",
        "Gradient norm", "Samples a second", "waiting for data", "Learning rate", "0.02 (0.01 to 0.03)", "16 x 256x256",
        "1,990", "2 more buckets get no clip", "8 x NVIDIA H100", "4 x NVIDIA H100", "0" * 64, "data.num_frames",
    ):  # fmt: skip
        assert told in page.text, told
    hours = 0.5 * (200 * 8 + 200 * 4) / 3600  # of the processes that each step had
    assert f"{hours:.3g}" in page.text and f"{2 * hours:.2f} at 2 a device-hour" in page.text
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [attrs["alt"] for attrs in pictures] == ["step 133", "step 266", "step 400"]
    assert len([tag for tag, _ in page.tags if tag == "video"]) == 1


def test_words_of_others_stay_words_and_nothing_is_fetched(page: Page) -> None:
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1 and "onerror" not in str(page.tags)
    assert "<script>alert" in page.text and "‮" not in page.source
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href") if attrs.get(name)]
    assert sources and all(str(source).startswith("data:") for source in sources)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", grids=0, optim={"lr": lr}) for name, lr in (("a", 1e-4), ("b", 2e-4))]
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    text = Page(tmp_path / "out" / "report.html").text
    assert "a/run" in text and "b/run" in text and "optim.lr 0.0001 0.0002" in text
    assert "data.height" in text and "noise level 500 of 1000" in text
    (differing,) = re.findall(r"What differs(.*?)All keys", text)
    assert "optim.lr" in differing and "data.height" not in differing


def test_evaluations_of_checkpoints_side_by_side(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", grids=0)
    rows = [
        {"path": f"run/{n}", "step": n, "metrics": {"frechet": {"value": 12.5, "low": 11, "high": 14}}} for n in (1, 2)
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"manifest": "val.parquet", "checkpoints": rows}))
    assert report.main([str(run), "--evaluation", str(tmp_path / "evaluation.json")]) == 0
    text = Page(run / "report.html").text
    assert "frechet" in text and text.count("12.5 (11 to 14)") == 2 and "val.parquet" in text


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=3, grids=0)
    for arguments, expected in (
        ([str(tmp_path / "none")], "no run lies there"),
        ([str(run), str(run)], "--out: name a folder"),
        ([str(run), "--price-per-gpu-hour", "-1"], "expected 0 or more"),
        ([str(run), "--evaluation", str(run / "config.toml")], "no evaluation.json of stages.evaluate"),
    ):
        assert report.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_half_a_run_has_half_a_page(tmp_path: Path) -> None:
    """Nothing but a config; lines that a kill cut short; steps without a loss."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(dump_toml(Config()))
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert "no step written yet" in Page(tmp_path / "report.html").text
    line = {"step": 1, "loss": None, "grad_norm": None, "lr": 1.0, "seconds": 0.0, "samples": 0, "tokens": 0}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 2, "lo')
    (tmp_path / "run" / "weights.json").write_text("{")
    write_report([tmp_path / "run"], tmp_path / "report.html")
    assert read_run(tmp_path / "run").step == 1


def test_losses_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", grids=0)
    lost = {"step": 400, "loss": None, "losses": [None, 0.5], "timesteps": [200.0, 500.0], "of_trained": None}
    with open(run / "validation.jsonl", "a") as file:
        file.write(json.dumps(lost) + "\n")
    infinite = {"metrics": {"psnr": {"value": 30.0, "low": float("-inf"), "high": float("nan")}}, "name": "a"}
    (run / "evaluation.json").write_text(json.dumps({"checkpoints": [infinite]}))
    assert report.main([str(run)]) == 0
    text = Page(run / "report.html").text
    assert "Held-out loss by noise level" in text and "30 (-inf to nan)" in text


def test_long_runs_are_thinned_out_and_still_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=1000, grids=0)
    whole = read_run(run)
    monkeypatch.setattr("opensora_repro.report.read.MOST_STEPS", 300)
    thin = read_run(run)
    assert (len(thin.steps), thin.stride, thin.step) == (250, 4, 1000)
    assert thin.seconds == pytest.approx(whole.seconds) and thin.device_seconds == pytest.approx(whole.device_seconds)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for name in ("x/1/run", "y/1/run", "y/2/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text("")
    names = [run.name for run in read_runs([tmp_path / "x/1/run", tmp_path / "y/1/run", tmp_path / "y/2/run"])]
    assert names == ["x/1/run", "y/1/run", "y/2/run"]


def test_charts_are_drawn_within_their_frame() -> None:
    drawn = chart("Gradient", [Series("a", [(step, 10.0 ** (step % 4 - 2)) for step in range(1, 100)])], log=True)
    assert drawn is not None
    assert [text for _, text in drawn.values][:2] == ["0.01", "0.1"]
    assert all(drawn.left <= x <= drawn.right and drawn.top <= y <= drawn.bottom for x, y in drawn.series[0].points)
    same = chart("Rate", [Series("a", [(1, 0.5), (2, 0.5)])], marks=[1, 5])
    assert same is not None and same.series[0].points[0][1] == same.series[0].points[1][1] and len(same.marks) == 1
    assert chart("Nothing", [Series("a", [(1, math.nan)])]) is None


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_a_run_in_a_browser(steps: int, tmp_path: Path) -> None:
    """Small enough to be sent, nothing beside the screen, the slider slides; how fast: `tests/made_runs.py`."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser")
    run = make_run(tmp_path / "run", steps=steps, grids=min(40, steps // 25), side=128)
    write_report([run], run / "report.html")
    assert steps < 10_000 or 1_000_000 < (run / "report.html").stat().st_size < 5_000_000
    with playwright.sync_playwright() as started_with:
        browser = started_with.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1200, 390):
            errors: list[str] = []
            tab = browser.new_page(viewport={"width": width, "height": 800})
            tab.on("console", lambda message: errors.append(message.text))  # noqa: B023
            tab.goto((run / "report.html").as_uri(), wait_until="load")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            told = tab.locator(".over output")
            assert told.inner_text() == f"step {steps:,}" and tab.locator(".over img:visible").count() == 1
            tab.locator(".over input").fill("0")
            assert told.inner_text() != f"step {steps:,}" and tab.locator(".over img:visible").count() == 1
            assert not errors
        browser.close()
