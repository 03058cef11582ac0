from __future__ import annotations

import copy

import pytest

from opensora_repro.data.sampler import BatchSampler, epoch_permutation


def global_batch(samples: int, size: int, world_size: int, step: int) -> list[tuple[int, int]]:
    ranks = [BatchSampler(samples, size // world_size, 7, rank=r, world_size=world_size) for r in range(world_size)]
    return [pair for sampler in ranks for pair in sampler.batch(step)]


@pytest.mark.parametrize(("samples", "size"), [(10, 4), (7, 12), (1, 4), (24, 4)])
def test_every_sample_once_an_epoch(samples: int, size: int) -> None:
    sampler = BatchSampler(samples, size, 3)
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
    sampler = BatchSampler(50, 8, 1)
    forward = [sampler.batch(step) for step in range(40)]
    assert [sampler.batch(step) for step in reversed(range(40))] == forward[::-1]
    assert copy.deepcopy(sampler).batch(17) == forward[17]


def test_order_changes_with_epoch_and_seed() -> None:
    orders = {tuple(epoch_permutation(100, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert epoch_permutation(6, 0, 0).tolist() == [0, 2, 1, 4, 5, 3]  # pinned: another order would be another run


def test_batch_carries_its_shape() -> None:
    batch = BatchSampler(5, 2, 0, shape=(16, 64, 48)).batch(1)
    assert batch.shape == (16, 64, 48)
    again = copy.deepcopy(batch)  # rebuilds it as a loader's process does
    assert (again, again.shape) == (batch, batch.shape)


@pytest.mark.parametrize("bad", [(0, 1, 0, 1), (5, 0, 0, 1), (5, 1, 2, 2), (5, 1, -1, 2)])
def test_impossible_sizes_are_refused(bad: tuple[int, int, int, int]) -> None:
    samples, size, rank, world_size = bad
    with pytest.raises(ValueError, match=r"samples|batch_size|rank"):
        BatchSampler(samples, size, 0, rank=rank, world_size=world_size)
