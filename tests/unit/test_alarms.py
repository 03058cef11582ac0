"""Alarms go off where a training fails, once, and nowhere else: over series that small trainings really left."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora_repro.config import AlarmsConfig, Config, ConfigError, TrainConfig, parse_config
from opensora_repro.demo.shapes import training_scenes
from opensora_repro.process import available_cpus
from opensora_repro.training import alarms
from opensora_repro.training.alarms import Alarms
from opensora_repro.training.metrics import RunLog


def learn(
    steps: int, *, samples: int = 4096, lr: Callable[[int], float] = lambda step: 3e-3, width: int = 64, every: int = 50
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A network of one hidden layer learns a noisy function: the lines of its steps and of its validations."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples + 512, 8))
    y = np.sin(x[:, :1] * x[:, 1:2]) + np.abs(x[:, 2:3]) + 0.5 * rng.normal(size=(len(x), 1))
    weights = [rng.normal(size=(8, width)) / 3, rng.normal(size=(width, 1)) / width**0.5]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    lines, validations = [], []
    for step in range(1, steps + 1):
        rows = rng.integers(0, samples, 32)
        hidden = np.tanh(x[rows] @ weights[0])
        error = hidden @ weights[1] - y[rows]
        out = 2 * error / len(rows)
        gradients = [x[rows].T @ (out @ weights[1].T * (1 - hidden**2)), hidden.T @ out]
        for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient**2 - second)
            weight -= lr(step) * first / (np.sqrt(second) + 1e-8)
        norm = float(np.sqrt(sum((gradient**2).sum() for gradient in gradients)))
        line = {"step": step, "loss": float((error**2).mean()), "grad_norm": norm, "lr": lr(step), "samples": 32}
        lines.append({**line, "seconds": 1.0, "data_seconds": 0.0, "tokens": 32})
        if step % every == 0:
            held_out = float(((np.tanh(x[samples:] @ weights[0]) @ weights[1] - y[samples:]) ** 2).mean())
            validations.append({"step": step, "loss": held_out})
    return lines, validations


@pytest.fixture(scope="module")
def healthy() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return learn(900, lr=lambda step: 3e-3 * min(1, step / 50) * min(1, (950 - step) / 300))


class Watched:
    """A run's folder with alarms, to which lines are given as a run writes them."""

    def __init__(self, folder: Path, resumed: int = 0, steps: int = 900, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.log = RunLog(folder, resumed_step=resumed, enabled=True)
        cfg = replace(Config(), train=TrainConfig(steps=steps), alarms=AlarmsConfig(**settings))
        self.alarms, self.said = Alarms(cfg, self.log), list[str]()

    def go(self, lines: list[dict[str, Any]], validations: list[dict[str, Any]] = [], epoch: int = 0) -> list[str]:  # noqa: B006
        by_step = {line["step"]: line for line in validations}
        for line in lines:
            self.log.metrics.write(line)
            if line["step"] in by_step:
                self.log.validation.write(by_step[line["step"]])
            if alarms.is_due(line["step"]):
                self.said += self.alarms.look(line["step"], epoch)
        return self.said

    def names(self) -> list[str]:
        return [line["alarm"] for line in self.log.alarms.read()]


def test_a_healthy_training_is_silent(tmp_path: Path, healthy: Any) -> None:
    assert Watched(tmp_path / "run").go(*healthy) == []
    assert not (tmp_path / "run" / "alarms.jsonl").exists()
    # Steps of two buckets, of which one has thrice the loss, and works at another speed
    mixed = [
        {**line, "loss": 3 * line["loss"], "tokens": 96} if line["step"] * 7 % 10 < 4 else line for line in healthy[0]
    ]
    assert Watched(tmp_path / "mixed").go(mixed) == []


def test_loss_and_gradient_that_leave_their_band_are_told_once(tmp_path: Path) -> None:
    lines, _ = learn(700, lr=lambda step: 1.0 if 400 <= step < 550 else 3e-3)
    watched = Watched(tmp_path / "run")
    said = watched.go(lines)
    assert sorted(watched.names()) == ["gradient", "loss"]
    (loss,) = [line for line in said if "loss" in line.split(",")[0]]
    assert loss.startswith("alarm: loss, step 450: the loss is ") and "over those before" in loss
    events = list((tmp_path / "run" / "tensorboard").glob("events*"))
    watched.log.close()
    assert b"alarms/loss" in events[0].read_bytes()


def test_a_gradient_that_vanishes(tmp_path: Path, healthy: Any) -> None:
    dead = [{**line, "grad_norm": 1e-9} if line["step"] > 600 else line for line in healthy[0]]
    watched = Watched(tmp_path / "run")
    watched.go(dead)
    assert watched.names() == ["gradient"]


def test_steps_that_are_not_finite_leave_the_band(tmp_path: Path, healthy: Any) -> None:
    watched = Watched(tmp_path / "run")
    watched.go([{**line, "loss": None, "grad_norm": None} if line["step"] > 600 else line for line in healthy[0]])
    assert sorted(watched.names()) == ["gradient", "loss"]


def test_what_is_on_is_on_until_it_is_over(tmp_path: Path, healthy: Any) -> None:
    """Between its limit and half of it nothing changes; below, the next time is another one."""
    levels = {500: 1.0, 550: 3.0, 600: 2.6, 650: 3.0, 700: 1.0, 750: 1.0, 800: 3.0}
    base = np.random.default_rng(0).normal(1, 0.05, 900)
    lines = [
        {**line, "loss": base[line["step"] - 1] * levels.get((line["step"] - 1) // 50 * 50, 1.0)} for line in healthy[0]
    ]
    watched = Watched(tmp_path / "run")
    watched.go(lines)
    assert [line["step"] for line in watched.log.alarms.read() if line["alarm"] == "loss"] == [600, 850]


def test_a_resumed_run_does_not_tell_it_again(tmp_path: Path) -> None:
    lines, _ = learn(600, lr=lambda step: 1.0 if step >= 400 else 3e-3)
    Watched(tmp_path / "run").go(lines[:450])
    before = (tmp_path / "run" / "alarms.jsonl").read_text()
    assert before
    again = Watched(tmp_path / "run", resumed=449)  # what step 450 has told was lost with it
    assert again.names() == []
    again.go(lines[449:450])
    assert (tmp_path / "run" / "alarms.jsonl").read_text() == before
    resumed = Watched(tmp_path / "whole")
    resumed.go(lines[:450])
    resumed = Watched(tmp_path / "whole", resumed=450)
    resumed.go(lines[450:500])
    assert (tmp_path / "whole" / "alarms.jsonl").read_text() == before
    stopping = Watched(tmp_path / "whole", resumed=500, stop=("loss",))
    stopping.alarms.look(500, 0)
    assert stopping.alarms.error is not None and "alarm 'loss' of alarms.stop" in str(stopping.alarms.error)


def test_overfitting_is_held_out_loss_that_rises_while_training_falls(tmp_path: Path, healthy: Any) -> None:
    overfit = learn(900, samples=48, width=256)
    watched = Watched(tmp_path / "run")
    (line,) = [line for line in watched.go(*overfit) if "overfitting" in line]
    assert "held-out loss is" in line and "training's has fallen from" in line
    watched = Watched(tmp_path / "diverging")  # both rise
    watched.go(*learn(900, lr=lambda step: 3e-3 + max(0, step - 300) * 2e-4))
    assert "overfitting" not in watched.names()
    before = (tmp_path / "run" / "alarms.jsonl").read_text()
    resumed = Watched(tmp_path / "run", resumed=900)  # which has to look its losses up
    assert resumed.alarms.look(900, 0) == [] and "overfitting" in resumed.alarms._on
    assert (tmp_path / "run" / "alarms.jsonl").read_text() == before


def test_held_out_loss_that_is_not_finite_ends_no_run(tmp_path: Path, healthy: Any) -> None:
    """A validation that overflows has no number; nor has each of its noise levels."""
    lines, validations = healthy
    watched = Watched(tmp_path / "run", stop=("loss",))
    gone = [{**line, "loss": float("inf"), "losses": [float("nan"), 1.0]} for line in validations[8:]]
    watched.go(lines, validations[:8] + gone)
    written = (tmp_path / "run" / "validation.jsonl").read_text()
    assert '"loss": null, "losses": [null, 1.0]' in written and "NaN" not in written
    assert "overfitting" not in watched.names()
    assert watched.alarms._best() == "none yet"
    for step in (400, 450):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    assert watched.alarms._best().endswith("step-00000400")
    (line,) = alarms.average_lags([validation(1, of_trained=0.5, of_average=None)] * 2, 1).splitlines()  # type: ignore[arg-type]
    assert "averaged weights have a held-out loss of inf" in line


def test_throughput_that_falls_for_a_while(tmp_path: Path, healthy: Any) -> None:
    def go(name: str, steps: range, step_seconds: float = 1.0, every: int = 1) -> list[str]:
        """Steps of these numbers wait for data thrice as long as they work; every so many for all of them."""

        def timed(line: dict[str, Any]) -> dict[str, Any]:
            waits = line["step"] in steps and line["step"] % every == 0
            waited = 3 * every * step_seconds if waits else 0.0
            return {**line, "seconds": step_seconds + waited, "data_seconds": waited}

        watched = Watched(tmp_path / name)
        watched.go([timed(line) for line in healthy[0][:700]])
        assert set(watched.names()) <= {"throughput"}
        return watched.said

    expected = (
        "alarm: throughput, step 400: 25% of the speed of the steps before, for 400 s; 75% of that is waiting for data"
    )
    for every in (1, 10):  # bursts, too
        (line,) = go(f"slow{every}", range(301, 701), every=every)
        assert line.startswith(expected) and line.endswith(f" on {available_cpus()} CPUs")
    assert go("moment", range(301, 351)) == []  # one block
    assert go("short", range(301, 401), step_seconds=0.1) == []  # 40 seconds
    (line,) = go("quick", range(301, 701), step_seconds=0.11)  # a minute at last
    assert line.startswith("alarm: throughput, step 450: 25%")


def validation(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, **values}


def test_an_activation_that_saturates() -> None:
    usual = [validation(step, activation=10.0 + step) for step in range(4)]
    assert not alarms.saturates(usual, 1)
    assert "is 4e+04, 13 a validation before" in alarms.saturates([*usual, validation(4, activation=4e4)], 1)
    assert alarms.saturates([*usual, validation(4, activation=200.0)], 1)  # tenfold
    assert not alarms.saturates([*usual[:2], validation(4, activation=200.0)], 1)  # when little is known
    assert alarms.saturates([validation(0, activation=None)], 1)  # type: ignore[arg-type]  # infinite


def test_an_average_that_lags_twice() -> None:
    def lines(*ratios: float) -> list[dict[str, Any]]:
        return [validation(step, of_trained=0.5, of_average=0.5 * ratio) for step, ratio in enumerate(ratios)]

    assert not alarms.average_lags(lines(1.5), 1)
    assert not alarms.average_lags(lines(1.5, 1.0), 1)
    assert "lower ema.decay" in alarms.average_lags(lines(1.5, 1.2), 1)


def test_text_that_is_ignored_twice() -> None:
    def lines(*gaps: Any) -> list[dict[str, Any]]:
        return [{"step": step, "metrics": {"loss": 0.5, "caption_gap": gap}} for step, gap in enumerate(gaps)]

    assert not alarms.text_is_ignored(lines(0.0))
    assert not alarms.text_is_ignored(lines(0.0, 0.02))
    assert "text is ignored" in alarms.text_is_ignored(lines(0.0, 0.0005))
    assert alarms.text_is_ignored(lines({"value": -0.01, "low": -0.02, "high": 0.0}, 0.0))
    assert not alarms.text_is_ignored([{"step": 1, "metrics": {"frechet": 3.0}}] * 2)


def test_clips_seen_too_often(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", epochs=10)
    assert watched.alarms.look(1, 9) == []
    assert watched.alarms.look(2, 10) == ["alarm: repeats, step 2: every clip has been seen 10 times"]
    assert watched.alarms.look(3, 11) == []
    assert Watched(tmp_path / "never", epochs=0).alarms.look(1, 999) == []


# Samples


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [scene.frames(count=8, size=96) for scene in itertools.islice(training_scenes(1, seed=0), 6)]


def made_of_noise(count: int) -> list[np.ndarray]:
    """Noise as the demo's autoencoder, which smoothes it, decodes it."""
    from opensora_repro.config import VaeConfig
    from opensora_repro.frozen.vae import open_vae
    from opensora_repro.sampling.generate import decode

    repo = Path(__file__).resolve().parents[2]
    vae = open_vae(VaeConfig(path=str(repo / "checkpoints/demo/vae")), "cpu", torch.float32)
    generator = torch.Generator().manual_seed(count)
    latents = torch.randn(count, *vae.latent_shape(4, 96, 96), generator=generator)
    with torch.no_grad():
        return [decode(vae, latent, num_frames=4) for latent in latents]


def test_samples_that_turn_to_noise_one_colour_or_stills(tmp_path: Path, clips: list[np.ndarray]) -> None:
    watched = Watched(tmp_path / "run", stop=("noise",))
    watched.alarms.clips, watched.alarms.noise = (lambda: clips), (lambda: made_of_noise(4))
    samples, noise = clips[:4], made_of_noise(5)

    def look(step: int, videos: list[np.ndarray]) -> list[str]:
        return [line.split(",")[0] for line in watched.alarms.look_at_samples(step, videos, 8)]

    assert look(10, noise) == []  # of a model that has hardly begun
    assert look(20, samples) == []
    assert look(25, [*samples, noise[0]]) == []  # one of many
    assert watched.alarms.error is None
    assert look(30, noise) == ["alarm: noise"] and look(40, noise) == [] and look(50, samples) == []
    assert "5 of 5 samples look like noise" in str(watched.alarms.error)
    assert look(60, [np.full_like(video, 90) for video in samples]) == ["alarm: flat", "alarm: motion"]
    assert look(70, samples) == []
    assert look(80, [np.repeat(video[:1], 8, axis=0) for video in samples]) == ["alarm: motion"]
    assert look(90, []) == ["alarm: noise"]
    white = np.random.default_rng(0).integers(0, 256, (3, 1, 96, 96, 3), dtype=np.uint8)
    assert look(100, samples) == [] and look(110, list(white)) == ["alarm: noise"]  # pictures
    assert watched.names() == ["noise", "flat", "motion", "motion", "noise", "noise"]


def test_one_colour_with_some_noise_left_is_one_colour() -> None:
    """As a model leaves it that has learned a single colour."""
    scenes = itertools.islice(training_scenes(1, seed=0), 12)
    usual = alarms.Look.of([scene.frames(count=8, size=96) for scene in scenes], 8)
    blocks = np.random.default_rng(0).normal(40, 4.7, (3, 1, 12, 12, 1)).repeat(8, 2).repeat(8, 3)
    found = alarms.Look.of(blocks.astype(np.uint8).repeat(3, axis=-1), 8)
    assert min(found.contrast) > 4.5 and found.is_flat(usual, 1)


def test_real_footage_is_no_noise(videos_dir: Path) -> None:
    from opensora_repro.data.video import read_frames

    found = [read_frames(videos_dir / name, start=0, count=4).numpy() for name in ("fx_dev.mp4", "long_dev.mp4")]
    looks = alarms.Look.of(found, 8)
    assert min(looks.likeness) > 0.85 and not looks.is_noise(looks, alarms.Look.of(made_of_noise(2), 8), 1)


# What is asked for


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"alarms.stop = \[\"nosie\"\]: expected names out of noise, flat, motion"):
        parse_config({"alarms": {"stop": ["nosie"]}})
    assert parse_config({"alarms": {"off": ["noise", "text"]}}).alarms.off == ("noise", "text")


def test_what_is_off_is_not_told(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", off=("repeats",))
    assert list(itertools.chain(*(watched.alarms.look(step, 1000) for step in (1, 2)))) == []


def test_the_end_names_the_best_checkpoint(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", stop=("repeats",))
    for step, loss in ((10, 0.5), (20, 0.4), (30, 0.6)):
        (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        watched.log.validation.write({"step": step, "loss": loss})
    watched.alarms.look(30, 1000)
    assert f"best checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-00000020'}" in str(watched.alarms.error)
    assert json.loads((tmp_path / "run" / "alarms.jsonl").read_text())["alarm"] == "repeats"
