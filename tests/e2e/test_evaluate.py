"""`stages.evaluate` as a user types it, and `[evaluate]` in a run with its best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from opensora_repro.data.write import write_video
from opensora_repro.run_folder import best_checkpoint, list_checkpoints
from stages import sample, stage2_video
from stages.evaluate import main
from tests.frames import write_manifest
from tests.tiny_models import make_tiny_clip, make_tiny_i3d
from tests.training_world import World, finish, make_world, start_processes

FRAMES = 6  # of the samples of tests/sample_home.py


def make_clips(folder: Path, name: str, count: int) -> Path:
    """A manifest of squares that move; their captions differ."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        video = np.full((FRAMES, 32, 48, 3), 20 + 5 * number, dtype=np.uint8)
        for t in range(FRAMES):
            video[t, 2 * number : 2 * number + 12, 3 * t : 3 * t + 14, number % 3] = 250
        path = folder / f"{name}{number}.mp4"
        write_video(path, video, 8)
        rows.append(
            {"id": f"{name}-{number}", "path": str(path), "caption": f"a square number {number}", "fps": 8.0,
             "num_frames": FRAMES, "height": 32, "width": 48}
        )  # fmt: skip
    write_manifest(pd.DataFrame(rows), folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options: tiny models, held-out clips, training clips."""
    root = tmp_path_factory.mktemp("given")
    (root / "prompts.json").write_text(json.dumps([{"prompt_en": "a red square", "dimension": ["color"]}]))
    return {
        "--manifest": str(make_clips(root, "held", 4)),
        "--train": str(make_clips(root, "train", 3)),
        "--features": str(make_tiny_i3d(root / "i3d.pt")),
        "--clip": str(make_tiny_clip(root / "clip")),
        "--vbench": str(root / "prompts.json"),
    }


def evaluate(sources: list[Path], out: Path, options: dict[str, str], *more: str) -> int:
    words = [word for pair in options.items() for word in pair]
    return main([*map(str, sources), "--out", str(out), "--device", "cpu", *words, *more])


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return content


def test_checkpoints_side_by_side(
    home: Path, tmp_path: Path, given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources, out = [home / "flow" / "checkpoints" / "step-00000005", home / "flow"], tmp_path / "out"
    assert evaluate(sources, out, given, "--samples", "5", "--levels", "0.2", "0.8") == 0
    printed, found = capsys.readouterr().out, read(out)
    assert found["manifest"] == given["--manifest"]
    first, second = found["checkpoints"]
    assert [of["step"] for of in (first, second)] == [5, 20]
    names = {
        "loss", "loss@0.2", "loss@0.8", "caption_gap", "motion_gap", "frechet", "kernel", "frechet_floor", "clip_score",
        "text_match", "flicker", "motion", "motion_distance", "sharpness", "static", "blank", "noise", "memorised",
        "psnr", "ssim", "reconstruction_frechet", "data/motion",
    }  # fmt: skip
    for of in (first, second):
        assert names <= of["metrics"].keys()
        assert (of["clips"], of["samples"]) == (4, 5)
        loss = of["metrics"]["loss"]
        assert loss["low"] < loss["value"] < loss["high"]
        assert of["metrics"]["memorised"]["value"] == 0
        assert any("5 samples against 4 held-out clips" in note for note in of["notes"])
        folder = out / of["name"]
        assert {path.name for path in (folder / "vbench").iterdir()} == {f"a red square-{i}.mp4" for i in range(5)}
        assert (folder / "nearest.png").stat().st_size > 500
    assert first["metrics"]["psnr"] == second["metrics"]["psnr"]  # of one autoencoder
    assert first["metrics"]["loss"] != second["metrics"]["loss"]
    assert "| frechet " in printed and printed.split("\n\n")[1].strip() in (out / "evaluation.md").read_text()

    # The same command has nothing to do; what was lost is made again; VBench's results are read.
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    (lost,) = out.glob("flow-step-00000020/samples-*/0003.mp4")
    lost.unlink()
    results = json.loads((out / "flow-step-00000005" / "results.json").read_text())
    del results["distances"]
    (out / "flow-step-00000005" / "results.json").write_text(json.dumps(results))
    (out / "flow-step-00000005" / "vbench" / "x_eval_results.json").write_text('{"color": [0.5, []]}')
    assert evaluate(sources, out, given, "--samples", "5", "--levels", "0.2", "0.8") == 0
    again = read(out)
    assert again["checkpoints"][0]["metrics"].pop("vbench/color") == 0.5
    assert again == found
    assert {path for path, time in made.items() if path.stat().st_mtime_ns != time} == {lost}


def test_mistakes_are_one_line(
    home: Path, tmp_path: Path, given: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    short = make_clips(tmp_path, "held", 1)
    table = pd.read_parquet(short)
    write_manifest(table.assign(num_frames=FRAMES - 1), short)
    for sources, changes, message in (
        ([home / "flow"], {"--manifest": str(short)}, f"none of its 1 clips has {FRAMES} frames"),
        ([home / "flow"], {"--manifest": str(tmp_path / "gone")}, "--manifest"),
        ([home / "flow"], {"--features": str(tmp_path)}, "--features="),
        ([home / "flow"], {"--samples": "-1"}, "--samples -1: expected at least 0"),
        ([home / "flow"], {"--levels": "1.5"}, "--levels 1.5: expected shares"),
        ([home / "gone"], {}, "no such run, checkpoint or weights file"),
        ([home / "empty"], {}, "holds no"),
    ):
        code = evaluate(sources, tmp_path / "out", {**given, "--samples": "0", **changes})
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert (code, error.startswith("error: ")) == (2, True), error
        assert message in error or sources[0].name == "empty", error


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def train(world: World, run: Path, steps: int, **changes: Any) -> None:
    settings = {
        "data__val_manifest": str(world.manifest("val")),
        "train__steps": steps,
        "checkpoint__every": 2,
        "checkpoint__keep": 1,
        "checkpoint__keep_best": "loss",
        "validation__every": 2,
        "validation__timesteps": [0.3, 0.7],
        "evaluate__every": 2,
        "evaluate__samples": 2,
        "evaluate__steps": 2,
        "sample__sampler": "ddim",
        **changes,
    }
    assert stage2_video.main([str(world.root / "empty.toml"), *world.arguments(run, "clips", **settings)]) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_evaluates_itself_and_keeps_its_best(world: World, tmp_path: Path) -> None:
    """Stopped and resumed, it is evaluated as the uninterrupted one; its loss is the validation's."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    features = str(make_tiny_i3d(tmp_path / "i3d.pt"))
    for steps in (2, 6):
        train(world, run, steps, evaluate__features=features)
    train(world, whole, 6, evaluate__features=features)
    assert (run / "evaluation.jsonl").read_text() == (whole / "evaluation.jsonl").read_text()
    found = lines(run / "evaluation.jsonl")
    assert [line["step"] for line in found] == [2, 4, 6]
    for line, validated in zip(found, lines(run / "validation.jsonl"), strict=True):
        metrics = line["metrics"]
        assert metrics["loss"] == pytest.approx(validated["loss"], rel=1e-5)
        assert [metrics["loss@0.3"], metrics["loss@0.7"]] == pytest.approx(validated["losses"], rel=1e-6)
        assert {
            "caption_gap",
            "motion_gap",
            "frechet",
            "kernel",
            "flicker",
            "noise",
            "motion_distance",
        } <= metrics.keys()
    best = min(found, key=lambda line: line["metrics"]["loss"])["step"]
    kept = best_checkpoint(run)
    assert kept is not None and kept.name == f"step-{best:08d}"
    assert {path.name for path in list_checkpoints(run)} == {f"step-{best:08d}", "step-00000006"}
    out = tmp_path / "out"
    assert sample.main([str(run), "--best", "--prompt", "a red square", "--out", str(out), "--device", "cpu"]) == 0
    assert json.loads((out / "samples.json").read_text())["checkpoint"] == str(kept)


def test_the_best_one_stays_though_it_is_old(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate that ruins what there was, the first is the best; another metric may have another."""
    run = tmp_path / "run"
    changes = {"evaluate__every": 0, "optim__lr": 0.3, "optim__clip_norm": 0.0, "ema__decay": 0.0}
    train(world, run, 6, **changes)
    losses = {line["step"]: line["loss"] for line in lines(run / "validation.jsonl")}
    assert min(losses, key=lambda step: losses[step]) == 2, losses
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002", "step-00000006"]
    assert (run / "checkpoints" / "best").readlink() == Path("step-00000002")
    capsys.readouterr()
    assert sample.main([str(tmp_path), "--best", "--prompt", "x", "--out", str(tmp_path / "out")]) == 2
    assert "has no checkpoints/best" in capsys.readouterr().err


def test_a_dry_run_refuses_what_a_run_would(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything long starts, in one line."""
    settings = {"evaluate__every": 2, "data__val_manifest": str(world.manifest("val"))}
    for changes, message in (
        ({"data__val_manifest": ""}, "evaluate.every is set, but data.val_manifest is not"),
        ({"evaluate__features": "gone/i3d"}, "evaluate.features=gone/i3d"),
        ({"evaluate__clip": str(tmp_path)}, "no config.json in this folder"),
        (
            {"evaluate__clip": str(world.text)},
            "as a transformers CLIP model with its tokenizer (its model_type is 't5'",
        ),
        ({"evaluate__features": str(world.root / "empty.toml")}, "empty.toml: no TorchScript file"),
        ({"evaluate__features": str(world.vae)}, "cannot be loaded as a transformers video model (no model.safe"),
        ({"evaluate__features": str(world.text)}, "a t5 takes no videos (its config has no num_frames)"),
        ({"checkpoint__keep_best": "psnr", "evaluate__every": 0, "validation__every": 1000}, "stage 0 measures it"),
        ({"checkpoint__keep_best": "loss"}, "evaluate.every = 2 to be a multiple of checkpoint.every = 1000"),
    ):
        words = world.arguments(tmp_path / "run", "clips", **{**settings, **changes})
        assert stage2_video.main([str(world.root / "empty.toml"), *words, "--dry-run"]) == 2, message
        assert message in capsys.readouterr().err


@pytest.mark.exhaustive
def test_two_processes_measure_what_one_does(home: Path, tmp_path: Path, given: dict[str, str]) -> None:
    words = [word for pair in given.items() for word in pair]
    for count in (1, 2):
        arguments = [
            str(home / "flow"),
            "--out",
            str(tmp_path / str(count)),
            "--device",
            "cpu",
            *words,
            "--samples",
            "5",
        ]
        finish(start_processes("stages.evaluate", [*arguments, "--batch-size", "2"], count, tmp_path / f"log{count}"))
    one, two = (read(tmp_path / str(count))["checkpoints"][0]["metrics"] for count in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
