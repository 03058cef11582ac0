"""Fused kernels: each against its twin in float64, in Triton's interpreter; who chooses them; AdamW's state."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from opensora_repro.config import OptimConfig
from opensora_repro.kernels import eager, ops
from opensora_repro.run_folder import TrainState, checkpoints_folder, verify_checkpoint
from opensora_repro.training.checkpoint import load_checkpoint
from opensora_repro.training.optim import build_optimizer
from opensora_repro.training.save import CheckpointWriter
from opensora_repro.training.step import Ema
from tests import kernel_world
from tests.checkpoints import prepared

needs_triton = pytest.mark.skipif(bool(ops.missing_triton()), reason=ops.missing_triton())
LONG = ("bf16", "fp16", "models bf16", "curve", "memory")
QUICK = [name for name in kernel_world.CHECKS if name not in LONG]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return kernel_world.run_checks(QUICK, tmp_path_factory.mktemp("kernels") / "results.json")


def assert_within(errors: Any) -> None:
    assert isinstance(errors, dict), errors
    assert errors
    worst = {name: round(share, 2) for name, share in errors.items() if not share <= 1}
    assert not worst, worst


@needs_triton
@pytest.mark.parametrize("check", QUICK)
def test_kernels_compute_what_their_twins_do(interpreted: dict[str, Any], check: str) -> None:
    assert_within(interpreted[check])


@needs_triton
@pytest.mark.exhaustive
@pytest.mark.parametrize("check", LONG)
def test_half_precision_the_curve_of_a_run_and_its_memory(tmp_path: Path, check: str) -> None:
    assert_within(kernel_world.run_checks([check], tmp_path / "results.json")[check])


@needs_triton
@pytest.mark.exhaustive
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    """The interpreter forgives what the compiler does not; compiling needs no GPU."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_compile", str(tmp_path)]
    done = subprocess.run(command, cwd=kernel_world.REPO, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    compiled = dict(line.split() for line in done.stdout.splitlines())
    assert compiled.keys() == {
        "norm._forward", "norm._backward", "gate._forward", "gate._backward", "gelu._forward", "gelu._backward",
        "adamw._step", "attention._forward", "attention._backward",
    }  # fmt: skip
    assert set(compiled.values()) == {"wide"}, f"loads of single elements: {compiled}"


# Who chooses


@pytest.fixture
def _as_before() -> Any:
    before = ops.chosen()
    yield
    ops.choose(before, "cpu")


@pytest.mark.usefixtures("_as_before")
def test_auto_is_triton_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "missing_triton", lambda: "")
    assert ops.choose("auto", "cuda") == "triton"
    assert ops.choose("auto", "cpu") == "eager"
    assert ops.choose("eager", "cuda") == "eager"
    assert not ops.fused(torch.ones(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose("auto", "cpu") == "eager"
    assert ops.choose("triton", "cpu") == "triton"
    assert ops.fused(torch.ones(1))
    assert not ops.fused(torch.ones(1).double())
    monkeypatch.setattr(ops, "missing_triton", lambda: "no triton")
    assert ops.choose("auto", "cuda") == "eager"


def test_triton_where_it_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "missing_triton", lambda: "")
    with pytest.raises(ops.KernelsError, match=r"Triton needs a CUDA device, this run computes on cpu; set train\."):
        ops.choose("triton", "cpu")
    assert ops.chosen() == "auto"

    def absent(name: str) -> None:
        raise ImportError("libcuda\nis missing")

    monkeypatch.undo()
    monkeypatch.setattr(importlib, "import_module", absent)
    ops.missing_triton.cache_clear()
    try:
        with pytest.raises(ops.KernelsError, match=r"triton cannot be imported \(libcuda is missing\)"):
            ops.choose("triton", "cuda")
    finally:
        ops.missing_triton.cache_clear()


# Attention


def test_attention_in_parts() -> None:
    """As CUDA needs it, whose grids end at 65,535: outputs and gradients are those of all sequences at once."""
    q, k, v = (torch.randn(7, 2, 5, 8, dtype=torch.float64).requires_grad_() for _ in range(3))
    found, expected = (eager.attention(q, k, v, at_once=count) for count in (3, None))
    grad = torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    pairs = (torch.autograd.grad(out, (q, k, v), grad) for out in (found, expected))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


# AdamW's state


class Run:
    """A tiny model with its average and either optimizer."""

    def __init__(self, fused: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
        optimizer = build_optimizer(self.model, OptimConfig(lr=1e-2, weight_decay=0.1), fused=fused)
        self.engine = prepared(self.model, optimizer)
        self.ema = Ema(self.engine, 0.9)

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            self.model(inputs).square().mean().backward()
            self.engine.step(1e-2 / (1 + seed), 0.7)
            self.ema.update()
            self.engine.zero_grad()

    def save(self, run_dir: Path, step: int) -> Path:
        state = TrainState(step=step, ema_updates=self.ema.updates)
        CheckpointWriter(run_dir, self.engine, "[run]\n", keep=0, background=False).save(state, self.ema)
        return checkpoints_folder(run_dir) / f"step-{step:08d}"

    def load(self, folder: Path) -> None:
        load_checkpoint(folder, verify_checkpoint(folder), self.engine, self.ema)


@pytest.mark.parametrize("fused", [True, False], ids=["begun eager", "begun fused"])
def test_either_optimizer_goes_on_from_the_others_checkpoint(tmp_path: Path, fused: bool) -> None:
    whole, first, second = Run(fused), Run(not fused), Run(fused)
    whole.steps(0, 6)
    first.steps(0, 3)
    second.load(first.save(tmp_path, 3))
    second.steps(3, 6)
    expected, found = (load_all(run.save(tmp_path / name, 6)) for name, run in (("a", whole), ("b", second)))
    assert expected.keys() == found.keys()
    assert {value.dtype for value in expected.values()} == {torch.float32}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text)
    assert expected["optimizer: step.0.weight"].item() == 6
    assert not torch.equal(expected["ema: 0.weight"], expected["model: 0.weight"])


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}: {name}": value
        for path in folder.glob("*.safetensors")
        for name, value in load_file(path).items()
    }


def test_shadows_move_without_gradients_too() -> None:
    plain, fused = Run(False), Run(True)
    for run in (plain, fused):
        run.steps(0, 2)
        with torch.no_grad():
            run.model[0].weight.add_(1)
        run.model[2].bias.sum().backward()
        run.engine.step(1e-2, 1.0)
        run.ema.update()
    for name, value in plain.ema.shadow.items():
        torch.testing.assert_close(fused.ema.shadow[name], value)
    assert fused.engine.optimizer.state[fused.model[0].weight]["step"] == 2
    assert fused.engine.optimizer.state[fused.model[2].bias]["step"] == 3
