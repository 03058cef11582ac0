from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from opensora_repro.config import BucketConfig, DataConfig
from opensora_repro.data.buckets import Rule, assign
from opensora_repro.data.sampler import BatchSampler, Schedule, everything
from opensora_repro.errors import DataError

SHAPE = (16, 64, 48)


def one_size(num_samples: int, size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> BatchSampler:
    schedule = Schedule(everything(num_samples), [size * world_size], seed)
    return BatchSampler(schedule, [SHAPE], rank=rank, world_size=world_size)


def global_batch(samples: int, size: int, world_size: int, step: int) -> list[tuple[int, int]]:
    ranks = [one_size(samples, size // world_size, 7, rank=r, world_size=world_size) for r in range(world_size)]
    return [pair for sampler in ranks for pair in sampler.batch(step)]


@pytest.mark.parametrize(("samples", "size"), [(10, 4), (7, 12), (1, 4), (24, 4)])
def test_every_sample_once_an_epoch(samples: int, size: int) -> None:
    sampler = one_size(samples, size, 3)
    seen = [pair for step in range(3 * samples) for pair in sampler.batch(step)]
    for epoch in range(3):
        assert sorted(index for e, index in seen if e == epoch) == list(range(samples))
    assert [e for e, _ in seen] == sorted(e for e, _ in seen)


@pytest.mark.parametrize("world_size", [2, 3, 4, 12])
def test_global_batch_does_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    for step in (0, 1, 5, 1000):
        whole = global_batch(31, 12, 1, step)
        assert global_batch(31, 12, world_size, step) == whole
        assert len(set(whole)) == 12


def test_batch_is_a_pure_function_of_the_step() -> None:
    sampler = one_size(50, 8, 1)
    forward = [sampler.batch(step) for step in range(40)]
    assert [sampler.batch(step) for step in reversed(range(40))] == forward[::-1]
    assert copy.deepcopy(sampler).batch(17) == forward[17]


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {
        tuple(index for _, index in one_size(100, 100, seed).batch(epoch)) for seed in (0, 1) for epoch in (0, 1, 2)
    }
    assert len(orders) == 6
    # Pinned: another order would be another run
    assert [index for _, index in one_size(6, 6, 0).batch(0)] == [0, 2, 1, 4, 5, 3]


def test_batch_carries_its_shape() -> None:
    batch = one_size(5, 2, 0).batch(1)
    assert batch.shape == SHAPE
    again = copy.deepcopy(batch)  # rebuilds it as a loader's process does
    assert (again, again.shape) == (batch, batch.shape)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        Schedule(everything(5), [0], 0)
    schedule = Schedule(everything(5), [6], 0)
    with pytest.raises(ValueError, match="rank"):
        BatchSampler(schedule, [SHAPE], rank=2, world_size=2)
    with pytest.raises(ValueError, match="4 x 1 parts do not divide"):
        BatchSampler(schedule, [SHAPE], world_size=4)


# Buckets

DATA = DataConfig(
    frame_interval=1,
    buckets=(
        BucketConfig(8, "64x64", ("1:1", "3:2"), keep=0.5),
        BucketConfig(4, "32x32", "square", batch_size=8),
        BucketConfig(1, "32x32", batch_size=12),
    ),
)
RULE = Rule(DATA, 4)
SIZES = [bucket.batch_size for bucket in RULE.buckets]
CLIPS = [(8, 64, 64)] * 21 + [(8, 64, 96)] * 2 + [(4, 50, 50)] * 30 + [(1, 64, 64)] * 5 + [(3, 64, 64)] * 9
MANIFEST = pa.table(
    {
        "id": [f"clip {index}" for index in range(len(CLIPS))],
        **{name: [clip[i] for clip in CLIPS] for i, name in enumerate(("num_frames", "height", "width"))},
        "fps": [24.0] * len(CLIPS),
    }
)
STEPS = 60


def schedule(draws: int = 0) -> Schedule:
    return Schedule(assign(MANIFEST, RULE, 1), SIZES, 9, draws=draws)


@pytest.mark.parametrize("draws", [0, 2])
def test_remainders_go_into_later_epochs_and_none_is_lost(draws: int) -> None:
    """Also where a bucket's clips of many epochs make one step: two wide ones, half of the time, for steps of four."""
    steps = [schedule(draws).step(number) for number in range(STEPS)]
    assert all(len(step.rows) == SIZES[step.bucket] for step in steps)
    assert {step.bucket for step in steps} == set(range(len(SIZES)))
    assignment, of = schedule(draws).assignment, schedule(draws).draw
    last = max(int(step.epochs.max()) for step in steps)
    for bucket in range(len(SIZES)):
        epochs = np.concatenate([step.epochs for step in steps if step.bucket == bucket] or [np.empty(0, int)])
        rows = np.concatenate([step.rows for step in steps if step.bucket == bucket] or [np.empty(0, int)])
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(last - 1):  # whole by then, but for what is left of the last
            seen = rows[epochs == epoch].tolist()
            members = np.flatnonzero(assignment.buckets(of(epoch)) == bucket).tolist()
            assert len(seen) == len(set(seen))
            assert set(seen) <= set(members)
            if epochs.size and epoch < epochs[-1]:
                assert sorted(seen) == members
    lost = set(range(len(CLIPS))) - {row for step in steps for row in step.rows.tolist()}
    assert {row for row in range(len(CLIPS)) if CLIPS[row][0] == 3} <= lost
    assert draws or len(lost) == 9


def test_any_step_alone_is_that_of_the_whole_run() -> None:
    whole = schedule()
    steps = [whole.step(number) for number in range(STEPS)]
    for number in range(0, STEPS, 7):
        alone = schedule().step(number)
        for found in (alone, whole.step(number)):
            assert found.bucket == steps[number].bucket
            assert found.rows.tolist() == steps[number].rows.tolist()
            assert found.epochs.tolist() == steps[number].epochs.tolist()


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_processes_and_micro_batches_share_a_steps_samples(world_size: int, accumulation: int) -> None:
    shapes = [bucket.shape for bucket in RULE.buckets]
    alone = BatchSampler(schedule(), shapes)
    ranks = [
        BatchSampler(schedule(), shapes, rank=r, world_size=world_size, accumulation=accumulation)
        for r in range(world_size)
    ]
    for number in range(STEPS):
        parts = [r.batch(number * accumulation + part) for part in range(accumulation) for r in ranks]
        assert [pair for part in parts for pair in part] == alone.batch(number)
        assert {part.shape for part in parts} == {alone.batch(number).shape}
        assert len({len(part) for part in parts}) == 1


def test_buckets_are_mixed_evenly() -> None:
    rows = pa.table(
        {
            "id": [str(index) for index in range(1200)],
            "num_frames": [4] * 900 + [1] * 300,
            "height": [40] * 1200,
            "width": [40] * 1200,
            "fps": [24.0] * 1200,
        }
    )
    found = Schedule(assign(rows, RULE, 1), [4, 4, 3, 3], 0)
    steps = [found.step(number).bucket for number in range(found.steps_before(1))]
    more, fewer = (bucket for bucket, _ in Counter(steps).most_common())
    for first in range(0, 325 - 40, 40):
        assert 27 <= steps[first : first + 40].count(more) <= 33
        assert 7 <= steps[first : first + 40].count(fewer) <= 13


def test_no_clip_for_any_bucket_is_one_line() -> None:
    nothing = MANIFEST.slice(len(CLIPS) - 9)
    with pytest.raises(DataError, match="no clip goes to any of data"):
        Schedule(assign(nothing, RULE, 1), SIZES, 0).step(0)
