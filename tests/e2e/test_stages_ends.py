"""How runs end early: what they learned is saved first, one line says why, and the exit code whose fault it is."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from opensora_repro.run_folder import Events
from opensora_repro.training.loop import Trainer
from opensora_repro.training.save import CheckpointWriter
from stages import sample, stage2_video
from tests.training_world import Command, World, make_world, metrics, newest_hashes, succeed, wait_for_step

DATA, MACHINE = 2, 1  # exit codes by whose fault it is


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def arguments(world: World, run_dir: Path, **changes: Any) -> list[str]:
    settings = {"train__steps": 4, "checkpoint__every": 2, "model__depth": 1, **changes}
    return [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **settings)]


def train(world: World, run_dir: Path, **changes: Any) -> int:
    code: int = stage2_video.main(arguments(world, run_dir, **changes))
    return code


@pytest.fixture
def ends(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Train in `run`; the only line of the error."""

    def end(code: int, **changes: Any) -> str:
        capsys.readouterr()
        assert train(world, tmp_path / "run", **changes) == code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "sample it" not in out
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        return line

    return end


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("*"))


def with_bad(world: World, folder: Path, bad: list[int], name: str = "clips", copies: int = 1) -> str:
    """The manifest with `copies` of every row, and no video in the files to which the rows `bad` point."""
    frame = pd.read_parquet(world.manifest(name))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    frame = pd.concat([frame.assign(id=[f"{i}/{copy}" for i in frame["id"]]) for copy in range(copies)])
    frame = frame.reset_index(drop=True)
    (folder / "moved").mkdir(exist_ok=True)
    for row in bad:
        frame.loc[row, "path"] = str(folder / "moved" / f"{row}.mp4")
        (folder / "moved" / f"{row}.mp4").write_bytes(b"no video")
    path = folder / f"{name}-bad.parquet"
    frame.to_parquet(path)
    return str(path)


# Samples that cannot be read


@pytest.mark.parametrize("cached", [False, True])
def test_files_that_are_no_videos_stop_the_run_and_leave_no_weights(
    world: World, tmp_path: Path, cached: bool, ends: Any
) -> None:
    changes: dict[str, Any] = {"data__manifest": with_bad(world, tmp_path, list(range(7))), "train__steps": 30}
    if cached:
        changes |= {"data__draws": 1, "data__cache": str(tmp_path / "cache")}
    message = ends(DATA, **changes)
    assert "7 of 7 samples cannot be read, more than data.max_bad_fraction = 0.1" in message
    assert "moved/" in message and "quarantine.jsonl" in message
    assert saved(tmp_path / "run") == []


@pytest.mark.parametrize("cached", [False, True])
def test_windows_longer_than_every_clip(world: World, tmp_path: Path, cached: bool, ends: Any) -> None:
    cache = {"data__draws": 2, "data__cache": str(tmp_path / "cache")} if cached else {}
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    frame["num_frames"] = 91  # a manifest that says more than there is passes the look at it
    frame.to_parquet(tmp_path / "long.parquet")
    manifest = str(tmp_path / "long.parquet")
    assert "7 of 7 samples cannot be read" in ends(DATA, data__num_frames=91, data__manifest=manifest, **cache)
    assert saved(tmp_path / "run") == []
    assert "the longest has 12: lower data.num_frames" in ends(DATA, data__num_frames=91, **cache)


def test_eight_steps_without_a_sample(world: World, tmp_path: Path, ends: Any) -> None:
    """Where the limit allows any share."""
    nothing = {"data__manifest": with_bad(world, tmp_path, list(range(7))), "data__max_bad_fraction": 1.0}
    assert "8 steps in a row without a sample" in ends(DATA, **nothing, train__steps=30)
    assert len(metrics(tmp_path / "run")) == 8
    shutil.rmtree(tmp_path / "run")
    assert "no step was trained: not one of the 6 samples seen could be read" in ends(DATA, **nothing, train__steps=3)
    assert saved(tmp_path / "run") == []


def test_the_share_is_of_the_samples_seen_and_trained_steps_are_saved(world: World, tmp_path: Path, ends: Any) -> None:
    manifest = with_bad(world, tmp_path, list(range(60, 105)), copies=15)
    message = ends(DATA, data__manifest=manifest, train__steps=50, checkpoint__every=50)
    assert "of 20 samples cannot be read" in message
    assert len(metrics(tmp_path / "run")) == 10
    assert saved(tmp_path / "run") == [10]
    assert f"saved: {tmp_path / 'run' / 'checkpoints' / 'step-00000010'}" in message


def test_a_full_cache_counts_as_seen(world: World, tmp_path: Path, ends: Any) -> None:
    """A rerun tries the bad ones alone; the share is of all."""
    changes: dict[str, Any] = {"data__draws": 1, "data__cache": str(tmp_path / "cache")}
    changes |= {"data__manifest": with_bad(world, tmp_path, [1, 5], copies=4), "data__max_bad_fraction": 0.1}
    for steps in (2, 4):
        assert train(world, tmp_path / "run", **changes, train__steps=steps) == 0
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 2
    (tmp_path / "run" / "quarantine.jsonl").unlink()
    message = ends(DATA, **{**changes, "data__max_bad_fraction": 0.05}, train__steps=6)
    assert "2 of 28 samples cannot be read" in message


