"""Checkpoints: round trip, atomic writing, pruning, damage, and optimizer state by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opensora_repro.config import OptimConfig
from opensora_repro.run_folder import (
    CheckpointError,
    TrainState,
    checkpoints_folder,
    clean_leftovers,
    list_checkpoints,
    newest_checkpoint,
    verify_checkpoint,
)
from opensora_repro.training.checkpoint import load_checkpoint
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.step import Ema
from tests.checkpoints import prepared


class Run:
    """A tiny model with its average and optimizer."""

    def __init__(self, seed: int = 0, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2))
        self.engine = prepared(self.model, build_optimizer(self.model, OptimConfig(lr=1e-2)))
        self.ema = Ema(self.engine, 0.9)

    def step(self, seed: int) -> None:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        self.model(inputs).square().mean().backward()
        self.engine.step(1e-2, 1)
        self.engine.zero_grad()
        self.ema.update()

    def save(self, run_dir: Path, step: int, keep: int = 0) -> Path:
        state = TrainState(step=step, samples_seen=4 * step, ema_updates=self.ema.updates)
        CheckpointWriter(run_dir, self.engine, "[run]\n", keep=keep, background=False).save(state, self.ema)
        return checkpoints_folder(run_dir) / f"step-{step:08d}"

    def load(self, folder: Path) -> TrainState:
        state = verify_checkpoint(folder)
        load_checkpoint(folder, state, self.engine, self.ema)
        return state

    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.state_dict().values(), *self.ema.shadow.values()]


def test_a_checkpoint_tells_its_device(tmp_path: Path) -> None:
    folder = Run().save(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text(encoding="utf-8"))["device"] == "cpu"


def test_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = Run(), Run(), Run(seed=9)
    for seed in range(6):
        whole.step(seed)
    for seed in range(3):
        first.step(seed)
    state = second.load(first.save(tmp_path, 3))
    assert state == TrainState(step=3, samples_seen=12, ema_updates=3)
    for seed in range(3, 6):
        second.step(seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), second.tensors(), strict=True))


def test_layout_is_readable_without_us(tmp_path: Path) -> None:
    run = Run()
    run.step(0)
    folder = run.save(tmp_path, 1)
    assert folder == tmp_path / "checkpoints" / "step-00000001"
    names = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "config.toml"}
    assert {path.name for path in folder.iterdir()} == names
    assert torch.equal(load_file(folder / "model.safetensors")["2.weight"], run.model[2].weight)
    assert torch.equal(load_file(folder / "ema.safetensors")["2.weight"], run.ema.shadow["2.weight"])
    moments = load_file(folder / "optimizer.safetensors")
    assert torch.equal(moments["exp_avg.0.bias"], run.engine.optimizer.state[run.model[0].bias]["exp_avg"])
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["samples_seen"], state["schema_version"]) == (1, 4, 1)
    assert set(state["sha256"]) == names - {"state.json"}


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    whole, saved, again = Run(), Run(), Run(seed=5)
    again.load(saved.save(tmp_path, 0))
    whole.step(0)
    again.step(0)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), again.tensors(), strict=True))


def test_keeps_the_newest(tmp_path: Path) -> None:
    run = Run()
    for step in (5, 10, 20, 100):
        run.save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000100"]
    for step in (110, 120):
        run.save(tmp_path, step, keep=0)
    assert len(list_checkpoints(tmp_path)) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.toml"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_previous_one_taken(tmp_path: Path, name: str, how: str) -> None:
    run = Run()
    run.step(0)
    run.save(tmp_path, 1)
    run.step(1)
    file = run.save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if how == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1 if name != "state.json" else 0xFF
        file.write_bytes(bytes(content if how == "flip" else content[: len(content) // 2]))
    lines: list[str] = []
    found = newest_checkpoint(tmp_path, lines.append)
    assert found is not None
    assert found[1].step == 1
    assert len(lines) == 1
    assert "step-00000002 is damaged" in lines[0]
    assert name in lines[0]
    # The run reaches the damaged step again and replaces it.
    run.save(tmp_path, 2)
    assert newest_checkpoint(tmp_path, lines.append)[1].step == 2  # type: ignore[index]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    folder = Run().save(tmp_path, 1)
    (folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole") as caught:
        newest_checkpoint(tmp_path, lambda _: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", ["[1]", "null", '{"schema_version": 1, "sha256": []}', '{"sha256": {}}'])
def test_a_state_of_another_shape_is_damaged(tmp_path: Path, state: str) -> None:
    (Run().save(tmp_path, 1) / "state.json").write_text(state)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole .*state\.json cannot be read"):
        newest_checkpoint(tmp_path, lambda _: None)


def test_a_later_schema_is_refused_not_skipped(tmp_path: Path) -> None:
    Run().save(tmp_path, 1)
    folder = Run().save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "schema_version": 99}))
    with pytest.raises(CheckpointError, match="schema version 99"):
        newest_checkpoint(tmp_path, lambda _: None)


def test_states_of_earlier_releases_are_read(tmp_path: Path) -> None:
    folder = Run().save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    assert "position" not in state
    (folder / "state.json").write_text(json.dumps({**state, "position": 8}))
    assert verify_checkpoint(folder).step == 2


def test_half_written_ones_are_never_seen(tmp_path: Path) -> None:
    run = Run()
    run.save(tmp_path, 1)
    half = tmp_path / "checkpoints" / ".step-00000002.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    clean_leftovers(tmp_path)
    assert not half.exists()
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        Run().save(tmp_path, 1)


def test_another_model_is_one_line(tmp_path: Path) -> None:
    folder = Run().save(tmp_path, 1)
    other = Run(width=6)
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        other.load(folder)
    assert "\n" not in str(caught.value)
