"""What samples faster, as a user asks for it: `stages.sample`, `stages.calibrate`, `benchmarks.sample RUN`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from stages import calibrate
from tests.sample_home import PROMPTS, check_mistake, sample

STEPS = ("--steps", "8", "--batch-size", "2")


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "samples.json").read_text())
    return found


def test_fast_chooses_says_what_and_leaves_the_rest(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(home / "flow", tmp_path / "a", "--fast", prompts=PROMPTS[:2])
    shown = capsys.readouterr().out
    assert (
        "--fast: --sampler euler --steps 3 --guidance-interval" in shown and "guidance 2 acts at noise levels" in shown
    )
    told = record(tmp_path / "a")
    assert (told["sampler"], told["steps"]) == ("euler", 3) and "guidance_interval" in told  # never more than its own
    sample(
        home / "flow",
        tmp_path / "b",
        "--fast",
        "--sampler",
        "heun",
        "--steps",
        "5",
        "--guidance",
        "1",
        prompts=PROMPTS[:1],
    )
    told = record(tmp_path / "b")
    assert (told["sampler"], told["steps"], told["guidance"]) == ("heun", 5, 1.0) and "guidance_interval" not in told
    sample(home / "iddpm", tmp_path / "c", "--fast", "--dry-run", prompts=PROMPTS[:1])
    assert "--fast: --sampler dpm --steps 3 " in capsys.readouterr().out


def test_parts_are_stored_and_resumed_by_their_settings(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("--broadcast", "2", "3", "4", "--guidance-interval", "0.2", "0.9")
    plain = sample(home / "flow", tmp_path / "plain", *STEPS)
    assert not {"broadcast", "guidance_interval", "step_cache"} & set(record(tmp_path / "plain"))
    one = sample(home / "flow", tmp_path / "one", *STEPS, "--broadcast", "1", "1", "1", "--guidance-interval", "0", "1")
    assert all(np.array_equal(a, b) for a, b in zip(plain, one, strict=True))
    faster = sample(home / "flow", tmp_path / "out", *STEPS, *parts)
    shown = capsys.readouterr().out
    assert "outputs serve 2 (spatial), 3 (temporal) and 4 (cross) calls of the model, in calls 2 to 7 of 8" in shown
    assert any(not np.array_equal(a, b) for a, b in zip(plain, faster, strict=True))
    (tmp_path / "out" / "0001.mp4").unlink()
    again = sample(home / "flow", tmp_path / "out", *STEPS, *parts)
    assert "1 written" in capsys.readouterr().out
    assert all(np.array_equal(a, b) for a, b in zip(again, faster, strict=True))
    from stages.sample import main

    args = [str(home / "flow"), "--prompt", PROMPTS[0], "--seed", "3", "--device", "cpu", *STEPS]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    assert "holds samples of other settings: guidance_interval = [0.2, 0.9] there, none here" in capsys.readouterr().err
    assert main([*args, "--out", str(tmp_path / "plain"), *parts]) == 2
    assert "guidance_interval is not told there, [0.2, 0.9] here" in capsys.readouterr().err


def test_a_step_cache_is_calibrated_found_and_bound_to_its_weights(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(home / "flow", tmp_path / "run")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    args = [str(run), "--prompts", str(prompts), "--device", "cpu", "--batch-size", "2", "--steps", "8", "--psnr", "15"]
    assert calibrate.main(args) == 0
    told = json.loads((run / "step_cache.json").read_text())
    rows = told["thresholds"]
    assert [row["threshold"] for row in rows] == sorted(row["threshold"] for row in rows)
    assert rows[0]["blocks_run"] > rows[-1]["blocks_run"] >= 2 and rows[0]["psnr"] > rows[-1]["psnr"]
    assert told["threshold"] in [row["threshold"] for row in rows] and "x  " in capsys.readouterr().out

    plain = sample(run, tmp_path / "plain", *STEPS)
    none = sample(run, tmp_path / "none", *STEPS, "--step-cache", "0")
    found = sample(run, tmp_path / "found", *STEPS, "--step-cache", f":{rows[-1]['threshold']}")
    assert all(np.array_equal(a, b) for a, b in zip(plain, none, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(plain, found, strict=True))
    stored = record(tmp_path / "found")["step_cache"]
    assert stored == {"threshold": rows[-1]["threshold"], "polynomial": told["polynomial"], "span": told["span"]}

    monkeypatch.setenv("HOME", str(run))
    other = [str(home / "iddpm"), "--prompt", "x", "--step-cache", "~/step_cache.json"]
    check_mistake(other, "step_cache.json: calibrated for other weights; run stages.calibrate", tmp_path / "x", capsys)
    check_mistake(
        [str(home / "iddpm"), "--prompt", "x", "--step-cache"], "iddpm --prompts FILE writes it", tmp_path, capsys
    )
    (run / "step_cache.json").write_text('{"polynomial": ["a"]}')
    check_mistake([str(run), "--prompt", "x", "--step-cache"], "not a file of stages.calibrate", tmp_path, capsys)
    for out in (tmp_path, prompts / "x.json"):
        assert calibrate.main([*args, "--out", str(out)]) == 2
        assert "error: --out = " in (err := capsys.readouterr().err) and "calibrating" not in err
    assert calibrate.main([*args, "--steps", "3"]) == 2
    assert "--steps 3: expected at least 5, or there is nothing to skip" in capsys.readouterr().err


MISTAKES = {
    "order": (["--guidance-interval", "0.8", "0.2"], "expected noise levels, 0 <= LOW < HIGH <= 1"),
    "level": (["--guidance-interval", "0.2", "800"], "--guidance-interval 0.2 800: expected noise levels"),
    "no guidance": (["--guidance-interval", "0.2", "0.8", "--guidance", "1"], "guidance is 1, there is none to limit"),
    "range": (
        ["--broadcast", "2", "40", "6", "--steps", "30"],
        "an output cannot serve 40 steps, from 0.1 to 0.9 of 30",
    ),
    "zero": (["--broadcast", "2", "0", "6", "--steps", "30"], "--broadcast 2 0 6: expected at least 1 each"),
    "between": (["--broadcast-between", "0.1", "0.9"], "--broadcast-between: give --broadcast, too"),
    "shares": (["--broadcast", "2", "2", "2", "--broadcast-between", "1", "20"], "expected shares of the steps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_nonsense_is_one_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    args, message = MISTAKES[name]
    check_mistake([str(home / "flow"), "--prompt", "x", *args], message, tmp_path, capsys)


@pytest.mark.exhaustive
def test_benchmark_of_a_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import faster
    from benchmarks.sample import main

    monkeypatch.setitem(faster.FULL, "flow", ("euler", 10))
    out = tmp_path / "sample.json"
    monkeypatch.setattr(
        sys, "argv", ["sample", str(home / "flow"), "--prompts", "2", "--one-thread", "--out", str(out)]
    )
    main()
    shown = capsys.readouterr().out
    rows = {row["side"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"full", "as the run has it", "second order", "guidance interval", "broadcast", "--fast"} <= set(rows)
    assert rows["full"]["ratio"] == 1 and rows["--fast"]["ratio"] > 1 and rows["broadcast"]["psnr"] > 5
    assert set(rows["--fast"]["adherence"]) == {"colour", "shape", "direction"} and "--fast, broadcast" in shown
