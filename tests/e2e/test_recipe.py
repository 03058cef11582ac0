"""`python -m stages.recipe`: footage to a run in one command, killed anywhere and gone on with."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from opensora_repro.data.manifest import read_manifest, write_manifest
from opensora_repro.data.write import write_video
from opensora_repro.errors import DataError
from opensora_repro.planning.recipe import MODULES, hold_out
from stages.recipe import main
from tests.training_world import World, make_world

TIMED = ("recipe.json", "metrics.jsonl", "starts.jsonl")  # hold seconds, or a line a start
OWN_TIMES = ("logs", "tensorboard", "jobs")  # folders of records of how a run went


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 12 frames; captions, and a line of one tool, beside them."""
    folder = tmp_path_factory.mktemp("world") / "footage"
    folder.mkdir()
    for number in range(6):
        video = np.full((12, 32, 32, 3), 30 * number, np.uint8)
        video[:, number : number + 8, 4:12] = 255
        write_video(folder / f"clip{number}.mp4", video, 8)
    lines = [f"clip{number}.mp4,a square of number {number}" for number in range(6)]
    folder.with_name("footage.csv").write_text("\n".join(["path,caption", *lines, ""]))
    folder.with_name("pipeline.toml").write_text('input = "x"\nout = "x"\n[run]\nworkers = 1\n[probe]\n')
    folder.with_name("EMPTY").mkdir()
    folder.with_name("others.csv").write_text("source,caption\nfilm.mp4,not of this footage\n")
    folder.with_name("empty.toml").write_text("")
    return folder


def write_recipe(path: Path, footage: Path, *stages: str, world: World | None = None) -> Path:
    """A recipe of these stages, each of a few steps of a tiny model."""
    config = f'config = "{footage.parent}/empty.toml"'
    parts = [f'[pipeline]\nconfig = "{footage.parent}/pipeline.toml"', '[preview]\noptions = ["--samples", "1"]']
    for stage in stages:
        image = stage == "stage1"
        own = ["data.num_frames=1", "model.temporal_attention=false"] if image else []
        if world is not None:
            found = world.arguments(Path("x"), "images" if image else "clips")
            own = [word for word in found if not word.startswith(("run.", "data.manifest"))]
            own += ["train.steps=4", "checkpoint.every=2", "data.draws=1", 'data.cache="x"', "validation.every=4"]
        parts.append(f"[{stage}]\n{config}\nset = {json.dumps(own)}")
    path.write_text("\n".join(["held_out = 0.3", *parts, ""]))
    return path


def words(recipe: Path, footage: Path, out: Path) -> list[str]:
    return [str(recipe), f"input={footage}", f"captions={footage}.csv", f"out={out}"]


def follow(arguments: list[str], log: Path, *, seconds: float | None = None) -> int:
    """The recipe's exit code, in a process group of its own that is killed after so many seconds."""
    command = [sys.executable, "-m", "stages.recipe", *arguments]
    with log.open("ab") as told, subprocess.Popen(command, start_new_session=True, stdout=told, stderr=told) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    assert code in (0, -signal.SIGKILL), log.read_text()
    return code


