"""A whole line of tools from one file: what comes out, what a second run does, and what a killed one leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from data_tools import pipeline
from opensora_repro.data.jobs.records import RECORDS_FILE
from opensora_repro.data.pipeline.config import load_line
from opensora_repro.data.write import write_video
from tests.chat_server import ChatServer, brightness, chat_server, completion, error
from tests.e2e.test_data_tools import film, stamps
from tests.frames import read_manifest, read_table
from tests.job_records import recorded
from tests.job_works import plan_here
from tests.tiny_captioners import make_tiny_blip2
from tests.tiny_models import make_tiny_clip

if TYPE_CHECKING:
    from opensora_repro.data.jobs.cluster import Place, Resources
    from opensora_repro.data.jobs.rows import Order

BAD = ("zero_bytes.mp4", "audio_only.mp4", "text_renamed.mp4", "trunc_mdat_half.mp4", "directory.mp4")
SIDE = 32  # pixels
CONFIG = """
input = {input!r}
out = "unset"
[run]
workers = 1
[probe]
[split]
min_frames = 6
preset = "ultrafast"
[score]
scores = "brightness,duplicates"
[filter]
keep = ["brightness > 0.05", "not duplicate"]
thumbnails = 1
[caption]
sidecar = {sidecar!r}
[filter-words]
keep = "len(caption) > 3"
[report]
clips = 2
"""


@pytest.fixture(scope="module")
def config(videos_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line over three films, one of them twice, a black one, and files that are none."""
    root = tmp_path_factory.mktemp("line")
    folder = root / "in"
    (folder / "sub").mkdir(parents=True)
    film(folder / "a, 'b'.mp4", [(40, 12), (200, 12), (90, 4)], SIDE)
    film(folder / "sub" / "-dash 视频.mp4", [(150, 12), (70, 12)], SIDE)
    shutil.copy(folder / "a, 'b'.mp4", folder / "twin.mp4")
    write_video(folder / "black.mp4", np.zeros((9, SIDE, SIDE, 3), np.uint8), 12)
    for name in BAD:
        assert (videos_dir / "bad" / name).exists(), name
        (folder / name).symlink_to(videos_dir / "bad" / name)
    captions(root, "a film")
    path = root / "line.toml"
    path.write_text(CONFIG.format(input=str(folder), sidecar=str(root / "captions.csv")), encoding="utf-8")
    return path


def captions(root: Path, text: str) -> None:
    names = ["a, 'b'.mp4", "sub/-dash 视频.mp4", "new.mp4"]
    rows = [{"source": n, "start_time": 0, "end_time": 99, "caption": f"{text} <{i}>"} for i, n in enumerate(names)]
    pd.DataFrame(rows).to_csv(root / "captions.csv", index=False)
    os.utime(root / "captions.csv", (0, 0))  # put back, it is the file that it was


