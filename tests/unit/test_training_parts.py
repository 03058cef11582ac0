"""The loop's parts one by one: learning rate, logs, quarantine, resume rules, insertion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from opensora_repro.config import BucketConfig, Config, ConfigError, OptimConfig, dump_toml
from opensora_repro.data.dataset import BadSample
from opensora_repro.data.ids import ids_fingerprint
from opensora_repro.errors import DataError, TrainingError
from opensora_repro.kernels.adamw import FusedAdamW
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.planning.positions import describe_rescaling
from opensora_repro.run_folder import JsonLines, TrainState, claimed_run_folder
from opensora_repro.training.metrics import Quarantine
from opensora_repro.training.start import changed_settings, find_start
from opensora_repro.training.step import Ema, StepResult, StepTotals, decide, learning_rate
from opensora_repro.weights.insertion import assert_equals_image_model, image_twin
from tests.checkpoints import prepared, write_checkpoint

TINY = STDiTConfig(hidden_size=32, depth=2, num_heads=4, caption_channels=12, model_max_length=6)


def changed(config: Config, **values: Any) -> Config:
    """`changed(config, train__steps=3)`."""
    for name, value in values.items():
        section, key = name.split("__")
        config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})
    return config


# Learning rate and gradients


def test_learning_rate_warms_up_stays_and_decays() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=4, decay_steps=3)
    rates = [learning_rate(cfg, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    constant = [learning_rate(OptimConfig(lr=0.3), step, 5) for step in range(5)]
    assert constant == [0.3] * 5


def test_the_engines_norm_and_step() -> None:
    model = torch.nn.Linear(7, 5)
    before = model.weight.detach().clone()
    engine = prepared(model, torch.optim.SGD(model.parameters(), lr=9.0))
    engine.backward(model(torch.randn(3, 7)).square().sum())
    gradient = model.weight.grad.clone()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().square().sum()
    torch.testing.assert_close(engine.squared_gradients(), expected, rtol=1e-6, atol=0)
    engine.step(lr=0.1, factor=0.5)
    torch.testing.assert_close(model.weight.detach(), before - 0.05 * gradient)
    engine.zero_grad()
    assert model.weight.grad is None


class Summing(TorchEngine):
    """As if another process had added the same sums."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.mul_(2)


@pytest.mark.parametrize(
    ("loss", "gradient", "samples", "clip_norm"),
    [(3.0, 2.0, 3, 1.0), (3.0, 2.0, 3, 0.0), (3.0, 1e-3, 4, 1.0), (0.0, 0.0, 0, 1.0), (math.nan, 2.0, 4, 1.0),
     (3.0, math.inf, 4, 1.0), (3.0, math.nan, 4, 0.0)],
)  # fmt: skip
def test_what_is_decided_of_a_step(loss: float, gradient: float, samples: int, clip_norm: float) -> None:
    """Against the same in Python's numbers; 8 samples are a global batch."""
    model = torch.nn.Linear(2, 2, bias=False)
    engine = Summing(device="cpu")
    engine.prepare(model, torch.optim.AdamW(model.parameters(), fused=True))
    model.weight.grad = torch.full((2, 2), gradient)
    totals = StepTotals(torch.tensor(loss, dtype=torch.float64), samples, 4 - samples, 100)
    decision = decide(engine, totals, stopping=True, global_batch_size=8, clip_norm=clip_norm)
    found = StepResult.of(decision.result.tolist())

    good = max(2 * samples, 1)
    norm = math.sqrt(2 * 4 * gradient**2) * 8 / good
    assert (found.loss, found.grad_norm) == pytest.approx((2 * loss / good, norm), rel=1e-6, nan_ok=True)
    assert (found.samples, found.bad, found.tokens) == (2 * samples, 2 * (4 - samples), 200)
    assert found.stopping
    assert found.finite == (math.isfinite(loss) and math.isfinite(gradient))
    assert found.stepped == (found.finite and samples > 0)
    assert not found.lost
    assert decision.skip.item() == float(not found.stepped)
    if found.stepped:
        clip = clip_norm / norm if clip_norm and norm > clip_norm else 1.0
        assert decision.factor.item() == pytest.approx(8 / good * clip)


def test_a_lost_step_is_skipped() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    engine = prepared(model, torch.optim.AdamW(model.parameters(), fused=True))
    model.weight.grad = torch.ones(2, 2)
    totals = StepTotals(torch.tensor(3.0, dtype=torch.float64), 4, 0, 100, lost=True)
    decision = decide(engine, totals, stopping=False, global_batch_size=4, clip_norm=1.0)
    found = StepResult.of(decision.result.tolist())
    assert found.lost and not found.stepped and decision.skip.item() == 1


