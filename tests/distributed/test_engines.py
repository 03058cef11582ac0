"""Every engine, plugin and layout over gloo trains the run of one process, and goes on with any other's checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training_world import (
    World,
    finish,
    losses,
    make_world,
    metrics,
    newest_hashes,
    newest_tensors,
    start_processes,
)

STAGE = "stages.stage2_video"
STEPS, SAVED = 8, 4
SAMPLES = 4  # a step
TOLERANCE = 1e-5  # relative

COLOSSAL = {"parallel__engine": "colossalai"}
FSDP = {"parallel__plugin": "fsdp"}
DDP, ZERO1, ZERO2, HYBRID = ({**COLOSSAL, "parallel__plugin": name} for name in ("ddp", "zero1", "zero2", "hybrid"))

# ZeRO adds up several micro-batches too, recomputed activations meet the same exchanges again, what waits for its use
# may lie in host memory, the text encoder be spread, and checkpoints may be written behind the training: all of it
# changes nothing.
TWO_MICRO_BATCHES = {"train__accumulation": 2}
RECOMPUTED = {"train__activation_checkpointing": "full"}
SELECTIVE = {"train__activation_checkpointing": "selective", "train__offload_activations": True}
SPREAD_TEXT = {"text__shard": True}
IN_HOST_MEMORY = {"optim__offload": True}
BEHIND = {"checkpoint__background": True}

# name: processes and settings
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "torch sp 2": (2, {**SELECTIVE, "parallel__sp_size": 2}),
    "torch sp 4": (4, {"parallel__sp_size": 4}),
    "ddp x 2": (2, {**DDP, **BEHIND}),
    "ddp x 4": (4, DDP),
    "zero1 x 2": (2, {**ZERO1, **TWO_MICRO_BATCHES, **IN_HOST_MEMORY, **SPREAD_TEXT}),
    "zero1 x 4": (4, ZERO1),
    "zero2 x 2": (2, {**ZERO2, **TWO_MICRO_BATCHES, **BEHIND}),
    "zero2 x 4": (4, {**ZERO2, **IN_HOST_MEMORY}),
    "tp 2": (2, {**HYBRID, **SELECTIVE, **IN_HOST_MEMORY, "parallel__tp_size": 2}),
    "zero2 sp 2": (2, {**ZERO2, **RECOMPUTED, "parallel__sp_size": 2}),
    "zero1 x 2, sp 2": (4, {**ZERO1, "parallel__sp_size": 2}),
    "tp 2, sp 2": (4, {**HYBRID, **RECOMPUTED, **SPREAD_TEXT, "parallel__tp_size": 2, "parallel__sp_size": 2}),
    "fsdp x 2": (2, {**FSDP, **TWO_MICRO_BATCHES, **SELECTIVE, **IN_HOST_MEMORY}),
    "fsdp x 4": (4, {**FSDP, **BEHIND, **SPREAD_TEXT}),
    "fsdp x 2, sp 2": (4, {**FSDP, **RECOMPUTED, "parallel__sp_size": 2}),
}
RESUMED = ("one process", "zero2 x 2", "tp 2, sp 2", "fsdp x 2")  # saved by each, continued by each


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: World) -> dict[str, Path]:
    """The finished runs of this file by layout."""
    return {}


def train(world: World, layout: str, run_dir: Path, **changes: Any) -> Path:
    """Start the layout's processes, to 8 steps of 4 samples; every third caption is much longer than the others."""
    start(STAGE, world, layout, run_dir, run_dir.with_name(f"{run_dir.name}-log"), **changes)
    return run_dir