def files(out: Path) -> dict[str, bytes]:
    """All that a recipe leaves but for what tells times."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in TIMED]
    found = [path for path in found if (path.parent.name in MODULES, path.name) != (True, "report.html")]  # of a run
    found = [path for path in found if not set(OWN_TIMES) & set(path.relative_to(out).parts)]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def kill_and_go_on(arguments: list[str], out: Path, *, kills: int, ends_with: str) -> None:
    """Run it undisturbed, then killed so many times, each later than the one before, and compare."""
    log, began = out.with_name("log"), time.monotonic()
    assert follow(arguments, log) == 0
    whole = time.monotonic() - began
    expected = files(out)
    assert ends_with in expected
    out.rename(out.with_name("whole"))
    moments, killed = random.Random(0), 0
    while killed < kills:
        if follow(arguments, log, seconds=moments.uniform(0, 2 * whole / kills)) == 0:  # it came to its end before
            shutil.rmtree(out)
        else:
            killed += 1
    assert follow(arguments, log) == 0
    found = files(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert "done before" in log.read_text()


@pytest.mark.exhaustive
def test_killed_three_times_its_data_are_the_same(footage: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", footage, "stage1")
    arguments = [*words(recipe, footage, tmp_path / "out"), "--until", "preview"]
    kill_and_go_on(arguments, tmp_path / "out", kills=3, ends_with="preview/preview.html")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_killed_ten_times_it_leaves_the_same_files(footage: Path, world: World, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.toml", footage, "stage1", "stage2", "stage3", world=world)
    arguments, last = words(recipe, footage, tmp_path / "out"), "stage3/checkpoints/step-00000004/ema.safetensors"
    kill_and_go_on(arguments, tmp_path / "out", kills=10, ends_with=last)


def test_a_dry_run_tells_steps_times_and_memory(
    footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    laptop = ["configs/laptop.recipe.toml", f"input={footage}", f"captions={footage}.csv", f"out={out}", "--dry-run"]
    assert main(laptop) == 0
    told = capsys.readouterr().out
    names = (
        "pipeline",
        "captions",
        "held-out",
        "preview",
        "stage0",
        "stage1",
        "stage2",
        "stage3",
        "evaluate",
        "report",
        "card",
    )
    assert [line.split()[1] for line in told.splitlines() if line.startswith("[")] == [f"{name}:" for name in names]
    assert re.search(r"stage3: 600 steps \(to do, about [\d.]+ min, about 215 MiB of memory\)", told)
    assert f"init.weights={out}/stage2 data.cache={out}/cache/stage3" in told and not out.exists()
    assert main([*laptop, "--gpu", "T4", "--until", "stage1", "stage1.train.steps=7"]) == 0
    told = capsys.readouterr().out
    assert "stage1: 7 steps" in told and "stage2:" not in told and "on T4" in told
    assert main([*laptop, "held_out=*1.mp4", "stage3.data.manifest=best.parquet"]) == 0
    told = capsys.readouterr().out
    assert "held-out: videos named *1.mp4 are held out" in told and "data_tools.preview best.parquet " in told
    *_, third = [line for line in told.splitlines() if "stages.stage3_hq" in line]
    assert third.count("data.manifest=") == 1 and f"data.val_manifest={out}/held_out.parquet" in third


MISTAKES = {
    "no such file or folder": ["input=none"],
    "no captions: give captions=FILE": ["captions="],
    "captions = none: no such file": ["captions=none"],
    "expected a folder, or a list (": ["captions=README.md"],
    "such as 'clip0.mp4'": ["captions=FOOTAGE/others.csv"],
    "EMPTY: no video in this folder": ["input=FOOTAGE/EMPTY"],
    "out = ": ["out=FOOTAGE/others.csv"],
    "expected a share of the videos": ["held_out=1.5"],
    "or a pattern of their names, such as 'test_*'": ["held_out=clip0.mp4"],
    "expected input=, captions=, out=, held_out= or SECTION.key=value": ["stage4.train.steps=1"],
    "--until stage9: this recipe's steps are pipeline, captions": ["--until", "stage9"],
    "--gpu asks what --dry-run estimates": ["--gpu", "T4"],
    "model.hidden_sise": ["stage1.model.hidden_sise=3"],
    "[stage1]: data.num_frames = 8": ["stage1.data.num_frames=8"],
    "nowhere.toml: cannot be read": ["stage1.config=nowhere.toml"],
}


@pytest.mark.parametrize("told", MISTAKES)
def test_mistakes_are_one_line_before_anything_runs(
    footage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told: str
) -> None:
    out = tmp_path / "out"
    changes = [word.replace("FOOTAGE", str(footage.parent)) for word in MISTAKES[told]]
    given = [f"input={footage}", f"captions={footage}.csv", f"out={out}", *changes]
    assert main(["configs/laptop.recipe.toml", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not out.exists()


def test_what_is_held_out_stays_so_with_more_footage(tmp_path: Path) -> None:
    def held_out(count: int, share: float | str = 0.2) -> set[str]:
        rows = [
            {"id": f"{n}-{clip}", "path": str(tmp_path / f"{n}-{clip}.mp4"), "caption": "x", "num_frames": 4,
             "fps": 8.0, "height": 8, "width": 8, "source": f"films/{n}.mp4"}
            for n in range(count) for clip in range(2)
        ]  # fmt: skip
        write_manifest(pa.Table.from_pylist(rows), tmp_path / "all.parquet")
        hold_out(tmp_path / "all.parquet", tmp_path / "train.parquet", tmp_path / "held.parquet", share)
        train, held = (set(read_manifest(tmp_path / f"{name}.parquet")["id"].to_pylist()) for name in ("train", "held"))
        assert train | held == {row["id"] for row in rows} and not train & held
        assert {f"{name.split('-')[0]}-{clip}" for name in held for clip in range(2)} == held  # whole videos
        return held

    few, many = held_out(30), held_out(60)
    assert few < many and 6 <= len(few) < 24
    assert len(held_out(2)) == 2
    assert held_out(30, "1?.mp4") == {f"{n}-{clip}" for n in range(10, 20) for clip in range(2)}
    for pattern, found in {"x*": "names none, such as '0.mp4'", "*.mp4": "names all"}.items():
        with pytest.raises(DataError, match=found):
            held_out(30, pattern)
