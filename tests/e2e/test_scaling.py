"""`python -m stages.scaling`: a ladder trained, killed and gone on with, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.scaling import main
from tests.training_world import World, make_world


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sizes and three budgets of a tiny model, all but --out."""
    world: World = make_world(tmp_path_factory.mktemp("world"))
    changes: dict[str, Any] = {
        "data__val_manifest": str(world.manifest("val")), "validation__every": 9, "train__steps": 12,
        "optim__warmup_steps": 4, "optim__decay_steps": 3, "checkpoint__every": 5, "diffusion__objective": "flow",
        "sample__prompts": ["a red square", "a blue square"], "sample__sampler": "euler", "sample__steps": 2,
    }  # fmt: skip
    own = [word for word in world.arguments(Path("x"), "clips", **changes) if not word.startswith("run.")]
    return [str(world.root / "empty.toml"), *own, "--sizes", "32x1,32x2", "--budgets", "1x,2x,4x"]


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.scaling", *words, "--out", str(out)]
    told = subprocess.PIPE
    return subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def losses(out: Path) -> dict[str, float]:
    found = json.loads((out / "scaling.json").read_text())
    return {f"{run['size']}-{run['budget']}": run["loss"] for run in found["runs"]}


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*words, "--out", str(out), "--price-per-gpu-hour", "2"]) == 0
    return out


@pytest.mark.exhaustive
def test_a_ladder_leaves_runs_losses_and_a_page(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert page.count("<video") == 3 * 2 and "a blue square" in page and "costs" in page
    found = losses(whole)
    assert list(found) == [f"{size}-{budget}" for budget in ("1x", "2x", "4x") for size in ("32x1", "32x2")]
    assert found["32x2-4x"] < found["32x2-1x"]


@pytest.mark.exhaustive
def test_killed_and_told_to_stop_it_ends_as_an_undisturbed_one(words: list[str], whole: Path, tmp_path: Path) -> None:
    """Of one size, whose runs are those that it has among others."""
    out, words = tmp_path / "out", [*words, "--sizes", "32x2"]
    for number, place in ((signal.SIGKILL, "32x2-1x"), (signal.SIGTERM, "32x2-2x")):
        process, metrics = start(words, out), out / place / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < 6:
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()[0]
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        told = process.communicate()[0]
        assert process.returncode == (143 if number == signal.SIGTERM else -number), told
        assert not (out / "scaling.json").exists()
    assert "32x2-2x ended with exit code 143; the same command goes on there" in told
    process = start(words, out)
    told = process.communicate()[0]
    assert process.returncode == 0 and told.count("done before") == 1 and "loss = a + b * C^-c" in told, told
    assert losses(out) == {name: loss for name, loss in losses(whole).items() if name.startswith("32x2")}

    changed = start([*words, "optim.lr=0.1"], out)
    told = changed.communicate()[0]
    assert changed.returncode == 2 and "holds a run with other settings: optim.lr" in told and "Traceback" not in told