def test_unreadable_held_out_clips_count_like_training_ones(world: World, tmp_path: Path, ends: Any) -> None:
    watched: dict[str, Any] = {"validation__every": 4, "validation__timesteps": [0.5]}
    watched["data__val_manifest"] = with_bad(world, tmp_path, [1], "val")
    message = ends(DATA, **watched)
    assert "1 of 3 held-out samples cannot be read" in message and "moved/1.mp4" in message
    assert train(world, tmp_path / "run", **watched, data__max_bad_fraction=0.4) == 0
    (line,) = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == 2
    assert "val-1/0" in (tmp_path / "run" / "quarantine.jsonl").read_text()

    watched["data__val_manifest"] = with_bad(world, tmp_path, [0, 1, 2], "val")
    message = ends(DATA, **watched, data__max_bad_fraction=1.0, run__dir=str(tmp_path / "none"))
    assert "data.val_manifest: no held-out sample can be read" in message


# A machine that fails


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """What a full disk does to every file that is written beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cache_that_cannot_be_written(world: World, tmp_path: Path, ends: Any) -> None:
    changes = {"data__draws": 2, "data__cache": str(tmp_path / "cache")}
    with largest_file(5000):
        message = ends(MACHINE, **changes)
    assert "cannot write" in message and "shard-" in message and "File too large" in message
    assert "the same command goes on" in message
    assert not [path for path in (tmp_path / "cache").rglob("*") if ".safetensors" in path.name]
    assert train(world, tmp_path / "run", **changes) == 0


def test_metrics_that_cannot_be_written(world: World, tmp_path: Path, ends: Any) -> None:
    run_dir = tmp_path / "run"
    assert train(world, run_dir, train__steps=2) == 0
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 1, "pad": "x" * 4_000_000}) + "\n")
    with largest_file((run_dir / "metrics.jsonl").stat().st_size + 250):
        message = ends(MACHINE, train__steps=30, checkpoint__every=50)
    assert f"cannot write {run_dir / 'metrics.jsonl'}: File too large" in message
    (newest,) = [step for step in saved(run_dir) if step > 2]
    assert f"step-{newest:08d}" in message
    assert newest < 8
    assert train(world, run_dir, train__steps=newest + 2) == 0


@pytest.mark.parametrize("what", ["samples", "tensorboard"])
def test_samples_and_events_that_cannot_be_written(world: World, tmp_path: Path, ends: Any, what: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / what).write_text("in the way")
    sampled = {"sample__every": 3, "sample__prompts": ["a cat"], "sample__sampler": "ddim", "sample__steps": 2}
    message = ends(MACHINE, train__steps=20, checkpoint__every=50, **sampled)
    assert f"cannot write {tmp_path / 'run' / what}" in message
    (step,) = saved(tmp_path / "run")
    assert step == 3 if what == "samples" else step < 4
    assert message.endswith(f"saved: {tmp_path / 'run' / 'checkpoints'}/step-{step:08d}")


def test_a_disk_that_is_full_at_the_first_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its thread tells nobody by itself."""
    with largest_file(10):
        events = Events(tmp_path / "tensorboard", 3)
        events.add({"loss": 1.0}, 4)
        events.close()
    assert events.error is not None and "cannot write" in str(events.error)
    assert "Traceback" not in capsys.readouterr().err


