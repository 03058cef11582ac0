"""Scaling laws: a made one is found again, the ladder that asks for it is even, and the page tells what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opensora_repro.config import dump_toml, load_config
from opensora_repro.data.write import write_video
from opensora_repro.errors import DataError
from opensora_repro.planning.ladder import (
    Rung,
    make_ladder,
    make_rung,
    next_budget,
    next_size,
    read_budgets,
    read_sizes,
)
from opensora_repro.planning.ladder import step_flops as flops_of_step
from opensora_repro.planning.scaling import DRAWS, fit_law
from opensora_repro.report.curves import Series, chart
from opensora_repro.report.scaling import result, table, write_page
from stages.scaling import main
from tests.made_runs import write_lines
from tests.unit.test_run_report import Page

DEMO = "configs/demo/scaling.toml"
A, B, C = 0.3, 200.0, 0.25  # of the made law


def law(flops: Any) -> Any:
    return A + B * np.asarray(flops) ** -C


def made_losses(flops: np.ndarray, seed: int, *, clips: int = 64, trained: float = 0.0) -> np.ndarray:
    """[budgets, clips] around the law: clips differ in how hard they are, each a little in how; runs by `trained`."""
    rng = np.random.default_rng(seed)
    clip, both = rng.normal(0, 0.3, (1, clips)), rng.normal(0, 0.02, (len(flops), clips))
    return law(flops)[:, None] * (1 + clip + both) + rng.normal(0, trained, (len(flops), 1))


@pytest.mark.parametrize("budgets", [3, 4, 7])
def test_a_made_law_is_found_again(budgets: int) -> None:
    flops = 1e12 * 4.0 ** np.arange(budgets)
    found = fit_law(flops, np.repeat(law(flops)[:, None], 8, axis=1))
    assert (found.a, found.c) == pytest.approx((A, C), rel=1e-4) and found.b == pytest.approx(B, rel=1e-2)
    assert found.at(1e15).value == pytest.approx(law(1e15), rel=1e-4)
    assert found.drawn.shape == (DRAWS, 3)
    assert all(of.low == pytest.approx(of.high, rel=2e-2) for of in found.numbers().values())  # no two clips differ


@pytest.mark.parametrize(("budgets", "trained"), [(3, 0.0), (6, 0.0), (6, 0.004)])
def test_intervals_hold_the_truth(budgets: int, trained: float) -> None:
    """By held-out clips alone; where runs differ by themselves, too, that is seen from four budgets on."""
    flops, tries, held = 1e12 * 4.0 ** np.arange(budgets), 100, {"a": 0, "c": 0, "next": 0}
    for seed in range(tries):
        found = fit_law(flops, made_losses(flops, seed, trained=trained), draws=200)
        intervals = {**found.numbers(), "next": found.at(4 * flops[-1])}
        for name, truth in {"a": A, "c": C, "next": law(4 * flops[-1])}.items():
            held[name] += intervals[name].low <= truth <= intervals[name].high
    assert all(count >= 0.88 * tries for count in held.values()), held


def test_what_is_no_law_is_held_within_bounds() -> None:
    flops = 1e12 * 4.0 ** np.arange(3)
    for losses in ((1.0, 0.9, 0.7), (1.0, 1.0, 1.0), (0.7, 0.9, 1.0), (1.0, 0.2, 0.1999999)):
        found = fit_law(flops, np.repeat(np.array(losses)[:, None], 4, axis=1))
        assert found.a >= 0 and found.b >= 0 and 0 < found.c <= 3 and np.isfinite(found.drawn).all()
    assert fit_law(flops, np.array([[1.0, 1.0], [0.9, 0.9], [0.7, 0.7]])).a == 0  # it falls ever faster
    assert fit_law(flops, np.array([[0.7, 0.7], [0.9, 0.9], [1.0, 1.0]])).b == 0


def ladder(out: Path, sizes: str = "64x2,128x3", budgets: str = "1x,4x,16x", *changes: str) -> tuple[list[Rung], Rung]:
    base = load_config(DEMO, changes)
    own = read_sizes(sizes, base)
    asked = read_budgets(budgets, base.train.steps * flops_of_step(base))
    following = make_rung(DEMO, changes, next_size(own, base), next_budget(asked), out)
    return make_ladder(DEMO, changes, own, asked, out), following


def test_a_ladder_spends_what_its_budgets_say_by_one_recipe(tmp_path: Path) -> None:
    rungs, following = ladder(tmp_path, "128x3,64x2", "16x,1x,2e12", "optim.warmup_steps=20")
    assert [(rung.size.name, rung.budget.name) for rung in rungs] == [
        (size, budget) for budget in ("1x", "2e12", "16x") for size in ("64x2", "128x3")
    ]
    base = load_config(DEMO)
    flops = base.train.steps * flops_of_step(base)
    for rung, expected in zip(rungs, np.repeat([flops, 2e12, 16 * flops], 2), strict=True):
        steps, optim = rung.cfg.train.steps, rung.cfg.optim
        assert rung.flops == pytest.approx(expected, rel=0.5 / steps)
        assert (optim.lr, rung.cfg.train.batch_size) == (base.optim.lr, base.train.batch_size)
        assert optim.decay_steps == pytest.approx(0.4 * steps, abs=1) and optim.warmup_steps <= 20
        assert rung.cfg.validation.every == rung.cfg.sample.every == steps and not rung.cfg.init.weights
    assert [rung.cfg.train.steps for rung in rungs if rung.size.name == "128x3"] == [100, 612, 1600]
    assert rungs[1].cfg.optim.warmup_steps == 10 and rungs[0].cfg.optim.warmup_steps == 20
    assert (following.size.name, following.budget.name) == ("256x4", "41.8x")


@pytest.mark.parametrize(
    ("sizes", "expected"), [("S,B", "L"), ("B", "L"), ("64x2,128x2", "256x2"), ("L,XL", "1296x33"), ("64x2", "96x3")]
)
def test_the_next_size_is_one_up(sizes: str, expected: str) -> None:
    base = load_config(DEMO)
    assert next_size(read_sizes(sizes, base), base).name == expected


def measured(rungs: list[Rung], *, best: str = "128x3") -> None:
    """What training would leave, losses after the law: of the best size at the law, of others above it."""
    made = made_losses(np.array([rung.flops for rung in rungs]), 1)
    for rung, losses in zip(rungs, made + [[0.01 * (rung.size.name != best)] for rung in rungs], strict=True):
        (rung.run_dir / "samples" / f"step-{rung.cfg.train.steps:08d}").mkdir(parents=True)
        (rung.run_dir / "config.toml").write_text(dump_toml(rung.cfg))
        line = {"step": rung.cfg.train.steps, "loss": float(losses.mean()), "losses": [1.0], "timesteps": [500.0]}
        write_lines(rung.run_dir / "validation.jsonl", [line | {"clips": "x", "of_clips": losses.tolist()}])
        write_lines(rung.run_dir / "metrics.jsonl", [{"step": 1, "loss": 1.0, "seconds": rung.flops / 1e10}])
        write_lines(rung.run_dir / "starts.jsonl", [{"step": 0, "device": "cpu", "processes": 2}])
        folder = rung.run_dir / "samples" / f"step-{rung.cfg.train.steps:08d}"
        (folder / "grid.png").write_bytes(b"")
        for place in range(len(rung.cfg.sample.prompts)):
            write_video(folder / f"{place:04d}.mp4", np.full((2, 32, 32, 3), 40 * place, np.uint8), 8)


def test_the_page_tells_law_next_size_and_samples(tmp_path: Path) -> None:
    rungs, following = ladder(tmp_path)
    measured(rungs)
    found = result(rungs, following, 2.0)
    assert json.loads(json.dumps(found)) == found
    assert found["law"]["c"]["low"] <= C <= found["law"]["c"]["high"]
    assert [run["size"] for run in found["runs"] if run["best"]] == ["128x3"] * 3
    following_size = found["next"]
    assert (
        following_size["seconds"] == pytest.approx(following.flops / 1e10)
        and following_size["flops"] == following.flops
    )
    assert following_size["cost"] == pytest.approx(2.0 * 2 * following_size["seconds"] / 3600)
    assert (
        following_size["loss"]["low"] < found["runs"][-1]["loss"]
        and following_size["loss"]["low"] < following_size["loss"]["high"]
    )
    lines = table(found)
    assert sum("best" in line for line in lines[1:7]) == 3 and any(line.startswith("next: 256x4") for line in lines)
    assert any("Best at the edge of the sizes" in line for line in lines)
    assert not any("do not follow the curve" in line for line in lines)

    write_page(found, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert sum(tag == "video" for tag, _ in page.tags) == 3 * 6 and sum(tag == "svg" for tag, _ in page.tags) == 2
    assert all(words in page.text for words in ("a red square moving left", "256x4", "16x", "costs"))
    assert "http://" not in page.source and (tmp_path / "report.html").stat().st_size < 200_000


def with_losses(rung: Rung, losses: list[float | None]) -> None:
    file = rung.run_dir / "validation.jsonl"
    line = json.loads(file.read_text())
    write_lines(file, [line | {"loss": None if None in losses else float(np.mean(losses)), "of_clips": losses}])  # type: ignore[arg-type]


def test_one_held_out_clip_tells_no_intervals(tmp_path: Path) -> None:
    """Nor is the width that they lack a sign that the losses follow no law."""
    rungs, following = ladder(tmp_path, "128x3")
    measured(rungs)
    for rung in rungs:
        with_losses(rung, [float(law(rung.flops))])
    notes = " ".join(result(rungs, following, None)["notes"])
    assert "Of one held-out clip intervals have no width" in notes and "do not follow" not in notes


def test_runs_that_tell_nothing_are_named(tmp_path: Path) -> None:
    """One whose held-out loss is not finite, and one whose steps are gone."""
    rungs, following = ladder(tmp_path)
    measured(rungs)
    with_losses(rungs[1], [0.5, None])
    with pytest.raises(DataError, match=f"{rungs[1].run_dir}: its held-out loss is not finite: .* leave 128x3 out"):
        result(rungs, following, None)
    with_losses(rungs[1], [0.5] * 64)
    (rungs[2].run_dir / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: it tells of no step"):
        result(rungs, following, None)


def test_losses_that_fall_ever_faster_are_said_to_follow_no_law(tmp_path: Path) -> None:
    rungs, following = ladder(tmp_path, "128x3")
    measured(rungs)
    for rung, loss in zip(rungs, (1.0, 0.9, 0.4), strict=True):
        file = rung.run_dir / "validation.jsonl"
        line = json.loads(file.read_text())
        write_lines(file, [line | {"loss": loss, "of_clips": [loss - 0.01, loss, loss + 0.01]}])
    notes = result(rungs, following, None)["notes"]
    assert any("do not follow the curve, which says" in note and "0.900 at 4x" in note for note in notes)
    assert any(note.startswith("a came out as 0") for note in notes)


def test_runs_of_other_held_out_clips_are_not_compared(tmp_path: Path) -> None:
    rungs, following = ladder(tmp_path)
    measured(rungs)
    file = rungs[2].run_dir / "validation.jsonl"
    file.write_text(file.read_text().replace('"clips": "x"', '"clips": "y"'))
    with pytest.raises(DataError, match=r"64x2-4x was measured on other held-out clips or noise levels than .*64x2-1x"):
        result(rungs, following, None)
    file.unlink()
    with pytest.raises(DataError, match="has not measured held-out clips at its end"):
        result(rungs, following, None)


def test_a_chart_over_powers_of_ten_has_even_steps() -> None:
    drawn = chart("x", [Series("y", [(1e9, 3.0), (1e10, 2.0), (1e11, 50.0)])], log_x=True, over="FLOPs")
    assert drawn is not None
    (first, _), (middle, _), (last, top) = drawn.series[0].points
    assert middle - first == pytest.approx(last - middle, abs=0.2) and drawn.top < top < drawn.top + 20
    assert [text for _, text in drawn.steps] == ["1e9", "1e10", "1e11"]


MISTAKES = {
    "--budgets 1x,4x: 2 cannot tell the 3 numbers": ["--budgets", "1x,4x"],
    "--budgets 'four': expected multiples": ["--budgets", "1x,four,16x"],
    "1x and 1.1x are too near": ["--budgets", "1x,1.1x,4x"],
    "128x3 would make 2 steps, expected 10": ["--budgets", "0.02x,1x,4x"],
    "size 'M': expected S, B, L, XL, or WIDTHxDEPTH": ["--sizes", "M"],
    "size 100x2: expected a width that is a multiple of 32": ["--sizes", "100x2"],
    "96x2 and 96x2 are the same size": ["--sizes", "96x2,96x2"],
    "size '0x2': expected": ["--next", "0x2"],
    "--price-per-gpu-hour -1.0": ["--price-per-gpu-hour", "-1"],
    "--gpu asks what --dry-run": ["--gpu", "T4"],
    "data.val_manifest is not set": ["data.val_manifest="],
    "lora.rank": ["lora.rank=4", "init.weights=x"],
    "data.buckets: a ladder's budgets": ['data.buckets=[{num_frames=1, resolution="96x96"}]'],
    "model.hiden_size": ["model.hiden_size=3"],
}


@pytest.mark.parametrize("told", MISTAKES)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], told: str) -> None:
    given = [DEMO, "--sizes", "64x2,128x3", "--budgets", "1x,4x,16x", "--out", str(tmp_path / "out"), *MISTAKES[told]]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [DEMO, "--sizes", "S,B", "--budgets", "1000x,4000x,16000x", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*given, "--gpu", "H100"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told[1:7]] == [[s, f"{b}x"] for b in (1000, 4000, 16000) for s in "SB"]
    assert told[7].startswith("6 runs, 13.72 PFLOP, about ") and "on H100" in told[7]
    assert not (tmp_path / "out").exists()
