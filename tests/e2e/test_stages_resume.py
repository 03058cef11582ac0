"""Killed and stopped runs: the same command again gives the run that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opensora_repro.kernels import ops
from tests.training_world import Command, World, losses, make_world, metrics, newest_hashes, succeed, wait_for_step

STEPS = 16
IMAGES, CLIPS = ("stages.stage1_image", "images"), ("stages.stage2_video", "clips")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, data: str, **changes: Any) -> list[str]:
    settings = {"train__steps": STEPS, "checkpoint__every": 4, **changes}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, data, **settings)]


def validation(run_dir: Path) -> str:
    path = run_dir / "validation.jsonl"
    return path.read_text() if path.exists() else ""


def kill_after(step: int, module: str, run_arguments: list[str], run_dir: Path, log: Path) -> bool:
    """Start (or resume) the run and kill -9 it somewhere after `step`; False where it was faster than we are."""
    command = Command(module, run_arguments, log)
    wait_for_step(run_dir, step, command)
    time.sleep(random.uniform(0, 0.03))
    os.kill(command.pid, signal.SIGKILL)
    return command.wait() == -signal.SIGKILL


def kill_and_rerun(module: str, run_arguments: list[str], run_dir: Path, log: Path, steps: list[int]) -> None:
    """Kill the run after each of `steps` in turn, and let the last start reach the end."""
    for _ in range(5):
        shutil.rmtree(run_dir, ignore_errors=True)
        if all(kill_after(step, module, run_arguments, run_dir, log / f"step{step}") for step in steps):
            break
    else:
        pytest.fail("the run always ended before it was killed: give it more steps")
    last = succeed(module, run_arguments, log / "last")
    assert "resuming" in last.out


RUNS: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "images": (IMAGES, {}),
    "accumulated clips from two workers": (CLIPS, {"data__num_workers": 2, "train__accumulation": 2}),
    "cached clips, flow, schedule, validation, samples": (
        CLIPS,
        {
            "data__draws": 2,
            "data__cache": "cache",
            "diffusion__objective": "flow",
            "model__pred_sigma": False,
            "optim__warmup_steps": 5,
            "optim__decay_steps": 5,
            "train__dtype": "bf16",
            "train__activation_checkpointing": "selective",
            "validation__every": 3,
            "validation__timesteps": [0.5],
            "sample__every": 7,
            "sample__prompts": ["a red square"],
            "sample__steps": 2,
        },
    ),
}


MOST = "cached clips, flow, schedule, validation, samples"
NAMES = [pytest.param(name, marks=[] if name == MOST else pytest.mark.exhaustive) for name in RUNS]


@pytest.mark.parametrize("name", NAMES)
def test_kill_9_loses_nothing_but_time(world: World, tmp_path: Path, name: str) -> None:
    (module, data), changes = RUNS[name]
    if "data__cache" in changes:
        changes = {**changes, "data__val_manifest": str(world.manifest("val")), "data__cache": str(tmp_path / "cache")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(module, arguments(world, whole, data, **changes), tmp_path / "log" / "whole")
    # Before the second checkpoint, and once more before the end; the moment within a step is left to chance.
    moments = [random.randint(5, 7), random.randint(9, 11)]
    kill_and_rerun(module, arguments(world, killed, data, **changes), killed, tmp_path / "log", moments)

    assert len(metrics(whole)) == STEPS
    assert metrics(killed) == metrics(whole)
    assert newest_hashes(killed) == newest_hashes(whole)
    assert set(newest_hashes(whole)) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert validation(killed) == validation(whole)
    if "sample__every" in changes:
        assert len(validation(whole).splitlines()) == 6
        files = sorted(path.relative_to(whole) for path in (whole / "samples").rglob("*.png"))
        assert files == sorted(path.relative_to(killed) for path in (killed / "samples").rglob("*.png"))
        assert all((whole / path).read_bytes() == (killed / path).read_bytes() for path in files)


def test_killed_before_the_first_checkpoint_starts_again(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_arguments = arguments(world, run_dir, "images", train__steps=60, checkpoint__every=60)
    command = Command("stages.stage1_image", run_arguments, tmp_path / "first")
    wait_for_step(run_dir, 3, command)
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    again = succeed("stages.stage1_image", run_arguments, tmp_path / "again")
    assert "resuming" not in again.out
    assert [json.loads(line)["step"] for line in metrics(run_dir)] == list(range(1, 61))


def loader_workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)]
)
def test_a_stopped_run_saves_and_resumes(world: World, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """As a scheduler or a terminal does it: every process of the run gets the signal."""
    run_dir = tmp_path / "run"
    endless: dict[str, Any] = {"train__steps": 100_000, "checkpoint__every": 100_000, "data__num_workers": 2}
    command = Command("stages.stage2_video", arguments(world, run_dir, "clips", **endless), tmp_path / "stopped")
    wait_for_step(run_dir, 3, command)
    for pid in [command.pid, *loader_workers(command.pid)]:
        os.kill(pid, number)
    assert command.wait() == code, command.err
    assert "the same command resumes it" in command.out
    assert "Traceback" not in command.err
    done = len(metrics(run_dir))
    assert [folder.name for folder in (run_dir / "checkpoints").iterdir()] == [f"step-{done:08d}"]

    steps: dict[str, Any] = {"train__steps": done + 2}
    succeed("stages.stage2_video", arguments(world, run_dir, "clips", **steps), tmp_path / "resumed")
    succeed("stages.stage2_video", arguments(world, tmp_path / "whole", "clips", **steps), tmp_path / "whole log")
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert newest_hashes(run_dir) == newest_hashes(tmp_path / "whole")


@pytest.mark.exhaustive
@pytest.mark.skipif(bool(ops.missing_triton()), reason=ops.missing_triton())
def test_a_run_goes_on_with_other_kernels(world: World, tmp_path: Path) -> None:
    """Fused ones in Triton's interpreter, whose process must know of it from its start."""
    module, data = IMAGES
    short: dict[str, Any] = {"train__steps": 3, "checkpoint__every": 1}
    whole = arguments(world, tmp_path / "whole", data, **{**short, "train__steps": 5})
    succeed(module, whole, tmp_path / "log" / "whole")
    begun = arguments(world, tmp_path / "mixed", data, **short)
    succeed(module, begun, tmp_path / "log" / "begun")
    fused = {**short, "train__steps": 4, "train__kernels": "triton"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments(world, tmp_path / "mixed", data, **fused)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "fused kernels (train.kernels = triton)" in done.stdout
    last = arguments(world, tmp_path / "mixed", data, **{**short, "train__steps": 5})
    succeed(module, last, tmp_path / "log" / "last")
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
