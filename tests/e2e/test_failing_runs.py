"""Alarms in runs in which what they tell of happens, and runs beside them in which it does not."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opensora_repro.data.video import read_frames
from opensora_repro.data.write import write_video
from opensora_repro.demo.shapes import training_scenes
from stages import stage2_video
from tests.frames import read_manifest, write_manifest
from tests.training_world import FRAMES, SIZE, Command, World

STAGE2 = "stages.stage2_video"
pytestmark = pytest.mark.exhaustive


def film(root: Path, size: int) -> World:
    models = Path(__file__).parents[2] / "checkpoints" / "demo"
    (root / "empty.toml").write_text("")
    for name, seed in (("clips", 0), ("val", 1)):
        (root / name).mkdir()
        rows = []
        for number, scene in enumerate(itertools.islice(training_scenes(1, seed=seed), 36)):
            path = root / name / f"{number}.mp4"
            write_video(path, scene.frames(count=FRAMES, size=size), 8)
            rows.append({"id": f"{name}-{number}", "path": str(path), "caption": scene.motion.caption,
                         "num_frames": FRAMES, "fps": 8.0, "height": size, "width": size})  # fmt: skip
        write_manifest(pd.DataFrame(rows), root / f"{name}.parquet")
    return World(root, models / "vae", models / "text", latent_channels=4, caption_channels=64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The demo's, at 32 pixels: its captions tell much of its latents."""
    return film(tmp_path_factory.mktemp("world"), SIZE)


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {
        "model__hidden_size": 64,
        "model__depth": 1,
        "model__class_dropout_prob": 0.0,
        "diffusion__objective": "flow",
        "data__frame_sampling": "uniform",
        "data__draws": 1,
        "data__flip": False,
        "data__cache": str(world.root / "cache"),
        "checkpoint__every": 1000,
        "data__val_manifest": str(world.manifest("val")),
        "validation__every": 0,
        "train__batch_size": 8,
        "optim__lr": 3e-3,
        "alarms__off": ["repeats"],
        **changes,
    }
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def alarms(world: World, run_dir: Path, **changes: Any) -> list[str]:
    """Train; the alarms that the run has told of."""
    assert stage2_video.main(arguments(world, run_dir, **changes)) == 0
    return [line["alarm"] for line in lines(run_dir / "alarms.jsonl")]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_text_that_tells_nothing_of_its_clip_is_ignored(world: World, tmp_path: Path) -> None:
    """Each clip under captions of several others: there is nothing to learn of them."""
    clips = read_manifest(world.manifest("clips"))
    turned = [clips.assign(id=clips.id + f"-{by}", caption=list(clips.caption[by:]) + list(clips.caption[:by]))
              for by in range(0, len(clips), 3)]  # fmt: skip
    write_manifest(pd.concat(turned), tmp_path / "shuffled.parquet")
    gaps = {}
    for name, manifest in (("right", world.manifest("clips")), ("shuffled", tmp_path / "shuffled.parquet")):
        told = alarms(world, tmp_path / name, data__manifest=str(manifest), train__steps=400, evaluate__every=200,
                      evaluate__samples=0, validation__timesteps=[0.9, 1.0])  # fmt: skip
        metrics = [line["metrics"] for line in lines(tmp_path / name / "evaluation.jsonl")]
        gaps[name] = metrics[-1]["caption_gap"] / metrics[-1]["loss"]
        assert told == (["text"] if name == "shuffled" else [])
    assert abs(gaps["shuffled"]) < gaps["right"] / 10


def test_an_average_lags_behind_what_learns_at_once(world: World, tmp_path: Path) -> None:
    """A learning rate that rises to much: after seven steps the loss is two fifths."""
    changes = {"diffusion__objective": "iddpm", "optim__lr": 1e-1, "optim__warmup_steps": 100, "optim__clip_norm": 0.0,
               "train__steps": 7, "validation__every": 1}  # fmt: skip
    for decay in (0.0, 0.9999):
        told = alarms(world, tmp_path / str(decay), **changes, ema__decay=decay)
        assert told == (["average"] if decay else [])


def test_three_clips_are_overfitted(world: World, tmp_path: Path) -> None:
    write_manifest(read_manifest(world.manifest("clips")).iloc[:3], tmp_path / "three.parquet")
    for name, manifest in (("all", world.manifest("clips")), ("three", tmp_path / "three.parquet")):
        told = alarms(world, tmp_path / name, data__manifest=str(manifest), train__steps=320, validation__every=40)
        assert told == (["overfitting"] if name == "three" else [])


STEPS = 1000  # in which samples come to look like their clips
PROMPTS = [scene.motion.caption for scene in itertools.islice(training_scenes(1, seed=0), 6)]
SAMPLED = {"sample__every": 1000, "sample__sampler": "ab2", "sample__steps": 8, "sample__guidance": 1.0,
           "sample__prompts": PROMPTS}  # fmt: skip