def start(module: str, world: World, layout: str, run_dir: Path, log: Path, *last: str, **changes: Any) -> None:
    processes, settings = LAYOUTS.get(layout, (1, {}))
    model_size = settings.get("parallel__tp_size", 1) * settings.get("parallel__sp_size", 1)
    given = {
        "train__steps": STEPS,
        "train__batch_size": SAMPLES * model_size // processes // settings.get("train__accumulation", 1),
        "checkpoint__every": SAVED,
        "checkpoint__keep": 0,
        "optim__clip_norm": 0.5,
        "optim__eps": 1e-6,  # AdamW makes whole steps of rounding errors where a gradient is nought (a key's bias)
        "data__num_frames": 5,  # which neither 2 nor 4 divides
        "data__val_manifest": str(world.manifest("val")),
        "validation__every": STEPS,
        "sample__every": STEPS,
        "sample__prompts": ["a red square", "a much longer caption of a blue square"],
        "sample__steps": 2,
        **settings,
        **changes,
    }
    arguments = [str(world.root / "empty.toml"), *world.arguments(run_dir, "clips", **given), *last]
    finish(start_processes(module, arguments, processes, log))


def run_of(world: World, runs: dict[str, Path], layout: str) -> Path:
    if layout not in runs:
        runs[layout] = train(world, layout, world.root / layout.replace(" ", "").replace(",", "-"))
    return runs[layout]


