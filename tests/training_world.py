"""A small world to train in: tiny frozen models, pictures and clips on disk, configs, and stages as real processes.

They are forked from a server (see processes.py), and are ordinary processes all the same, with their own pid to kill.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from opensora_repro.data.write import write_png, write_video
from tests.frames import write_manifest
from tests.processes import forked

SIZE = 32  # pixels of a picture's side
FRAMES = 12  # of a clip on disk
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
WALL_CLOCK = ("seconds", "data_seconds")


@dataclass(frozen=True)
class World:
    """Folders of tiny frozen models and manifests of `images`, `clips` and held-out `val` clips."""

    root: Path
    vae: Path
    text: Path
    latent_channels: int
    caption_channels: int
    max_length: int = 8

    def manifest(self, name: str) -> Path:
        return self.root / f"{name}.parquet"

    def arguments(self, run_dir: Path, data: str, **changes: Any) -> list[str]:
        """Overrides for a tiny run; `changes` are `section__key=value`."""
        image = data == "images"
        settings = {
            "run__dir": str(run_dir),
            "data__manifest": str(self.manifest(data)),
            "data__num_frames": 1 if image else 4,
            "data__frame_interval": 1,
            "data__height": SIZE,
            "data__width": SIZE,
            "data__num_workers": 0,
            "vae__path": str(self.vae),
            "text__path": str(self.text),
            "model__in_channels": self.latent_channels,
            "model__hidden_size": 32,
            "model__depth": 2,
            "model__num_heads": 4,
            "model__caption_channels": self.caption_channels,
            "model__model_max_length": self.max_length,
            "model__temporal_attention": not image,
            "optim__lr": 1e-3,
            "train__batch_size": 2,
            "train__dtype": "fp32",
            "train__activation_checkpointing": "none",
            "ema__decay": 0.9,
            **changes,
        }
        if settings.get("model__architecture", "stdit") != "stdit":  # a key of STDiT's
            del settings["model__temporal_attention"]
        return [f"{name.replace('__', '.', 1)}={_toml(value)}" for name, value in settings.items()]


def _toml(value: Any) -> str:
    return json.dumps(value)  # TOML's numbers, booleans, strings and lists are written alike


def make_world(root: Path) -> World:
    from tests.tiny_models import make_tiny_text, make_tiny_vae

    vae, text = root / "vae", root / "text"
    make_tiny_vae(vae)
    make_tiny_text(text)
    (root / "empty.toml").write_text("")
    channels = json.loads((vae / "config.json").read_text())["latent_channels"]
    width = json.loads((text / "config.json").read_text())["d_model"]
    for name, count, frames in (("images", 10, 1), ("clips", 7, FRAMES), ("val", 3, FRAMES)):
        write_manifest(pd.DataFrame(_make_clips(root / name, count, frames)), root / f"{name}.parquet")
    return World(root, vae, text, channels, width)


def _make_clips(folder: Path, count: int, frames: int) -> list[dict[str, Any]]:
    """Squares moving over a dark ground, one colour and way each."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(count):
        colour = list(COLOURS)[index % len(COLOURS)]
        video = np.full((frames, SIZE, SIZE, 3), 8 * index, dtype=np.uint8)
        for t in range(frames):
            x = (3 * index + 2 * t) % (SIZE - 8)
            video[t, 8 + index : 16 + index, x : x + 8] = COLOURS[colour]
        path = folder / f"clip{index}{'.png' if frames == 1 else '.mp4'}"
        if frames == 1:
            write_png(path, video[0])
        else:
            write_video(path, video, 8)
        caption = f"a {colour} square number {index}"
        rows.append(
            {"id": f"{folder.name}-{index}", "path": str(path), "caption": caption, "num_frames": frames, "fps": 8.0,
             "height": SIZE, "width": SIZE}
        )  # fmt: skip
    return rows


def _child(module: str, arguments: list[str], log: str, environment: dict[str, str], parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    with open(log + ".out", "wb") as out, open(log + ".err", "wb") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a user starts
    importlib.import_module("torch").set_num_threads(1)
    sys.exit(importlib.import_module(module).main(arguments))


def _end_with(parent: int) -> None:
    """A test that is killed leaves no training behind."""
    while True:
        time.sleep(1)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


@dataclass
class Command:
    """A stage running in a process of its own."""

    module: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # The server of forked processes was started by an earlier test, with what the environment was then.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        target = (self.module, self.arguments, str(self.log), environment, os.getpid())
        self.process = forked.Process(target=_child, args=target)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, seconds: float = 240) -> int:
        """The exit code; minus the signal's number for a killed process."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.module} still runs after {seconds} s; it said: {self.out}{self.err}")
        return self.process.exitcode

    @property
    def out(self) -> str:
        return Path(f"{self.log}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.log}.err").read_text()


def succeed(module: str, arguments: list[str], log: Path) -> Command:
    """Run to the end; fail with what was said when the exit code is not 0."""
    command = Command(module, arguments, log)
    code = command.wait()
    assert code == 0, f"exit {code}\n{command.out}\n{command.err}"
    return command


def start_processes(module: str, arguments: list[str], count: int, log: Path) -> list[Command]:
    """What torchrun does: processes that find each other through the environment."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Command(module, arguments, log / f"rank{rank}", {"RANK": str(rank), "LOCAL_RANK": str(rank), **shared})
        for rank in range(count)
    ]


def finish(commands: list[Command]) -> None:
    """Wait for all; fail with what was said where an exit code is not 0."""
    for command in commands:
        code = command.wait()
        assert code == 0, f"exit {code}\n{command.out}\n{command.err}"


def wait_for_step(run_dir: Path, step: int, command: Command, seconds: float = 240) -> None:
    """Until metrics.jsonl holds the step's line, or the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = run_dir / "metrics.jsonl"
        if path.exists() and len(path.read_bytes().splitlines()) >= step:
            return
        if command.process.exitcode is not None:
            raise AssertionError(f"ended with {command.process.exitcode} before step {step}: {command.err}")
        time.sleep(0.005)
    raise TimeoutError(f"no step {step} within {seconds} s: {command.out}{command.err}")


def metrics(run_dir: Path) -> list[str]:
    """The lines of metrics.jsonl without wall-clock times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: line[key] for key in line if key not in WALL_CLOCK}) for line in lines]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in metrics(run_dir)]


def newest_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of the newest checkpoint's files, as its state.json records them."""
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    hashes: dict[str, str] = json.loads((newest / "state.json").read_text())["sha256"]
    return {name: value for name, value in hashes.items() if name.endswith(".safetensors")}


def newest_tensors(run_dir: Path, name: str = "model") -> dict[str, np.ndarray]:
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    tensors: dict[str, np.ndarray] = load_file(newest / f"{name}.safetensors")
    return tensors


def free_port() -> int:
    """One that is free, below those that systems hand out: no other test's connection has it before it is used.

    Each of the processes that tests run in has a range of its own, or two could be given one port.
    """
    begin = 20000 + 1500 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8)
    while True:
        port = begin + secrets.randbelow(1500)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
