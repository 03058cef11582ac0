"""Both sides of `benchmarks.sample` and `benchmarks.attention` do the same work, and their results are complete."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import attention, harness, limits, sample, sides, suite

CPU = torch.device("cpu")
TINY = sides.Sizes(hidden_size=48, num_heads=4, depth=2, caption_channels=12, caption_tokens=14, frames=3, rows=8,
                   columns=8)  # fmt: skip
LAYER = attention.Sizes(samples=2, frames=3, places=6, num_heads=2, captions=(2, 5), width=7)


@pytest.fixture(autouse=True)
def short_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.SQUARE, "cpu", 128)
    monkeypatch.setitem(limits.AT_LEAST, "cpu", 0.001)


@pytest.mark.exhaustive
def test_whole_samplings_are_measured_and_end_at_the_same_latents(tmp_path: Path) -> None:
    sides = ("ours", "plain")
    result = sample.measure(TINY, (3, 14), steps=2, checked=3, seconds=0.1, whole=5, one_thread=True, names=sides)
    assert all(difference < sample.TOLERANCE for difference in result["largest_difference"].values())
    assert [(row["what"], row["other_side"]) for row in result["rows"]] == [
        ("prompt of 3 tokens", "plain"),
        ("prompt of 14 tokens", "plain"),
    ]
    for row in result["rows"]:
        assert row["other"]["rounds"] >= 3 and row["ratio"] > 0 and row["ours"]["share_of_limit"] > 0
        # The formula is of all a prompt's tokens; the plain side leaves out padding, ours also what is prepared.
        whole_prompt = row["what"] == "prompt of 14 tokens"
        assert (row["other"]["flops"] == result["flops_by_formula"]) == whole_prompt
        assert result["flops_by_formula"] >= row["other"]["flops"] > row["ours"]["flops"]
    result |= {"sizes": asdict(TINY), "steps": 2, "threads": 1, "clock": "wall time"}
    assert all(about["peak_memory_mb"] > 0 for about in result["sides"].values())
    whole = result["whole"]
    assert (whole["steps"], whole["prompt_tokens"], whole["other"]["rounds"]) == (5, 3, 1)
    assert whole["largest_difference"] < sample.TOLERANCE
    lines = sample.report(result).splitlines()
    assert len(lines) == 3 + 2 * 2 + 1 and "5 steps, prompt of 3 tokens: ours" in lines[-1]
    saved = json.loads(harness.save("x", result, tmp_path / "x.json").read_text())
    assert len(list(suite.timed(saved))) == len(result["rows"])


def test_samplings_that_differ_are_not_timed() -> None:
    latents = torch.ones(1, 4, 3, 8, 8).numpy()
    asks = {"ours": lambda _: 1.001 * latents, "plain": lambda _: latents}
    with pytest.raises(SystemExit, match="after 1 steps latents differ"):
        sample.largest_difference(asks, 1)


@pytest.mark.parametrize("kind", attention.KINDS)
def test_every_attention_is_measured(kind: str) -> None:
    rows = attention.measure_kind(kind, 8, LAYER, CPU, 0.1, time.perf_counter)
    third = "masked" if kind == "captions" else "copied"
    assert [(row["what"], row["other_side"]) for row in rows] == [
        (what, side) for what in ("forward", "forward and backward") for side in ("naive", third)
    ]
    for row in rows:
        assert row["largest_difference"] < attention.TOLERANCE["cpu"] and row["ratio"] > 0
        padding = kind == "captions"  # ours reads as many tokens of each as the longest has
        assert (row["ours"]["flops_counted"] > row["flops_by_formula"]) == padding
        all_padding = row["other_side"] == "masked"
        # Gradients of the text, which only the formula counts, are nobody's wish here.
        assert (row["other"]["flops_counted"] <= row["flops_by_formula"]) != all_padding
        assert (row["other"]["flops_counted"] > row["ours"]["flops_counted"]) == all_padding
    assert len(attention.report({"rows": rows, "dtype": "", "threads": 1, "clock": ""}).splitlines()) == 3 + len(rows)


def test_captions_of_one_length_are_computed_without_padding() -> None:
    sizes = attention.Sizes(samples=2, frames=3, places=6, num_heads=2, captions=(5, 5), width=7)
    layer, calls = attention.build("captions", sizes, 8, CPU)
    x = torch.randn(2, 3, 6, 16)
    counted = limits.counted_flops(attention.run(layer, calls["ours"], x, backward=False))
    assert counted == attention.formula("captions", sizes, 16)