def distance(found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """The worst tensor's |difference| over its |value|, Euclidean."""
    assert found.keys() == reference.keys()
    return max(float(np.linalg.norm(found[key] - reference[key]) / np.linalg.norm(reference[key])) for key in reference)


def assert_same(run_dir: Path, expected: Path) -> None:
    np.testing.assert_allclose(losses(run_dir), losses(expected), rtol=TOLERANCE)
    for ours, theirs in zip(map(json.loads, metrics(run_dir)), map(json.loads, metrics(expected)), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
        assert [ours[key] for key in ("step", "lr", "samples", "tokens")] == [
            theirs[key] for key in ("step", "lr", "samples", "tokens")
        ]
    for name in ("model", "ema"):
        assert distance(newest_tensors(run_dir, name), newest_tensors(expected, name)) <= TOLERANCE
    validations = [json.loads((path / "validation.jsonl").read_text()) for path in (run_dir, expected)]
    np.testing.assert_allclose(validations[0]["losses"], validations[1]["losses"], rtol=TOLERANCE)
    assert samples(run_dir) == samples(expected) != set()


def samples(run_dir: Path) -> set[Path]:
    return {path.relative_to(run_dir) for path in (run_dir / "samples").glob("step-*/*")}


def sampled(cases: Sequence[Any], kept: Collection[Any]) -> list[Any]:
    """All cases; those that are not kept run in `make test-all` alone."""
    return [pytest.param(*case, marks=() if case in kept else pytest.mark.exhaustive) for case in cases]


EVERY_TIME = ("ddp x 2", "zero1 x 2", "zero2 x 2", "tp 2, sp 2", "fsdp x 2")


@pytest.mark.parametrize("layout", sampled([(name,) for name in LAYOUTS], [(name,) for name in EVERY_TIME]))
def test_trains_the_run_of_one_process(world: World, runs: dict[str, Path], layout: str) -> None:
    assert_same(run_of(world, runs, layout), run_of(world, runs, "one process"))


@pytest.mark.parametrize(
    ("first", "then"),
    sampled(list(permutations(RESUMED, 2)), list(zip(RESUMED, RESUMED[1:] + RESUMED[:1], strict=True))),
)
def test_continues_from_any_layouts_checkpoint(
    world: World, runs: dict[str, Path], tmp_path: Path, first: str, then: str
) -> None:
    whole = run_of(world, runs, first)
    run_dir = halfway(whole, tmp_path / "run")
    train(world, then, run_dir)
    assert_same(run_dir, whole)


def halfway(whole: Path, run_dir: Path) -> Path:
    """A copy of a finished run, as it was at its checkpoint before the last but for the metrics."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(max((run_dir / "checkpoints").glob("step-*")))
    shutil.rmtree(run_dir / "samples")
    (run_dir / "validation.jsonl").unlink()
    return run_dir


@pytest.mark.parametrize(
    ("plugin", "processes"),
    sampled([("zero1", 2), ("zero2", 4), ("hybrid", 2), ("fsdp", 2), ("fsdp", 4)], [("zero1", 2), ("fsdp", 2)]),
)
def test_nobody_holds_or_writes_more_than_a_share(tmp_path: Path, plugin: str, processes: int) -> None:
    """Masters, averages and moments are spread; of a checkpoint every process writes its part.

    And a step that is not finite changes nothing, however they are spread.
    """
    commands = start_processes("tests.shares", [plugin], processes, tmp_path)
    finish(commands)
    shares = [json.loads(command.out.splitlines()[-1]) for command in commands]
    assert all(share["kept"] for share in shares)
    if plugin == "fsdp":  # between steps there are masters and moments alone
        assert max(share["held"] for share in shares) <= 1.2 * 3 * shares[0]["whole"] / processes, shares
    for kind, copies in (("masters", 1), ("average", 1), ("moments", 1), ("written", 4)):
        counts = [share[kind] for share in shares]
        assert max(counts) <= 1.2 * copies * shares[0]["whole"] / processes, (kind, counts)
        assert sum(counts) >= copies * shares[0]["whole"], (kind, counts)


@pytest.mark.parametrize("layout", ["fsdp x 2"])
def test_resumes_bit_for_bit(world: World, runs: dict[str, Path], tmp_path: Path, layout: str) -> None:
    whole = run_of(world, runs, layout)
    run_dir = train(world, layout, halfway(whole, tmp_path / "run"))
    assert metrics(run_dir) == metrics(whole)
    assert newest_hashes(run_dir) == newest_hashes(whole)


@pytest.mark.exhaustive
def test_bf16_is_within_rounding(world: World, tmp_path: Path) -> None:
    """The yardstick: how far one process gets from itself when it takes the same samples in other micro-batches.

    (Two processes equal one that takes two micro-batches nearly bit for bit, so the nearest ordering counts.)

    In all of these each layer's result is rounded once, and to the same bits, since a sample's does not depend on its
    neighbours: what differs are sums of gradients. A layer that tensor parallelism cuts by rows is rounded three times
    (two halves, then their sum), and so is the gradient of what goes into one cut by columns, whose weights' gradients
    follow. Nothing of that is in the yardstick, so for this layout one process that makes the same roundings is one
    more of the runs which are compared.
    """
    bf16 = {"train__dtype": "bf16"}
    orders = [
        train(world, "one process", tmp_path / f"by{size}", **bf16, train__batch_size=size, train__accumulation=count)
        for size, count in ((4, 1), (2, 2), (1, 4))
    ]
    cut = tmp_path / "cut"
    start("tests.cut_in_two", world, "one process", cut, tmp_path / "cut-log", **bf16)
    for measure in (loss_distance, weight_distance):
        assert max(measure(first, second) for first, second in combinations(orders, 2)) > 1e-6
    for layout in ("fsdp x 2", "zero2 x 2", "torch sp 2", "tp 2, sp 2"):
        found = train(world, layout, tmp_path / layout.replace(" ", ""), **bf16)
        runs = [*orders, cut] if layout == "tp 2, sp 2" else orders
        for measure in (loss_distance, weight_distance):
            noise = max(measure(first, second) for first, second in combinations(runs, 2))
            assert min(measure(found, run) for run in runs) <= noise, (layout, measure.__name__)


def loss_distance(found: Path, reference: Path) -> float:
    """Root mean square over the steps of the losses' relative difference."""
    ours, theirs = np.array(losses(found)), np.array(losses(reference))
    return float(np.sqrt(np.mean((ours / theirs - 1) ** 2)))


def weight_distance(found: Path, reference: Path) -> float:
    """|difference| over |value| of all weights together."""
    ours, theirs = newest_tensors(found), newest_tensors(reference)
    squares = [(float(((ours[key] - theirs[key]) ** 2).sum()), float((theirs[key] ** 2).sum())) for key in theirs]
    return float(np.sqrt(sum(part for part, _ in squares) / sum(whole for _, whole in squares)))
