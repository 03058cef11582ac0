"""Both sides of `benchmarks.train_step` do the same work, and what is told of each is complete."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import harness, limits, sides, suite, train_step
from tests.gpu import step

TINY = sides.Sizes(hidden_size=48, num_heads=4, depth=2, caption_channels=12, caption_tokens=6, batch=2, frames=3,
                   rows=8, columns=8)  # fmt: skip
ODD = sides.Sizes(
    hidden_size=48, num_heads=4, depth=3, caption_channels=20, caption_tokens=7, batch=2, frames=5, rows=12, columns=12
)


def test_the_plain_model_computes_what_ours_does() -> None:
    ours, plain = sides.build_ours(TINY).model, sides.build_plain(TINY).model
    for padded in (False, True):
        batch = sides.inputs(TINY, padded=padded)
        assert train_step.largest_difference(ours, plain, batch) < train_step.TOLERANCE
    with torch.no_grad():
        plain.get_parameter("blocks.1.attn_temp.proj.weight").mul_(1.5)
    assert train_step.largest_difference(ours, plain, batch) > train_step.TOLERANCE
    with pytest.raises(SystemExit, match="the two models differ"):
        train_step.check_equal(ours, plain, TINY)


@pytest.mark.parametrize(
    "sizes",
    [ODD, *(pytest.param(sizes, marks=pytest.mark.exhaustive) for sizes in (train_step.QUICK, train_step.FULL))],
)
def test_both_counts_of_flops_agree_and_the_plain_model_has_as_many(sizes: sides.Sizes) -> None:
    ours, plain = (sides.model_flops(name, sizes) for name in ("ours", "plain"))
    assert ours == plain
    for count in ours.values():
        assert count["counted"] == count["formula"]
    # A backward pass is two forward passes, but for the inputs' gradients, which nobody wants.
    forward, training = (count["counted"] or 0 for count in ours.values())
    assert 2.9 * forward < training < 3 * forward


@pytest.mark.exhaustive
def test_diffusers_models_are_as_wide_and_deep() -> None:
    sizes = train_step.FULL
    latte, pixart = (sides.model_flops(name, sizes)["forward"]["counted"] or 0 for name in ("Latte", "PixArt"))
    ours = sides.model_flops("ours", sizes)["forward"]["counted"] or 0
    mlp = sizes.depth * 2 * sizes.tokens * 2 * sizes.hidden_size * 4 * sizes.hidden_size
    assert latte - ours == pytest.approx(mlp, rel=0.25)  # an MLP more a block; captions projected frame by frame
    assert 0.8 * ours < pixart < ours  # without attention over time


def test_products_take_turns_with_the_sides() -> None:
    order = harness.with_products(dict.fromkeys("ab", list), dict.fromkeys("123", dict))
    assert list(order) == ["a", "1", "3", "b", "2"]


@pytest.mark.parametrize("model", ["Latte", "PixArt"])
def test_diffusers_models_make_steps(model: str) -> None:
    side, batch = sides.SIDES[model](TINY), sides.inputs(TINY)
    weights = [parameter.detach().clone() for parameter in side.model.parameters()]
    for make in sides.CALLS.values():
        make(side, batch)()
    assert any(not torch.equal(old, new) for old, new in zip(weights, side.model.parameters(), strict=True))


@pytest.mark.exhaustive
def test_a_training_step_of_every_side_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is saved is complete: times, rates, shares, both counts of FLOPs; a table can be made of it."""
    monkeypatch.setitem(limits.SQUARE, "cpu", 128)
    monkeypatch.setitem(limits.AT_LEAST, "cpu", 0.001)
    names = ("ours", "plain", "plain, freed memory kept")  # diffusers takes its time to be imported
    record = harness.Run("train_step", one_thread=False)
    result = {**record.header, "sizes": asdict(TINY), **train_step.measure(TINY, seconds=0.1, names=names)}
    assert {(row["what"], row["other_side"]) for row in result["rows"]} == {
        (what, side) for what in ("forward", "training step") for side in names[1:]
    }
    for row in result["rows"]:
        assert row["ratio"] > 0
        for side in (row["ours"], row["other"]):
            assert side.keys() == {
                "median_ms",
                "min_ms",
                "max_ms",
                "rounds",
                "gflops",
                "share_of_limit",
                "share_at_best",
            }
            assert side["rounds"] >= 3
            limit = result["matmul_limit"][row["what"]]["gflops"]
            assert side["share_of_limit"] == pytest.approx(side["gflops"] / limit, abs=0.02)
    for side, about in result["sides"].items():
        for flops in about["flops"].values():
            assert flops["counted"] > 0
            assert flops["formula"] == flops["counted"]
        assert about["peak_memory_mb"] >= about["before_first_step_mb"] > 0 and about["parameters"] > 0
        assert about["keeps_memory"] <= (side != "plain")  # as far as the C library can
    record.finish(result, train_step.report, tmp_path / "x.json")
    shown = capsys.readouterr().out
    assert sum("  " in line and "%" in line for line in shown.splitlines()) == 6
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved["others_share"] is None or 0 <= saved["others_share"] <= 1
    assert len(list(suite.timed(saved))) == 4


def test_a_case_that_fails_on_a_gpu_costs_no_other() -> None:
    def measure(name: str) -> dict[str, str]:
        if name == "large":
            raise torch.OutOfMemoryError("no memory\nleft")
        return {"case": name}

    rows, failed = step.each_case(measure, ("small", "large", "middle"))
    assert rows == [{"case": "small"}, {"case": "middle"}]
    assert failed == {"large": "OutOfMemoryError: no memory left"}
    assert step.report("nothing", [], failed).splitlines()[-1].split() == ["large", "failed"]
