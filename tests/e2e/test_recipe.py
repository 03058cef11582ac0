"""`python -m stages.recipe`: footage to a run in one command, killed anywhere and gone on with."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.recipe import main
from tests.preloaded_python import preloaded_python
from tests.processes import forked
from tests.training_world import World, make_world

TIMED = ("recipe.json", "metrics.jsonl")  # hold seconds
OWN_TIMES = ("logs", "tensorboard", "jobs")  # folders of records of how a run went


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    lines = [f"clip{i}.mp4,a square of number {i}" for i in range(7)]
    (world.root / "captions.csv").write_text("\n".join(["path,caption", *lines, ""]))
    (world.root / "pipeline.toml").write_text('input = "x"\nout = "x"\n[run]\nworkers = 1\n[probe]\n')
    return world


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with preloaded_python(tmp_path_factory.mktemp("python")) as program:
        yield program


def write_recipe(world: World, path: Path, *stages: str) -> Path:
    """A recipe of these stages, each of a few steps of a tiny model."""
    parts = [f'[pipeline]\nconfig = "{world.root}/pipeline.toml"', '[preview]\noptions = ["--samples", "1"]']
    for stage in stages:
        own = world.arguments(Path("x"), "images" if stage == "stage1" else "clips")
        kept = [word for word in own if not word.startswith(("run.", "data.manifest", "vae.", "text."))]
        kept += [f'vae.path="{world.vae}"', f'text.path="{world.text}"', "train.steps=4", "checkpoint.every=2"]
        kept += ["data.draws=1", 'data.cache="x"', "validation.every=4", "ema.decay=0.5"]
        parts.append(f'[{stage}]\nconfig = "{world.root}/empty.toml"\nset = {json.dumps(kept)}')
    path.write_text("\n".join(["held_out = 0.3", *parts, ""]))
    return path


def words(world: World, recipe: Path, out: Path) -> list[str]:
    return [str(recipe), f"input={world.root}/clips", f"captions={world.root}/captions.csv", f"out={out}"]


def _recipe(arguments: list[str], program: str, log: str) -> None:
    os.setsid()
    with open(log, "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.executable = program  # which each step is started by
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.exit(main(arguments))


def follow(arguments: list[str], python: str, log: Path, *, seconds: float | None = None) -> int:
    """The recipe's exit code, in a process group of its own that is killed after so many seconds."""
    process = forked.Process(target=_recipe, args=(arguments, python, str(log)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    return process.exitcode


def files(out: Path) -> dict[str, bytes]:
    """All that a recipe leaves but for what tells times."""
    found = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in TIMED]
    found = [path for path in found if not set(OWN_TIMES) & set(path.relative_to(out).parts)]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def kill_and_go_on(world: World, python: str, folder: Path, *stages: str, kills: int) -> None:
    recipe, out, log = write_recipe(world, folder / "recipe.toml", *stages), folder / "out", folder / "log"
    began = time.monotonic()
    assert follow(words(world, recipe, out), python, log) == 0
    whole = time.monotonic() - began
    expected = files(out)
    assert f"{stages[-1]}/checkpoints/step-00000004/ema.safetensors" in expected
    out.rename(folder / "whole")
    moments, done = random.Random(len(stages)), 0
    for _ in range(10 * kills):  # some are over before
        done += follow(words(world, recipe, out), python, log, seconds=moments.uniform(0, whole / 2)) != 0
        if done == kills:
            break
    assert done == kills or (out / "recipe.json").exists()
    assert follow(words(world, recipe, out), python, log) == 0
    found = files(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
def test_killed_three_times_it_leaves_the_same_files(world: World, python: str, tmp_path: Path) -> None:
    kill_and_go_on(world, python, tmp_path, "stage1", kills=3)


@pytest.mark.exhaustive
def test_killed_ten_times_it_leaves_the_same_files(world: World, python: str, tmp_path: Path) -> None:
    kill_and_go_on(world, python, tmp_path, "stage1", "stage2", "stage3", kills=10)
