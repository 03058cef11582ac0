"""A run with [lora] from its start to samples: resumed, on several processes, merged, on weights that have changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages import evaluate, sample, stage2_video, weights
from tests.tiny_models import make_tiny_i3d
from tests.training_world import (
    World,
    finish,
    losses,
    make_world,
    metrics,
    newest_hashes,
    newest_tensors,
    start_processes,
    succeed,
)

STAGE = "stages.stage2_video"
LORA: dict[str, Any] = {
    "lora__rank": 4, "lora__alpha": 8.0, "lora__dropout": 0.3, "train__steps": 4, "checkpoint__every": 2,
    "checkpoint__keep": 0, "optim__lr": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    assert train(world, "base", train__steps=1) == 0
    return world


def arguments(world: World, run: str, **changes: Any) -> list[str]:
    return [str(world.root / "empty.toml"), *world.arguments(world.root / run, "clips", **changes)]


def train(world: World, run: str, **changes: Any) -> int:
    return stage2_video.main(arguments(world, run, **changes))


def adapted(world: World) -> dict[str, Any]:
    return {**LORA, "init__weights": str(world.root / "base")}


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    assert train(world, "lora", **adapted(world)) == 0
    return world.root / "lora"


def frames(folder: Path) -> np.ndarray:
    with av.open(str(folder / "0000.mp4")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def generate(source: Path, out: Path, *more: str) -> np.ndarray:
    given = ["--prompt", "a red square", "--out", str(out), "--steps", "2", "--seed", "1", "--dtype", "fp32"]
    assert sample.main([str(source), *given, *more]) == 0
    return frames(out)


def test_adapters_alone_are_saved_and_resumed_bit_for_bit(world: World, run: Path) -> None:
    assert train(world, "halves", **{**adapted(world), "train__steps": 2}) == 0
    assert train(world, "halves", **adapted(world)) == 0
    assert newest_hashes(world.root / "halves") == newest_hashes(run)
    assert metrics(world.root / "halves") == metrics(run)
    files = {file.name for file in (run / "checkpoints" / "step-00000004").iterdir()}
    assert files == {
        "adapter_model.safetensors", "adapter_config.json", "ema.safetensors", "optimizer.safetensors",
        "state.json", "config.toml",
    }  # fmt: skip
    saved, average = newest_tensors(run, "adapter_model"), newest_tensors(run, "ema")
    assert saved.keys() == average.keys() and all(".lora_" in key for key in saved)
    assert {value.dtype for value in saved.values()} == {np.dtype("float32")}
    moved = [key for key in saved if ".lora_B." in key and saved[key].any()]
    assert moved and any(not np.array_equal(saved[key], average[key]) for key in moved)
    optimizer = newest_tensors(run, "optimizer")
    assert len(optimizer) == 3 * len(saved)


def test_it_samples_by_itself_on_its_base_and_merged(
    world: World, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = world.root / "base"
    own = generate(run, tmp_path / "own")
    assert np.array_equal(generate(base, tmp_path / "on", "--lora", str(run)), own)
    twice = generate(base, tmp_path / "twice", "--lora", f"{run}:0.25", "--lora", f"{run}:0.75")
    assert np.abs(twice.astype(int) - own).max() <= 2  # added in two parts: rounding
    plain = generate(base, tmp_path / "plain")
    assert np.array_equal(generate(base, tmp_path / "none", "--lora", f"{run}:0"), plain)
    assert not np.array_equal(generate(run, tmp_path / "strong", "--lora", f"{run}:30"), plain)
    settings = json.loads((tmp_path / "twice" / "samples.json").read_text())
    assert [scale for _, scale in settings["lora"]] == [0.5, 1.5]  # alpha / rank = 2, times the weights
    merged = tmp_path / "merged.safetensors"
    assert weights.main(["merge", str(base), "--lora", str(run), "--out", str(merged)]) == 0
    both = load_file(merged)
    assert both.keys() == newest_tensors(base).keys()
    changed = sum(not np.array_equal(both[key], value) for key, value in newest_tensors(base, "ema").items())
    assert changed == 2 * 9
    capsys.readouterr()
    assert weights.main(["merge", str(base), "--lora", str(base), "--out", str(tmp_path / "x")]) == 2
    assert "no adapter there" in capsys.readouterr().err
    assert weights.main(["inspect", str(run)]) == 2
    assert "this is a LoRA" in capsys.readouterr().err


def test_its_held_out_loss_is_with_its_adapters(world: World, tmp_path: Path) -> None:
    """As the run itself has measured it."""
    held = {"data__val_manifest": str(world.manifest("val")), "validation__every": 4}
    changes = {**adapted(world), **held, "validation__timesteps": [0.3, 0.7], "optim__lr": 0.1, "ema__decay": 0.0}
    assert train(world, "measured", **changes) == 0
    words = ["--manifest", held["data__val_manifest"], "--features", str(make_tiny_i3d(tmp_path / "i3d.pt"))]
    words += ["--samples", "0", "--levels", "0.3", "0.7", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert evaluate.main([str(world.root / "measured"), str(world.root / "base"), *map(str, words)]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["checkpoints"]
    loss, of_base = (of["metrics"]["loss"]["value"] for of in found)
    (line,) = [json.loads(line) for line in (world.root / "measured" / "validation.jsonl").read_text().splitlines()]
    assert loss == pytest.approx(line["loss"], rel=1e-4) and loss != pytest.approx(of_base, rel=1e-3)


def test_other_weights_under_the_same_name(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(world, "moved-base", train__steps=1) == 0
    changes = {**adapted(world), "init__weights": str(world.root / "moved-base")}
    assert train(world, "moved", **{**changes, "train__steps": 2}) == 0
    assert train(world, "moved-base", train__steps=2) == 0  # the base has gone on
    capsys.readouterr()
    assert train(world, "moved", **changes) == 2
    assert "init.weights is another model than" in capsys.readouterr().err
    given = ["--prompt", "x", "--out", str(tmp_path / "x")]
    assert sample.main([str(world.root / "moved"), *given]) == 2
    assert "holds other weights than" in capsys.readouterr().err
    assert train(world, "moved", **{**changes, "lora__rank": 2}) == 2
    assert "lora.rank = 4 there, 2 here" in capsys.readouterr().err


def test_a_model_without_temporal_attention_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {k: v for k, v in newest_tensors(world.root / "base").items() if "attn_temp" not in k}
    save_file(tensors, tmp_path / "image.safetensors")
    assert train(world, "none", **{**adapted(world), "init__weights": str(tmp_path / "image.safetensors")}) == 2
    assert "trains adapters alone: train the model first" in capsys.readouterr().err


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero2": {"parallel__engine": "colossalai", "parallel__plugin": "zero2"},
    "fsdp": {"parallel__plugin": "fsdp", "train__activation_checkpointing": "full"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_the_run_of_one(world: World, layout: str) -> None:
    one, two = (f"{layout}-{count}" for count in (1, 2))
    changes = {**adapted(world), "optim__eps": 1e-6}
    succeed(STAGE, arguments(world, one, **changes), world.root / "log" / one)
    spread = {**changes, **LAYOUTS[layout], "train__batch_size": 1}
    finish(start_processes(STAGE, arguments(world, two, **{**spread, "train__steps": 2}), 2, world.root / "log" / two))
    finish(start_processes(STAGE, arguments(world, two, **spread), 2, world.root / "log" / two))
    np.testing.assert_allclose(losses(world.root / two), losses(world.root / one), rtol=1e-5)
    for name in ("adapter_model", "ema"):
        expected = newest_tensors(world.root / one, name)
        found = newest_tensors(world.root / two, name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.linalg.norm(found[key] - value) <= 1e-4 * np.linalg.norm(value) + 1e-7, key