def test_no_place_for_checkpoints_is_told_before_training(world: World, tmp_path: Path, ends: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    assert "run.dir = " in ends(DATA) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_checkpoint_that_cannot_be_written(world: World, tmp_path: Path, ends: Any) -> None:
    assert train(world, tmp_path / "run", train__steps=2) == 0
    with largest_file(20_000):
        message = ends(MACHINE)
    assert "cannot write checkpoint" in message and "step-00000004" in message
    assert message.endswith("saved: " + str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    assert saved(tmp_path / "run") == [2]


def loader_workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.exhaustive  # of two processes: tests/distributed
def test_a_killed_loader_process(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = arguments(world, run_dir, train__steps=100_000, checkpoint__every=100_000, data__num_workers=2)
    command = Command("stages.stage2_video", endless, tmp_path / "killed")
    wait_for_step(run_dir, 3, command)
    os.kill(loader_workers(command.pid)[0], signal.SIGKILL)
    assert command.wait() == MACHINE
    (message,) = [line for line in command.err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in command.err
    assert "SIGKILL" in message and "memory" in message and "data.num_workers = 2" in message
    done = len(metrics(run_dir))
    assert saved(run_dir) == [done]
    assert f"step-{done:08d}" in message

    steps: dict[str, Any] = {"train__steps": done + 2}
    succeed("stages.stage2_video", arguments(world, run_dir, **steps), tmp_path / "resumed")
    succeed("stages.stage2_video", arguments(world, tmp_path / "whole", **steps), tmp_path / "whole log")
    assert metrics(run_dir) == metrics(tmp_path / "whole")
    assert newest_hashes(run_dir) == newest_hashes(tmp_path / "whole")


def test_no_memory_on_a_cpu(world: World, tmp_path: Path, ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora_repro.training.batches import BatchBuilder

    build = BatchBuilder.build
    calls = []

    def fourth_is_too_large(self: BatchBuilder, samples: Any, size: Any) -> Any:
        calls.append(0)
        if len(calls) == 4:
            torch.empty(1 << 50)
        return build(self, samples, size)

    monkeypatch.setattr(BatchBuilder, "build", fourth_is_too_large)
    message = ends(MACHINE, train__steps=9, checkpoint__every=50)
    assert "out of memory" in message and "4,194,304.00 GiB" in message and "train.batch_size" in message
    (step,) = saved(tmp_path / "run")
    assert message.endswith(f"step-{step:08d}")
    assert train(world, tmp_path / "run", train__steps=9) == 0
    assert train(world, tmp_path / "whole", train__steps=9) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


# Signals


def test_ctrl_c_before_training(world: World, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    os.mkfifo(config)  # whose reader waits for what never comes
    command = Command("stages.stage2_video", [str(config), *arguments(world, tmp_path / "run")[1:]], tmp_path / "log")
    with open(config, "w"):
        time.sleep(0.2)
        os.kill(command.pid, signal.SIGINT)
        assert command.wait() == 130
    assert "Traceback" not in command.err
    assert len(command.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"RANK": "one"}, "RANK='one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2: expected 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK=''"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but RANK is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)
def test_a_bad_environment(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: Any, monkeypatch: pytest.MonkeyPatch,
    environment: Any, shown: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shown in ends(DATA)
    assert stage2_video.main([*arguments(world, tmp_path / "run"), "--dry-run"]) == DATA
    assert shown in capsys.readouterr().err


# Weights and steps that are not finite


def test_the_advice_fits(world: World, tmp_path: Path, ends: Any) -> None:
    changes = {"optim__lr": 1e35, "train__max_bad_steps": 2, "train__steps": 9, "checkpoint__every": 50}
    message = ends(MACHINE, **changes, optim__clip_norm=0.0)
    assert "a lower optim.lr or optim.clip_norm=1 may help" in message
    message = ends(MACHINE, **changes, train__dtype="bf16", run__dir=str(tmp_path / "bf16"))
    assert 'a lower optim.lr or train.dtype="fp32" may help' in message
    spoilt = {**changes, "optim__lr": 1e39}
    assert "The weights themselves are no longer finite" in ends(MACHINE, **spoilt, run__dir=str(tmp_path / "spoilt"))
    every = {**spoilt, "checkpoint__every": 1, "run__dir": str(tmp_path / "every")}
    assert "step 1 is not saved. The weights themselves are no longer finite" in ends(MACHINE, **every)
    assert saved(tmp_path / "every") == []


# Checkpoints in the background


def test_a_failed_run_waits_for_its_writer(
    world: World, tmp_path: Path, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointWriter._write

    def slowly(self: CheckpointWriter, *arguments: Any) -> None:
        time.sleep(1)
        write(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "_write", slowly)
    evaluate = Trainer._evaluate

    def fail(self: Trainer, **keywords: Any) -> None:
        if self.state.step == 3:
            raise FileNotFoundError(2, "No such file or directory", "somewhere")
        evaluate(self, **keywords)

    monkeypatch.setattr(Trainer, "_evaluate", fail)
    message = ends(MACHINE, checkpoint__background=True, checkpoint__every=2, train__steps=9)
    assert "somewhere" in message
    assert saved(tmp_path / "run") == [2, 3]


# Empty prompts


@pytest.mark.parametrize("prompt", ["", " \t", "\u200b", "\n"])
def test_an_empty_prompt_is_refused_everywhere(world: World, tmp_path: Path, ends: Any, prompt: str) -> None:
    assert "sample.prompts: prompt 2 is empty" in ends(DATA, sample__prompts=["a cat", prompt])
    frame = pd.read_parquet(world.manifest("clips"))
    frame.loc[2, "caption"] = prompt
    frame.to_parquet(tmp_path / "clips.parquet")
    assert "row 3 (id 'clips-2'): caption is empty" in ends(DATA, data__manifest=str(tmp_path / "clips.parquet"))
    (tmp_path / "weights").touch()
    arguments = [str(tmp_path / "weights"), "--prompt", prompt, "--out", str(tmp_path / "out")]
    assert sample.main(arguments) == 2


def test_the_printed_command_takes_any_prompt(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt in ("-- a dash, 'quotes' and $HOME", "plain"):
        assert train(world, tmp_path / f"run {prompt[0]}", sample__prompts=[prompt], train__steps=1) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample it: ")]
        words = shlex.split(line)[5:]
        parsed = sample.parse(words)
        assert parsed.prompt == [prompt]
        assert parsed.source == tmp_path / f"run {prompt[0]}"
