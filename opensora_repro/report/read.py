"""What lies in a run's folder, of whatever stage and however far it came, as a page needs it."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError, read_toml
from opensora_repro.files import read_json
from opensora_repro.run_folder import (
    ALARMS_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
    WEIGHTS_FILE,
    JsonLines,
    list_checkpoints,
    list_steps,
    samples_folder,
    step_of,
)

MOST_STEPS = 20_000  # lines that are read of a run's metrics: those of longer ones are as many, evenly spread
Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """`steps`: lines of metrics.jsonl, every `stride`-th of a long run."""

    path: Path
    name: str
    config: dict[str, Any]  # by section.key
    steps: Lines
    stride: int
    validations: Lines
    evaluations: Lines
    alarms: Lines
    starts: Lines
    weights: Mapping[str, Any]
    measured: Sequence[tuple[str, Mapping[str, Any]]]  # evaluation.json of stages.evaluate, by where it lies
    samples: Sequence[tuple[int, Path]]  # folders, by step
    checkpoints: Sequence[int]

    @property
    def step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def last_start(self) -> Mapping[str, Any]:
        return self.starts[-1] if self.starts else {}

    def points(self, key: str) -> list[tuple[float, float]]:
        """Of each step that has the value."""
        return points_of(self.steps, key)

    @property
    def seconds(self) -> float:
        """Of training, validation and samples apart."""
        return self.stride * sum(line["seconds"] for line in self.steps)

    @property
    def device_seconds(self) -> float:
        """Each step times the processes that it had."""
        return self.stride * sum(line["seconds"] * start.get("processes", 1) for line, start in self._with_starts())

    def _with_starts(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        starts = itertools.chain(self.starts, [{"step": float("inf")}])
        now: Mapping[str, Any] = {}
        following = next(starts)
        for line in self.steps:
            while line["step"] > following["step"]:
                now, following = following, next(starts)
            yield line, now

    def rate(self, key: str) -> float:
        """So many a second, of the median step."""
        rates = [line[key] / line["seconds"] for line in self.steps if line.get(key) and line["seconds"]]
        return statistics.median(rates) if rates else 0.0


def read_run(path: Path, name: str = "") -> Run:
    """Raises ConfigError for what is no run."""
    if not any((path / file).is_file() for file in (CONFIG_FILE, METRICS_FILE)):
        raise ConfigError(f"{path}: no run lies there (it has neither {CONFIG_FILE} nor {METRICS_FILE})")
    config = read_toml(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
    steps, stride = _steps(path / METRICS_FILE)
    folders = [folder for folder in list_steps(samples_folder(path)) if (folder / "grid.png").is_file()]
    return Run(
        path=path,
        name=name or path.resolve().name,
        config={f"{section}.{key}": value for section, own in config.items() for key, value in own.items()},
        steps=steps,
        stride=stride,
        validations=JsonLines(path / VALIDATION_FILE).read(),
        evaluations=JsonLines(path / EVALUATION_FILE).read(),
        alarms=JsonLines(path / ALARMS_FILE).read(),
        starts=JsonLines(path / STARTS_FILE).read(),
        weights=read_json(path / WEIGHTS_FILE),
        measured=[(str(file), read_json(file)) for file in _evaluations(path)],
        samples=[(step_of(folder), folder) for folder in folders],
        checkpoints=[step_of(folder) for folder in list_checkpoints(path)],
    )


def _evaluations(path: Path) -> list[Path]:
    return [file for file in (path / "evaluation.json", *sorted(path.glob("*/evaluation.json"))) if file.is_file()]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs by names that tell them apart: a folder's, or as much of its path as that takes."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def points_of(lines: Lines, key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines if isinstance(line.get(key), int | float)]


def _steps(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Lines and how many each stands for; the last one is always among them. Only what is kept is parsed."""
    if not path.is_file():
        return [], 1
    lines = path.read_bytes().splitlines()
    stride = max(1, -(-len(lines) // MOST_STEPS))
    found = []
    for line in lines[(len(lines) - 1) % stride :: stride]:
        try:
            found.append(json.loads(line))
        except ValueError:  # cut short by a kill
            continue
    return [line for line in found if isinstance(line, dict) and {"step", "seconds"} <= line.keys()], stride
