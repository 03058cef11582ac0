"""The GPU checks' own machinery, run where there is no GPU: the device is the CPU, so every comparison must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import comparisons, limits, loop
from opensora_repro.models.config import STDiTConfig
from tests.gpu import checks, memory, models, step
from tests.gpu import loop as gpu_loop

CPU = torch.device("cpu")
MEMORY = "memory, options that change no number"
GRAPHS = "graphs, same samples"


@pytest.mark.parametrize(
    "name",
    ["stdit parity", "pixart parity", "captions end to end", "packed rows", "samplers", "reference outputs"]
    + [pytest.param(name, marks=pytest.mark.exhaustive) for name in (MEMORY, GRAPHS)],
)
def test_comparisons_hold_on_the_cpu(name: str, golden_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENSORA_GOLDEN", str(golden_dir))
    result = checks.run_check(name, CPU)
    assert result["status"] == "passed", result


def test_demo_encoders_on_the_cpu() -> None:
    result = checks.run_check("autoencoder and text encoder", CPU)
    assert result["status"] == "passed", result


def test_training_loops_on_the_cpu() -> None:
    result = checks.run_check("training loop, nobody waits", CPU)
    assert result["status"] == "passed", result
    model = STDiTConfig(hidden_size=48, depth=1, num_heads=4, caption_channels=loop.DEMO_CAPTION)
    demo = models.REPO / "checkpoints" / "demo" / "vae"
    result = gpu_loop.encoders_beside(CPU, model, vae=lambda _: demo, size=16, frames=2, batch_size=2, steps=5)
    assert result["largest_gap"] == 0
    assert result["beside"]["step_ms"] > 0
    assert 0 <= result["in turn"]["waiting_share"] < 1


def test_training_measures_and_notices_a_loss_that_does_not_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = STDiTConfig(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=4)
    case = step.Case(cfg, (4, 2, 4, 4), batch_size=2)
    result, seconds = step.measure(CPU, case, steps=3)
    assert len(seconds) == 3
    assert result["last_loss"] < result["first_loss"]
    assert result["tokens_per_second"] > 0
    sharded = step.measure(CPU, case, steps=3, plugin="zero2")[0]
    assert sharded["first_loss"] == pytest.approx(result["first_loss"], rel=1e-4)
    assert sharded["last_loss"] == pytest.approx(result["last_loss"], rel=1e-2)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(AssertionError, match="does not fall"):
        step.measure(CPU, case, steps=3)


@pytest.mark.exhaustive
def test_a_case_is_measured_with_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SQUARE, "cpu", 128)
    monkeypatch.setitem(limits.AT_LEAST, "cpu", 0.001)
    monkeypatch.setattr(step, "LIMIT_SECONDS", 0.1)
    cfg = STDiTConfig(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=4)
    case = step.Case(cfg, (4, 4, 16, 16), 2)
    row = step.measure_row(CPU, "tiny", case, published=10, steps=3)
    assert row["flops"]["formula"] == row["flops"]["counted"]
    assert row["times_published"] == pytest.approx(row["ours"]["tokens_per_second"] / 10, abs=0.01)
    for side in (row["ours"], row["fused"], row["other"]):
        assert side["share_of_limit"] > 0
        assert side["latents"] == [2, 4, 4, 16, 16]
        assert side["rounds"] == 3
    assert row["ours"]["first_loss"] == row["other"]["first_loss"]
    assert len(step.report("nothing", [row]).splitlines()) == 6


@pytest.mark.exhaustive
def test_published_cases_count_alike() -> None:
    case = step.CASES["16x256"]  # the others are counted where they run
    assert case.counted_flops() == case.flops
    assert [case.tokens for case in step.CASES.values()] == [8 * 4096, 2 * 16384, 65536]
    assert step.CASES.keys() <= step.PUBLISHED.keys()


def test_every_way_to_save_memory_is_measured() -> None:
    cfg = STDiTConfig(hidden_size=48, depth=1, num_heads=4, caption_channels=16, model_max_length=4)
    rows = memory.peaks(CPU, cfg, (4, 2, 4, 4), steps=2)
    assert list(rows) == list(memory.KINDS)
    assert all(row["planned_gib"] >= 0 and row["step_ms"] > 0 for row in rows.values())
    full_size = (STDiTConfig(), memory.LONG_LATENTS)
    planned = {name: memory.planned_bytes(*full_size, **options) for name, options in memory.KINDS.items()}
    assert len(set(planned.values())) == len(planned) - 1  # the step in backward moves no peak there
    assert max(planned.values()) == planned["selective"] < memory.GOAL_BYTES


def test_faults_and_lacking_packages_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> dict[str, Any]:
        return {"error": comparisons.require(float("nan"), 1.0, "float32")}

    broken_ones = {"broken": (broken, ()), "elsewhere": (broken, ("no_such_package",))}
    monkeypatch.setattr(checks, "CHECKS", broken_ones)
    results = checks.run_all(CPU)
    assert results["broken"]["status"] == "failed"
    assert "float32: nan" in results["broken"]["reason"]
    assert results["elsewhere"]["status"] == "skipped"
    assert "no_such_package" in results["elsewhere"]["reason"]