@pytest.fixture(scope="module")
def made(config: Path) -> Path:
    """The line, run once; tests that change it take a copy."""
    out = config.parent / "out"
    assert pipeline.main([str(config), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy beside it, so that the inputs' relative paths stay as they are."""
    return Path(shutil.copytree(made, made.with_name(tmp_path.name)))


def same_table(one: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(read_table(one), read_table(other), check_exact=True)


def done_again(said: str) -> list[str]:
    """Return the steps that a run did, of those that can be passed over."""
    titles = [line for line in said.splitlines() if line.startswith("[")]
    return [line.split()[1] for line in titles if not line.endswith("done before")]


def test_the_whole_line(config: Path, made: Path) -> None:
    table = read_manifest(made / "manifest.parquet")
    assert table["source"].tolist() == ["a, 'b'.mp4"] * 2 + ["sub/-dash 视频.mp4"] * 2
    assert table["caption"].tolist() == ["a film <0>"] * 2 + ["a film <1>"] * 2
    assert table["id"].is_unique
    assert table["num_frames"].tolist() == [12] * 4
    assert (table["end_frame"] - table["start_frame"]).tolist() == [12] * 4
    assert {"start_time", "end_time", "resplit", "brightness"} <= set(table.columns)
    assert all(Path(path).is_file() for path in table["path"])
    assert read_table(made / "manifest.parquet")["path"].str.startswith("split/clips/").all()
    rejects = read_table(made / "rejects.parquet")
    assert list(rejects.columns) == ["id", "path", "source", "stage", "reason", "start_frame", "end_frame"]
    assert rejects.notna()[["id", "stage", "reason"]].all(axis=None)
    assert rejects["stage"].value_counts().to_dict() == {"probe": len(BAD), "split": 2, "filter": 1}
    black = read_table(made / "score/manifest.parquet").set_index("id")["source"].eq("black.mp4")
    assert rejects.loc[rejects["stage"] == "filter", "id"].tolist() == black.index[black].tolist()
    inputs = {p.relative_to(config.parent / "in").as_posix() for p in (config.parent / "in").rglob("*.mp4")}
    assert set(table["source"]) | set(rejects["source"].dropna()) | {"black.mp4"} == inputs
    page = (made / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2
    assert "a film &lt;" in page and "same content as …" not in page


def test_a_second_run_does_nothing(config: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(made)
    assert pipeline.main([str(config), "--out", str(made), "run.workers=2"]) == 0
    assert stamps(made) == before
    assert done_again(capsys.readouterr().out) == ["probe"]
    assert pipeline.main([str(config), f"out={made}", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == ["looks for new input", *["done"] * 5]
    assert stamps(made) == before


def test_what_changed_is_done_again(config: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = [str(config), "--out", str(copied), "report.clips=0"]
    assert pipeline.main([*run, "filter.keep=brightness > 0.3"]) == 0
    assert done_again(capsys.readouterr().out) == ["probe", "filter", "caption", "filter-words"]
    assert read_table(copied / "manifest.parquet")["brightness"].min() > 0.3
    captions(config.parent, "another")
    try:
        assert pipeline.main(run) == 0
    finally:
        captions(config.parent, "a film")
    assert read_table(copied / "manifest.parquet")["caption"].tolist()[0] == "another <0>"
    capsys.readouterr()
    lost = next((copied / "split" / "clips").glob("*.mp4"))
    lost.unlink()
    assert pipeline.main([*run, "split.min_frames=6"]) == 0
    assert done_again(capsys.readouterr().out)[:2] == ["probe", "split"]
    assert lost.is_file()
    same_table(copied / "manifest.parquet", config.parent / "out/manifest.parquet")


def test_options_changed_and_changed_back(config: Path, copied: Path) -> None:
    """A clip keeps its name whatever the options: what was made with others must not pass for these."""
    run = [str(config), "--out", str(copied), "report.clips=0"]
    before = {p.name: p for p in (config.parent / "out/split/clips").iterdir()}
    assert pipeline.main([*run, "split.short_side=16"]) == 0
    assert set(read_table(copied / "manifest.parquet")["height"]) == {16}
    assert pipeline.main(run) == 0
    same_table(copied / "manifest.parquet", config.parent / "out/manifest.parquet")
    assert all((copied / "split/clips" / name).read_bytes() == path.read_bytes() for name, path in before.items())


def test_a_new_file_joins_the_others(config: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = config.parent / "in" / "new.mp4"
    film(new, [(120, 14)], SIDE)
    before = {p.name: p.stat().st_mtime_ns for p in (copied / "split/clips").iterdir()}
    try:
        assert pipeline.main([str(config), "--out", str(copied), "report.clips=0"]) == 0
    finally:
        new.unlink()
    assert "new.mp4" in set(read_table(copied / "manifest.parquet")["source"])
    after = {p.name: p.stat().st_mtime_ns for p in (copied / "split/clips").iterdir()}
    assert len(after) == len(before) + 1 and before.items() <= after.items()


def test_killed_at_several_moments(config: Path, made: Path, repo_dir: Path) -> None:
    out = made.with_name("killed")
    moments: list[Callable[[], object]] = [
        lambda: recorded(out / "probe", "files"),
        lambda: list(out.glob("split/clips/*")),  # a clip, or a part of one
        lambda: recorded(out / "score", "scores"),
    ]
    command = [sys.executable, "-m", "data_tools.pipeline", str(config), "--out", str(out)]
    for moment in moments:
        with subprocess.Popen(command, cwd=repo_dir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while not moment() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            assert process.poll() is None, "it ended before it was killed"
            os.kill(process.pid, signal.SIGKILL)
        assert not (out / "manifest.parquet").exists()
    assert pipeline.main([str(config), "--out", str(out)]) == 0
    ours, theirs = ({n: s[1] for n, s in stamps(folder).items()} for folder in (out, made))
    assert ours.keys() == theirs.keys() and any(name.endswith(".mp4") for name in ours)
    for name in ours:
        assert ours[name] == theirs[name] or Path(name).name == RECORDS_FILE, name


def test_a_step_that_fails_is_named_and_the_page_tells_why(
    config: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [str(config), "--out", str(copied), "report.clips=0"]
    assert pipeline.main([*run, "filter.keep=brightness > 2"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: [filter] failed (exit status 2); the same command goes on there; the manifest")
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert "brightness &gt; 2" in page and "filter-words" not in page
    assert pipeline.main(run) == 0
    assert "filter-words" in (copied / "report.html").read_text(encoding="utf-8")
    assert pipeline.main([*run, "filter.keep=brigtness > 2"]) == 2
    assert "did you mean brightness?" in capsys.readouterr().err
    assert "brightness &gt; 0.05" not in (copied / "report.html").read_text(encoding="utf-8")


def test_nothing_readable_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("no video")
    (tmp_path / "c.toml").write_text(f"input = '{tmp_path / 'in'}'\nout = '{tmp_path / 'out'}'\n[probe]\n[split]\n")
    assert pipeline.main([str(tmp_path / "c.toml"), "run.workers=1"]) == 2
    assert "error: [probe] failed (exit status 2)" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.parquet").exists()
    assert "a.mp4" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_output_may_not_lie_in_the_input(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (config.parent / "in", config.parent / "in" / "sub" / "out"):
        assert pipeline.main([str(config), "--out", str(out)]) == 2
        assert "lies in the input folder" in capsys.readouterr().err
        assert not (out / "probe").exists()


def test_over_a_cluster_rows_go_on_at_once(
    config: Path, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each source is probed, split and scored before the next; killed after some, the rest is done, and once."""
    pytest.importorskip("ray")
    out, counts, dies = made.with_name("over-ray"), list[list[list[int]]](), [True]
    rule = "filter.keep=brightness > 0.05"

    def plan(order: Order, count: int, resources: Resources, place: Place) -> Iterator[Any]:
        assert order.then is not None  # the tools have nothing left for plans of their own
        for found in plan_here(order, count, resources, place):
            counts.append(found["counts"])
            yield found
            if dies[0] and counts[-1][3][0]:
                raise OSError("the end of the command")

    for module in ("line", "stream"):
        monkeypatch.setattr(f"opensora_repro.data.jobs.{module}.run_plan", plan)
    run = [str(config), "--out", str(out), "run.runner=ray", rule]
    assert pipeline.main(run) == 1
    assert not (out / "probe" / "manifest.parquet").exists() and any(out.glob("split/clips/*.mp4"))
    assert (
        sum(steps[0][0] for steps in counts) < 4 + len(BAD)
        and "split, score, filter: row by row" in capsys.readouterr().out
    )
    dies.clear()
    dies.append(False)
    assert pipeline.main(run) == 0
    sums = np.sum(counts, axis=0).tolist()
    assert sums == [[4 + len(BAD), len(BAD)], [4, 0], [5, 0], [7, 1]]  # a twin has its clips filtered, too
    for name in ("probe", "split", "score", "filter", "."):
        same_table(out / name / "manifest.parquet", made / name / "manifest.parquet")
        same_table(out / name / "rejects.parquet", made / name / "rejects.parquet")
    before = len(counts)
    assert pipeline.main(run) == 0 and len(counts) == before


ASKED = """
[run]
workers = 1
[probe]
[split]
min_frames = 6
preset = "ultrafast"
[score]
scores = "brightness"
[filter]
keep = "brightness > 0.05"
[caption]
endpoint = "{url}"
endpoint_model = "m"
[filter-words]
keep = "contains(caption, 'a film')"
"""


def one_by_one(path: Path, out: Path) -> None:
    """Run the tools of a line as their own commands."""
    tools = pipeline.find_tools()
    known = {name: tool.Arguments for name, tool in tools.items()}
    line = load_line(path, [], known, pipeline.report.Arguments, out=str(out))
    for step, given, folder in pipeline.places(line):
        assert tools[step.tool].main(pipeline.command_of(step, given, folder)) == 0


def tell(question: dict[str, Any], _number: int = 0) -> Any:
    return completion(f"a film of {shade}" if (shade := brightness(question)) > 2 else "nothing to tell")


@pytest.fixture(scope="module")
def asked(config: Path) -> Iterator[tuple[Path, ChatServer]]:
    """A line with a filter and an endpoint in it; what its tools give one by one is in the folder "alone" beside it."""
    path = config.with_name("asked.toml")
    with chat_server(tell) as server:
        told = ASKED.format(url=server.url)
        path.write_text(f"input = {str(config.parent / 'in')!r}\nout = 'unset'\n{told}", encoding="utf-8")
        one_by_one(path, path.with_name("alone"))
        assert len(server.questions) == 4
        yield path, server


def same_files(ours: Path, alone: Path) -> None:
    made, theirs = ({n: s[1] for n, s in stamps(folder).items()} for folder in (ours, alone))
    assert len(theirs) > 20
    for name in theirs:
        assert made[name] == theirs[name] or Path(name).name == RECORDS_FILE, name


def test_one_plan_gives_what_the_tools_give_one_by_one(
    asked: tuple[Path, ChatServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """A clip is asked about before the last source is split; where the server fails, the same command goes on."""
    path, server = asked
    out, there, answered, fails = path.with_name("plan"), list[bool](), list[int](), [True]

    def answer(question: dict[str, Any], _number: int) -> Any:
        there.append((out / "split" / "manifest.parquet").exists())
        if fails[0] and len(answered) > 1:
            return error(401)
        answered.append(brightness(question))
        return tell(question)

    server.answer, run = answer, [str(path), "--out", str(out), "report.clips=0"]
    assert pipeline.main(run) == 2
    assert "[probe to filter-words] failed (exit status 2)" in capsys.readouterr().err and not any(there)
    assert len(recorded(out / "caption", "captions")) == 2
    fails[0] = False
    assert pipeline.main(run) == 0
    said = capsys.readouterr().out
    assert "probe, split, score, filter, caption, filter-words: row by row\n" in said
    assert "captioning: 2 answers" in said and "captioning: 0 answers" in said
    assert len(answered) == len({*answered}) == 4
    same_files(out, path.with_name("alone"))
    rejects = read_table(out / "rejects.parquet")["stage"].value_counts().to_dict()
    assert rejects == {"probe": len(BAD), "split": 2, "filter": 3}


def test_over_a_cluster_filters_and_questions_are_part_of_the_plan(
    asked: tuple[Path, ChatServer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    (path, server), there = asked, list[bool]()
    out = path.with_name("asked-by-ray")

    def answer(question: dict[str, Any], _number: int) -> Any:
        there.append((out / "probe" / "manifest.parquet").exists())
        return tell(question)

    server.answer = answer
    for module in ("line", "stream"):
        monkeypatch.setattr(f"opensora_repro.data.jobs.{module}.run_plan", plan_here)
    assert pipeline.main([str(path), "--out", str(out), "run.runner=ray", "report.clips=0"]) == 0
    assert there == [False] * 4 and "captioning: 0 answers" in capsys.readouterr().out
    for name in ("probe", "split", "score", "filter", "caption", "filter-words"):
        for table in ("manifest.parquet", "rejects.parquet"):
            same_table(out / name / table, path.with_name("alone") / name / table)


MODELS = """
[run]
workers = 1
[probe]
[split]
min_frames = 6
preset = "ultrafast"
[score]
scores = "brightness"
clip = {clip!r}
[filter]
keep = "brightness > 0.05 and missing(text_match)"
[caption]
model = {model!r}
device = "cpu"
max_tokens = 5
batch_size = 2
keep_flagged = true
[filter-words]
keep = "len(caption_flag) >= 0"
"""


@pytest.mark.exhaustive
def test_models_are_part_of_the_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        "clip": str(make_tiny_clip(config.with_name("clip"))),
        "model": str(make_tiny_blip2(config.with_name("m"))),
    }
    path, out, alone = (config.with_name(name) for name in ("models.toml", "models", "models-alone"))
    told = MODELS.format(**models)
    path.write_text(f"input = {str(config.parent / 'in')!r}\nout = 'unset'\n{told}", encoding="utf-8")
    assert pipeline.main([str(path), "--out", str(out), "report.clips=0"]) == 0
    assert "probe, split, score, score by models, filter, caption, filter-words: row by row" in capsys.readouterr().out
    recorded_by_plan = recorded(out / "caption", "model")
    one_by_one(path, alone)
    assert len(recorded_by_plan) == 4 and recorded_by_plan == recorded(alone / "caption", "model")
    same_files(out, alone)


@pytest.mark.exhaustive
def test_ray_gives_what_one_machine_gives(config: Path, made: Path) -> None:
    pytest.importorskip("ray")
    out = made.with_name("by-ray")
    where = ["run.runner=ray", "run.address=local", "run.workers=2"]
    assert pipeline.main([str(config), "--out", str(out), *where]) == 0
    for name in ("manifest.parquet", "rejects.parquet"):
        same_table(out / name, made / name)