@pytest.mark.parametrize("kind", ["torch's fused", "ours", "torch's plain"])
def test_a_skipped_step_changes_nothing(kind: str) -> None:
    def trained(steps: Sequence[bool]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
        optimizer: torch.optim.Optimizer = (
            FusedAdamW(model.parameters(), **options)
            if kind == "ours"
            else torch.optim.AdamW(model.parameters(), **options, fused=kind == "torch's fused")
        )
        engine = prepared(model, optimizer)
        ema = Ema(engine, 0.5)
        for number, skip in enumerate(steps):
            model.weight.grad = torch.full((2, 3), math.nan if skip else 1.0 + number)
            engine.step(0.1, torch.tensor(0.7), torch.tensor(float(skip)))
            if not skip:
                ema.update()
            engine.zero_grad()
        values = [*model.parameters(), *ema.shadow.values()]
        return [*values, *(value for state in optimizer.state.values() for value in state.values())]

    expected = trained([False, False, False])
    found = trained([False, False, False, True, True])
    assert len(found) == len(expected) == 7
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(trained([False, False])[0], expected[0])


# Logs


def test_json_lines_truncate_to_the_resumed_step(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    assert file.read() == []
    for step in range(1, 6):
        file.write({"step": step, "loss": 1 / 3 / step})
    file.close()
    lines = file.path.read_text().splitlines()
    with open(file.path, "a") as handle:
        handle.write('{"loss": 1}\n[1]\n{"step": "x"}\n')  # somebody's
        handle.write('{"step": 6, "lo')  # a kill in the middle of a line
    file.truncate_after(3)
    assert file.path.read_text().splitlines() == lines[:3]
    file.write({"step": 4, "loss": math.nan})
    assert file.read()[-1] == {"step": 4, "loss": None}
    file.close()


def test_every_line_reaches_the_file_at_once(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    assert json.loads(file.path.read_text()) == {"step": 1}
    file.close()


# Quarantine


def bad(name: str) -> BadSample:
    return BadSample(name, f"{name}.mp4", "ends early")


def test_quarantine_records_once_and_stops_above_the_fraction(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, num_samples=20, max_fraction=0.1)
    assert quarantine.add(bad("a")) is True
    assert quarantine.add(bad("a")) is False
    assert quarantine.add(bad("b")) is True
    quarantine.saw(range(20))
    quarantine.check()
    quarantine.add(bad("c"))
    with pytest.raises(DataError, match=r"3 of 20 samples cannot be read.*max_bad_fraction = 0.1.*'c'.*ends early"):
        quarantine.check()
    quarantine.close()
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0] == {"id": "a", "path": "a.mp4", "reason": "ends early"}


def test_the_share_counts_samples_seen_from_twenty_on(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path, num_samples=100_000, max_fraction=0.1)
    for name in "abc":
        quarantine.add(bad(name))
    quarantine.saw(range(19))
    quarantine.saw(range(19))  # again, in another epoch
    quarantine.check()
    quarantine.saw([99_999])
    with pytest.raises(DataError, match="3 of 20 samples"):
        quarantine.check()
    quarantine.saw(range(30))
    quarantine.check()  # 3 of 31
    few = Quarantine(tmp_path, num_samples=3, max_fraction=0.5)
    few.add(bad("a"))
    few.add(bad("b"))
    few.saw([0, 1])
    few.check()
    few.saw([2])
    with pytest.raises(DataError, match="2 of 3"):
        few.check()


def test_quarantine_of_an_earlier_start_is_not_written_twice(tmp_path: Path) -> None:
    for _ in range(2):
        quarantine = Quarantine(tmp_path, num_samples=20, max_fraction=0.1)
        quarantine.add(bad("a"))
        quarantine.close()
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1


# Start or resume


def saved_run(tmp_path: Path, cfg: Config) -> None:
    write_checkpoint(tmp_path, STDiT(TINY), dump_toml(cfg), TrainState(step=4, global_batch_sizes=[8]))


def test_resumes_with_equal_or_freely_changed_settings(tmp_path: Path) -> None:
    cfg = changed(Config(model=TINY), run__dir=str(tmp_path), data__manifest="m.parquet")
    assert not find_start(cfg, 1).resumes
    saved_run(tmp_path, cfg)
    assert find_start(cfg, 1).state.step == 4
    free = changed(
        cfg, train__steps=9999, checkpoint__every=3, sample__every=7, data__num_workers=0, train__batch_size=2,
        train__accumulation=4, train__max_bad_steps=1, train__activation_checkpointing="none",
    )  # fmt: skip
    assert find_start(free, 1).resumes
    assert find_start(changed(cfg, train__batch_size=2), 4).resumes


def test_buckets_resume_with_the_samples_of_each_step(tmp_path: Path) -> None:
    """However the processes share them; a run of an earlier release, whose one size is a number, too."""
    buckets = (BucketConfig(4, "64x64", batch_size=4), BucketConfig(1, "64x64", batch_size=8))
    cfg = changed(Config(model=TINY), run__dir=str(tmp_path), data__manifest="m.parquet", data__buckets=buckets)
    state = TrainState(step=4, global_batch_sizes=[4, 8])
    write_checkpoint(tmp_path, STDiT(TINY), dump_toml(cfg), state)
    halves = tuple(dataclasses.replace(bucket, batch_size=bucket.batch_size // 2) for bucket in buckets)
    assert find_start(changed(cfg, data__buckets=halves), 2).resumes
    with pytest.raises(ConfigError, match=r"data ranks\) = 8 there, 4 here \(4 x 1 x 1 data ranks\)"):
        find_start(changed(cfg, data__buckets=(buckets[0], halves[1])), 1)
    with pytest.raises(ConfigError, match=r"data.buckets = \["):
        find_start(changed(cfg, data__buckets=buckets[:1]), 1)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("optim__lr", 1e-3, "optim.lr = 2e-05 there, 0.001 here"),
        ("run__seed", 1, "run.seed = 42 there, 1 here"),
        ("init__weights", "other", "init.weights = none there, 'other' here"),
        ("data__height", 64, "data.height = 256 there, 64 here"),
        ("diffusion__objective", "flow", "diffusion.objective = 'iddpm' there, 'flow' here"),
        ("model__depth", 3, "model.depth = 2 there, 3 here"),
        ("ema__decay", 0.5, "ema.decay = 0.9999 there, 0.5 here"),
        ("train__batch_size", 4, "train.accumulation x data ranks) = 8 there, 4 here (4 x 1 x 1 data ranks)"),
    ],
)
def test_refuses_other_settings_by_name(tmp_path: Path, key: str, value: Any, shown: str) -> None:
    cfg = changed(Config(model=TINY), run__dir=str(tmp_path))
    saved_run(tmp_path, cfg)
    with pytest.raises(ConfigError) as caught:
        find_start(changed(cfg, **{key: value}), 1)
    message = str(caught.value)
    assert shown in message
    assert "run.dir" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("steps", "decay", "done", "new_steps", "shown"),
    [
        (10, 0, 10, 99, None),
        (10, 3, 7, 99, None),
        (10, 3, 8, 99, "has been falling since step 8, to end at train.steps=10"),
        (10, 3, 10, 11, "has been falling since step 8"),
        (10, 3, 9, 10, None),
        (10, 30, 1, 11, "has been falling since step 1,"),
        (10, 0, 6, 5, "has made 6 steps already; set train.steps=6 or more"),
        (10, 3, 6, 6, None),
    ],
)
def test_steps_that_would_undo_what_was_done(
    tmp_path: Path, steps: int, decay: int, done: int, new_steps: int, shown: str | None
) -> None:
    cfg = changed(Config(model=TINY), run__dir=str(tmp_path), train__steps=steps, optim__decay_steps=decay)
    write_checkpoint(tmp_path, STDiT(TINY), dump_toml(cfg), TrainState(step=done, global_batch_sizes=[8]))
    cfg = changed(cfg, train__steps=new_steps)
    if shown is None:
        assert find_start(cfg, 1).state.step == done
        return
    with pytest.raises(ConfigError, match=f"train.steps = {new_steps}: .*{shown}"):
        find_start(cfg, 1)


def test_every_setting_is_compared_or_explicitly_free() -> None:
    old = Config()
    same = changed_settings(old, old)
    assert same == []
    new = changed(old, optim__eps=1e-3, optim__betas=(0.5, 0.5), data__flip=False)
    assert len(changed_settings(old, new)) == 3


def test_one_process_a_run_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with claimed_run_folder(run_dir):
        with pytest.raises(ConfigError, match="another process is training there"), claimed_run_folder(run_dir):
            pass
        (run_dir / "file").write_text("kept")
    assert run_dir.exists()
    with claimed_run_folder(tmp_path / "unused"):
        pass
    assert not (tmp_path / "unused").exists()


def test_a_forked_loader_does_not_keep_a_dead_runs_folder(tmp_path: Path) -> None:
    """As after kill -9: the run is gone, its loader processes still live for some seconds."""
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        with claimed_run_folder(tmp_path / "run"):
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # the loader: until this test ends
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(run, 0)
    with claimed_run_folder(tmp_path / "run"):
        pass
    os.close(writing)
    os.close(reading)


def test_ids_fingerprint_sees_order_and_borders() -> None:
    columns = (["a", "b"], ["b", "a"], ["ab"], ["a", "b", "c"], ["a", "bc"])
    assert len({ids_fingerprint(pa.chunked_array([ids])) for ids in columns}) == 5
    # What earlier releases have recorded, however the column is divided
    ids = ["", "b ö", "视频"]
    told = hashlib.blake2b("0:3:b ö2:视频".encode(), digest_size=8).hexdigest()
    for chunks in ([ids], [ids[:1], [], ids[1:]]):
        column = pa.chunked_array(chunks, pa.string())
        assert ids_fingerprint(column) == f"3 samples, ids {told}"
    assert ids_fingerprint(pa.chunked_array([["x", *ids]]).slice(1)) == f"3 samples, ids {told}"


# Positions


def test_rescaled_positions_are_described() -> None:
    small = changed(Config(), data__height=256, data__width=256, data__num_frames=16, model__space_scale=0.5)
    large = changed(small, data__height=512, data__width=512, model__space_scale=1.0)
    (line,) = describe_rescaling(large, small, stride=8)
    assert "frames 0..15 by 1 (16) -> 0..15 by 1 (16)" in line
    assert "rows 0..30 by 2 (16) -> 0..31 by 1 (32)" in line
    lines = describe_rescaling(changed(large, model__space_scale=0.5), small, stride=8)
    assert len(lines) == 3
    assert "positions of rows reach 62, the weights know them up to 30; model.space_scale = 1 " in lines[1]
    assert describe_rescaling(small, None, stride=8)[0].startswith("positions: frames 0..15 by 1 (16); rows 0..30")


# Inserting temporal attention


def video_model() -> STDiT:
    torch.manual_seed(3)
    model = STDiT(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # also what starts at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
            if ".attn_temp.proj." in name:
                parameter.zero_()
    return model


def test_inserted_at_zero_equals_the_image_model() -> None:
    model = video_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert assert_equals_image_model(model) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("frames", [2, 3])
def test_patches_of_several_frames_start_as_the_image_model_of_still_clips(frames: int) -> None:
    from opensora_repro.weights.load import load_model_weights

    image = image_twin(video_model())
    model = STDiT(dataclasses.replace(TINY, patch_size=(frames, *TINY.patch_size[1:])))
    report = load_model_weights(model, image.state_dict())
    assert report.inserted_temporal_attention and f"inflated to {frames}" in str(report)
    assert assert_equals_image_model(model) < 1e-5
    kernel = model.x_embedder.proj.weight  # [D, C, pT, pH, pW]
    assert kernel[:, :, : frames // 2].eq(0).all() and kernel[:, :, frames // 2 + 1 :].eq(0).all()
    with torch.no_grad():
        kernel[:, :, 0] += 1e-2
    with pytest.raises(TrainingError, match="differs from the image model"):
        assert_equals_image_model(model)


def test_a_temporal_branch_that_is_not_zero_is_noticed() -> None:
    model = video_model()
    with torch.no_grad():
        model.blocks[1].attn_temp.proj.weight.add_(1e-2)
    with pytest.raises(TrainingError, match="differs from the image model"):
        assert_equals_image_model(model)


# Grids


def test_grid_of_videos_and_of_pictures() -> None:
    from opensora_repro.sampling.grids import tile

    videos = [np.full((16, 10, 12, 3), value, dtype=np.uint8) for value in (50, 100)]
    grid = tile(videos)
    assert grid.shape == (2 * 12, 8 * 14, 3)
    assert grid[0, 0, 0] == 50
    assert grid[12, 0, 0] == 100
    pictures = [np.full((1, 10, 12, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    grid = tile(pictures)
    assert grid.shape == (2 * 12, 2 * 14, 3)
    assert [int(grid[y, x, 0]) for y, x in ((0, 0), (0, 14), (12, 0), (12, 14))] == [10, 20, 30, 0]