def test_a_learning_rate_that_grows_until_the_loss_does(world: World, tmp_path: Path) -> None:
    """By the same warm-up to a fiftieth of it all is well; asked to, the run ends before nothing is finite."""
    changes = {"optim__warmup_steps": 400, "optim__clip_norm": 0.0, "train__steps": 400, "ema__decay": 0.0}
    assert alarms(world, tmp_path / "well", **changes, optim__lr=5e-3) == []
    stopping = arguments(world, tmp_path / "run", **changes, optim__lr=0.25, alarms__stop=["loss"])
    assert stage2_video.main(stopping) == 1
    assert {line["alarm"] for line in lines(tmp_path / "run" / "alarms.jsonl")} == {"loss", "gradient"}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same at the demo's 96 pixels, in which its model learns to sample."""
    return film(tmp_path_factory.mktemp("large"), 96)


def sampled(world: World, run_dir: Path, **changes: Any) -> list[str]:
    """Train the demo's small model and sample at the end; the alarms."""
    given = {"model__hidden_size": 128, "model__depth": 2, "model__patch_size": [1, 4, 4], "model__space_scale": 0.1,
             "model__time_scale": 0.003, "model__no_temporal_pos_emb": True, "model__pred_sigma": False,
             "data__height": 96, "data__width": 96, "diffusion__shift": 12.0, "optim__betas": [0.9, 0.98],
             "optim__lr": 1.5e-3, "optim__warmup_steps": 50, "ema__decay": 0.99, "train__batch_size": 16}  # fmt: skip
    return alarms(world, run_dir, **given | changes)


def test_samples_of_a_model_that_has_learned_nothing(large: World, tmp_path: Path) -> None:
    assert sampled(large, tmp_path / "run", train__steps=5, optim__lr=1e-9, **SAMPLED) == ["noise"]


def test_samples_of_a_model_that_knows_stills_alone(large: World, tmp_path: Path) -> None:
    """It was trained on others before, with which the same samples are in order."""
    clips = read_manifest(large.manifest("clips"))
    paths = [tmp_path / Path(path).name for path in clips.path]
    for old, new in zip(clips.path, paths, strict=True):
        frame = read_frames(Path(old), start=0, count=1).numpy()
        write_video(new, np.repeat(frame, FRAMES, axis=0), 8)
    write_manifest(clips.assign(path=list(map(str, paths))), tmp_path / "before.parquet")
    own = {"data__manifest": str(tmp_path / "before.parquet"), "data__cache": str(tmp_path / "cache")}
    decay = {"optim__decay_steps": STEPS // 2}
    assert sampled(large, tmp_path / "before", train__steps=STEPS, **own, **decay, **SAMPLED) == []
    begun = {"init__weights": str(tmp_path / "before"), "optim__lr": 1e-9, "train__steps": 5}
    assert sampled(large, tmp_path / "run", **begun, **SAMPLED) == ["motion"]


def test_a_run_in_which_nothing_fails_is_silent(large: World, tmp_path: Path) -> None:
    """Validated and evaluated all along; sampled when it has learned what clips look like, and not yet by heart."""
    changes = {"train__steps": 600, "validation__every": 100, "evaluate__every": 300, "evaluate__samples": 0,
               "checkpoint__every": 300, "optim__decay_steps": 300, **SAMPLED}  # fmt: skip
    assert sampled(large, tmp_path / "run", **changes) == []
    assert len(lines(tmp_path / "run" / "validation.jsonl")) == 6


def test_a_machine_that_is_slow_for_a_while(world: World, tmp_path: Path) -> None:
    """Stopped 19 parts of 20 of the time, as where others take the processor: for a moment in silence, then told of."""
    run_dir = tmp_path / "run"
    words = arguments(world, run_dir, train__steps=1_000_000, alarms__stop=["throughput"])
    command = Command(STAGE2, words, tmp_path / "log")
    try:
        wait_for(command, lambda: steps(run_dir) >= 200)
        before = steps(run_dir)
        slow_down(command, lambda: steps(run_dir) >= before + 20, most=20)
        wait_for(command, lambda: steps(run_dir) >= before + 200)
        assert not lines(run_dir / "alarms.jsonl")
        slow_down(command, lambda: bool(lines(run_dir / "alarms.jsonl")), most=400)
        assert command.wait() == 1
    finally:
        command.process.kill()
    (told,) = lines(run_dir / "alarms.jsonl")
    assert told["alarm"] == "throughput" and "waiting for data, the machine's load is" in told["message"]
    assert "stopped by alarm 'throughput' of alarms.stop: " in command.err


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(command: Command, is_so: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert command.process.exitcode is None and time.monotonic() < end, command.out + command.err
        time.sleep(0.05)


def slow_down(command: Command, is_so: Any, *, most: float) -> None:
    """Let it run a twentieth of the time until something is so, or this many seconds are over."""
    end = time.monotonic() + most
    while not is_so() and time.monotonic() < end:
        for number, seconds in ((signal.SIGSTOP, 0.95), (signal.SIGCONT, 0.05)):
            os.kill(command.pid, number)
            time.sleep(seconds)
