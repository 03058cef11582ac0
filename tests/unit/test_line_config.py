"""The file that describes a line of tools: every mistake is one line, found before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_tools import __main__ as options
from data_tools import pipeline

GOOD = """
input = "videos"
out = "made"
[run]
workers = 3
[probe]
decode = true
[split]
min_frames = 4
threshold = 2
fps = 24
audio = false
workers = 1
[filter]
percentile = "motion >= 10%"
keep = ["motion > 0.5", "not duplicate"]
[filter-late]
keep = "duration > 1"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "line.toml"
    path.write_text(GOOD, encoding="utf-8")
    return path


def test_keys_become_options_in_order(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([str(config), "split.crf=20", "--dry-run", "--out", "else where"]) == 0
    probe, split, early, late, _ = capsys.readouterr().out.splitlines()
    assert probe == "to do: python -m data_tools.probe --decode --workers=3 '--out=else where/probe' -- videos"
    assert split.split(" -m ")[1] == (
        "data_tools.split --min-frames=4 --threshold=2 --fps=24 --crf=20 --workers=1 '--out=else where/split' --"
        " 'else where/probe/manifest.parquet'"
    )
    assert "'--percentile=motion >= 10%' '--keep=motion > 0.5' '--keep=not duplicate'" in early
    assert "data_tools.filter '--keep=duration > 1' '--out=else where/filter-late'" in late
    assert late.endswith("-- 'else where/filter/manifest.parquet'")


def test_the_ready_config(repo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main([str(repo_dir / "configs/data/pipeline.toml"), "--dry-run"]) == 0
    tools = [line.split("data_tools.")[1].split()[0] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert tools == ["probe", "split", "score", "filter"]


def test_what_convert_makes_of_addresses_is_downloaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(
        "input = 'panda.csv'\nout = 'o'\n[run]\nworkers = 0\n[convert]\nfrom = 'panda70m'\n[download]\n[split]\n"
    )
    assert pipeline.main([str(tmp_path / "c.toml"), "--dry-run"]) == 0
    first, second, third, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("data_tools.convert --from=panda70m --out=o/convert -- panda.csv")
    assert second.endswith("data_tools.download --out=o/download -- o/convert/urls.parquet")
    assert third.endswith("-- o/download/manifest.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[splt]\nmin_frames = 4", "unknown section [splt]; did you mean [split]?"),
        ("[run-2]", "unknown section [run-2]"),
        ('["filter-../x"]', "unknown section [filter-../x]"),
        ("[score]\nscors = 'all'", "[score]: unknown key scors; did you mean scores?"),
        ("[score]\nout = 'x'", "[score]: unknown key out"),
        ("[score]\ninput = 'x'", "[score]: unknown key input"),
        ("[score]\nbatch_size = 'x'", "[score]: batch_size = 'x': expected a whole number"),
        ("[score]\nbatch_size = true", "[score]: batch_size = true: expected a whole number"),
        ("[score]\nbatch_size = 0", "[score]: --batch-size 0: expected at least 1"),
        ("[score]\nscores = ['motion']", "[score]: scores = ['motion']: expected text"),
        ("[score]\nscores = 'motoin'", "no score 'motoin'"),
        ("[score]\nrunner = 'rey'", "expected one of local, ray; did you mean ray?"),
        ("[caption]", "[caption]: "),
        ("[filter-3]", "[filter-3]: no rule given"),
        ("[filter-3]\nkeep = 'motion >'", "[filter-3]: 'motion >': not an expression"),
        ("[filter-3]\nkeep = 3\npercentile = 'motion > 200%'", "[filter-3]: --percentile 'motion > 200%'"),
        ("[report]\nclip = 3", "[report]: unknown key clip; did you mean clips?"),
        ("[report]\nclips = -3", "[report]: --clips -3"),
        ("[score", "not valid TOML"),
    ],
)
def test_mistakes_in_the_file(
    config: Path, change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(f"{GOOD}\n{change}\n", encoding="utf-8")
    assert pipeline.main([str(config), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["split.min_frame=3"], "[split]: unknown key min_frame; did you mean min_frames?"),
        (["spilt.min_frames=3"], "the config has no section [spilt]; did you mean split.min_frames?"),
        (["probe.decode=3"], "[probe]: decode = 3: expected true or false"),
        (["probe.decode"], "expected section.key=value"),
        (["decode=1"], "expected section.key=value"),
        (["input="], "input = '': expected a path"),
        (["run.workers=-1"], "--workers -1: expected"),
        (["run.adress=auto"], "[run]: unknown key adress; did you mean address?"),
        (["split.min_frames=9", "split.max_frames=8"], "--max-frames 8: expected"),
    ],
)
def test_mistakes_in_overrides(
    config: Path, changes: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main([str(config), *changes, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_every_tool_can_stand_in_a_line() -> None:
    for name, tool in pipeline.find_tools().items():
        assert tool.build_parser().prog == f"data_tools.{name}"


def test_the_page_of_options_is_that_of_the_tools(repo_dir: Path) -> None:
    page = (repo_dir / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == options.page(), "renew it: make configs"
    assert "| `--min-frames N` | drop shorter scenes, counted as they are written (8) |" in page
    assert 'sharpness >= 10%"' in page and "| `--decode` | also decode every frame |" in page
