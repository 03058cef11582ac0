"""`stages.sample` under torchrun: prompts shared out, frames shared, the samples those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_repro.config import dump_toml, load_config
from opensora_repro.data.video import read_frames
from opensora_repro.data.write import write_png
from opensora_repro.models.stdit import STDiT
from opensora_repro.run_folder import TrainState
from tests.chat_server import chat_server, completion
from tests.checkpoints import write_checkpoint
from tests.training_world import World, finish, make_world, start_processes

FRAMES = 5  # which two processes cannot halve
PROMPTS = ["a red square", "a much longer caption of a blue square that moves", "green"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    cfg = load_config(world.root / "empty.toml", world.arguments(world.root / "run", "clips", data__num_frames=FRAMES))
    torch.manual_seed(0)
    model = STDiT(cfg.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    write_checkpoint(world.root / "run", model, dump_toml(cfg), TrainState(step=1))
    return world


def sample(world: World, processes: int, out: Path, *options: str) -> list[str]:
    """Sample all prompts; return what the processes said."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    arguments = [str(world.root / "run"), *prompts, "--out", str(out), "--steps", "3", "--batch-size", "2", *options]
    commands = start_processes("stages.sample", arguments, processes, out.with_name(f"{out.name}-log"))
    finish(commands)
    return [command.out for command in commands]


def videos(out: Path) -> np.ndarray:
    files = [entry["file"] for entry in json.loads((out / "samples.json").read_text())["samples"]]
    assert files == [f"{index:04d}.mp4" for index in range(len(PROMPTS))]
    return np.stack([read_frames(out / file, start=0, count=FRAMES).numpy() for file in files]).astype(int)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        pytest.param(2, (), marks=pytest.mark.exhaustive),
        pytest.param(2, ("--batch-size", "1", "--shard-text"), marks=pytest.mark.exhaustive),  # of 3 batches one has 2
        (2, ("--sp-size", "2", "--shard-text")),
        pytest.param(4, ("--sp-size", "2"), marks=pytest.mark.exhaustive),
    ],
)
def test_samples_are_those_of_one_process(
    world: World, tmp_path: Path, processes: int, options: tuple[str, ...]
) -> None:
    sample(world, 1, tmp_path / "one")
    said = sample(world, processes, tmp_path / "shared", *options)
    difference = np.abs(videos(tmp_path / "shared") - videos(tmp_path / "one"))
    assert difference.max() <= 4  # rounding to pixels, then the codec's
    assert "3 written to" in said[0]
    assert not any(said[1:])
    records = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("shared", "one")]
    assert records[0] == records[1]


@pytest.mark.exhaustive
def test_caches_and_guidance_in_an_interval_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    faster = ("--steps", "10", "--broadcast", "2", "3", "4", "--guidance-interval", "0.2", "0.9")
    sample(world, 1, tmp_path / "one", *faster)
    sample(world, 2, tmp_path / "shared", *faster, "--sp-size", "2")
    sample(world, 1, tmp_path / "plain", "--steps", "10")
    one, shared, plain = (videos(tmp_path / name) for name in ("one", "shared", "plain"))
    assert np.abs(one - shared).max() <= 4 < np.abs(one - plain).max()


def test_processes_that_do_not_divide_are_one_line(world: World, tmp_path: Path) -> None:
    arguments = [str(world.root / "run"), "--prompt", "x", "--out", str(tmp_path / "out"), "--sp-size", "2"]
    (command,) = start_processes("stages.sample", arguments, 1, tmp_path / "log")
    assert command.wait() == 2
    assert "1 processes are not divisible by" in command.err
    assert len(command.err.strip().splitlines()) == 1


@pytest.mark.exhaustive
def test_chained_clips_with_a_given_frame_are_those_of_one_process(world: World, tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    options = ("--first", str(tmp_path / "a.png"), "--seconds", "1", "--fps", "9", "--condition-frames", "2")
    said = sample(world, 1, tmp_path / "one", *options)
    sample(world, 2, tmp_path / "shared", *options, "--sp-size", "2")
    assert "9 frames in 3 clips of 5, each given the last 2 of the one before" in said[0]
    found = [
        read_frames(tmp_path / name / "0002.mp4", start=0, count=9).numpy().astype(int) for name in ("one", "shared")
    ]
    assert np.abs(found[0] - found[1]).max() <= 4  # rounding to pixels, then the codec's


def test_one_process_asks_for_prompts_to_be_rewritten(world: World, tmp_path: Path) -> None:
    """All get its answers; whoever answers is shown captions of the run's own manifest."""

    def answer(body: dict[str, Any], number: int) -> Any:
        assert "Captions that it learned from" in body["messages"][0]["content"]
        return completion(body["messages"][0]["content"].split("The prompt: ")[1] + " in rain")

    with chat_server(answer) as chat:
        said = sample(world, 2, tmp_path / "out", "--expand", chat.url, "--batch-size", "1")
        assert len(chat.questions) == len(PROMPTS)
    assert "3 written to" in said[0] and not any(said[1:])
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["prompts"] == [f"{p} in rain" for p in PROMPTS]
