"""Which clips make a packed step, a process's share and a row; and what a row's loss is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from benchmarks.sides import random_weights
from opensora_repro.config import (
    BucketConfig,
    Config,
    ConfigError,
    DataConfig,
    DiffusionConfig,
    FrameMasksConfig,
    TrainConfig,
    VaeConfig,
)
from opensora_repro.data.buckets import Bucket, Rule, assign
from opensora_repro.data.packing import PackedSampler, Together, even_parts, first_fit_decreasing
from opensora_repro.data.sampler import SampleBatch, Schedule
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.frozen.encoder import Encoded
from opensora_repro.frozen.vae import open_vae
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.packing import PackedSTDiT
from opensora_repro.training.batches import BatchBuilder
from opensora_repro.training.preflight import check_tokens
from opensora_repro.training.step import ModelRunner, packed_losses
from tests.tiny_models import make_tiny_vae

BUCKETS = (
    BucketConfig(4, "64x64", ratios=("1:1", "3:2"), keep=0.5),
    BucketConfig(2, "64x64", ratios=("1:1", "3:2")),
    BucketConfig(1, "32x32"),
)
ROWS, STEP = 53, 12


def test_first_fit_decreasing() -> None:
    assert first_fit_decreasing([3, 7, 5, 5, 2, 3], 10) == [[0, 1], [2, 3], [4, 5]]
    assert first_fit_decreasing([10, 1, 10], 10) == [[0], [2], [1]]
    assert first_fit_decreasing([], 10) == []
    sizes = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = first_fit_decreasing(sizes, 64)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert max(sum(sizes[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 11 / 9 * math.ceil(sum(sizes) / 64) + 1
    with pytest.raises(ValueError, match="11 tokens do not fit into a row of 10"):
        first_fit_decreasing([3, 11], 10)


def test_parts_are_even_and_none_is_empty() -> None:
    assert even_parts([8, 1, 1, 1, 5], 2) == [[0], [1, 2, 3, 4]]
    assert even_parts([9, 1, 1, 1], 4) == [[0], [1], [2], [3]]


def mixed_rows() -> tuple[Any, Rule]:
    sizes = [(8, 64, 64), (8, 64, 96), (2, 80, 80), (1, 64, 64), (1, 20, 20)]  # the last fills no bucket
    columns = zip(*(sizes[row % 5] for row in range(ROWS)), strict=True)
    names = ("num_frames", "height", "width")
    table = {name: list(values) for name, values in zip(names, columns, strict=True)}
    ids = pa.array([f"clip {row}" for row in range(ROWS)])
    return pa.table({"id": ids, **table, "fps": [24.0] * ROWS}), Rule(DataConfig(frame_interval=1, buckets=BUCKETS), 1)


def samplers(world_size: int, accumulation: int = 1) -> list[PackedSampler]:
    table, rule = mixed_rows()
    schedule = Schedule(Together(assign(table, rule, 5)), [STEP], 5, draws=3)
    shapes = [bucket.shape for bucket in rule.buckets]
    share = {"world_size": world_size, "accumulation": accumulation}
    return [PackedSampler(schedule, shapes, rank=rank, **share) for rank in range(world_size)]


def step(parts: list[PackedSampler], number: int) -> list[SampleBatch]:
    count = parts[0].accumulation
    return [sampler.batch(number * count + part) for part in range(count) for sampler in parts]


def passes(parts: list[SampleBatch]) -> set[tuple[Any, ...]]:
    assert all(part.shapes is not None and len(part) == len(part.shapes) > 0 for part in parts)
    return {(*pair, shape) for part in parts for pair, shape in zip(part, part.shapes or (), strict=True)}


def test_a_step_is_the_same_whatever_shares_it() -> None:
    """Other numbers of processes and micro-batches, and in any order of asking."""
    alone, four, six = samplers(1), samplers(4), samplers(2, accumulation=3)
    for number in (9, 0, 30):
        expected = passes(step(alone, number))
        assert len(expected) == STEP and len({shape for *_, shape in expected}) > 2
        assert passes(step(four, number)) == passes(step(six, number)) == expected
    pixels = [[sum(map(math.prod, part.shapes or ())) for part in step(four, number)] for number in range(40)]
    assert sum(map(max, pixels)) < 1.15 * sum(map(sum, pixels)) / 4  # nobody waits long for the fullest


def test_every_clip_is_seen_in_each_epoch_in_its_bucket() -> None:
    table, rule = mixed_rows()
    assignment = assign(table, rule, 5)
    sampler, seen = samplers(1)[0], Counter()
    for number in range(60):
        seen.update(passes([sampler.batch(number)]))
    for epoch in range(6):
        buckets = assignment.buckets(epoch % 3)
        expected = {(epoch, row, rule.buckets[of].shape) for row, of in enumerate(buckets.tolist()) if of >= 0}
        assert {visit for visit in seen if visit[0] == epoch} == expected
    assert set(seen.values()) == {1}


def test_a_clip_that_fits_into_no_row_is_refused(tmp_path: Path) -> None:
    vae = open_vae(VaeConfig(path=str(make_tiny_vae(tmp_path))), "cpu", torch.float32)
    cfg = Config(data=DataConfig(packing_tokens=31))
    check_tokens(cfg, Bucket(4, 32, 48, 1), vae)
    with pytest.raises(ConfigError, match=r"packing_tokens = 31: expected at least 32, .*\(4 x 32x64\)"):
        check_tokens(cfg, Bucket(4, 32, 64, 1), vae)


SHAPES = {"a": (4, 4, 6), "b": (1, 6, 4), "c": (4, 4, 6), "d": (2, 3, 5), "e": (1, 6, 4)}  # 24, 6, 24, 12, 6 tokens


class NoPosterior:
    """What a builder asks of an autoencoder; moments are the latents, twice."""

    scale, spatial_stride, latent_channels = 1.0, 8, 4

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        return 4, frames, height // 8, width // 8

    def sample_latents(self, moments: Tensor, generator: Any) -> Tensor:
        return moments[:4]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_losses_of_rows_are_those_of_their_clips(objective: str, masked: bool) -> None:
    """And what is drawn for a clip does not depend on its row; with frames that are given, too."""
    model_cfg = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=16, model_max_length=7)
    data = DataConfig(packing_tokens=36, buckets=(BucketConfig(1, "48x32"),))
    masks = FrameMasksConfig(random=1.0 if masked else 0.0)
    cfg = Config(data=data, model=model_cfg, frame_masks=masks, train=TrainConfig(batch_size=5))
    objective_, cpu = build_objective(DiffusionConfig(objective=objective)), torch.device("cpu")
    vae: Any = NoPosterior()
    builder = BatchBuilder(cfg, vae, objective_, cpu)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        moments, text = torch.randn(8, *shape, generator=generator), torch.randn(7, 16, generator=generator)
        samples.append((number, Encoded(name, moments, text, torch.arange(7) <= number, torch.tensor(8.0))))
    rows = builder.rows(samples)
    assert [sorted(row.ids) for row in rows] == [["a", "d"], ["b", "c", "e"]]
    assert [row.num_tokens for row in rows] == [36, 36]
    torch.manual_seed(0)
    model = random_weights(PackedSTDiT(model_cfg))
    runner = ModelRunner(model, "fp32", cpu)
    given = [part.frame_mask is not None for row in rows for part in row.parts]
    assert any(given) == masked and not all(given)  # of pictures none
    for row in rows:
        for name, loss in zip(row.ids, packed_losses(runner, objective_, row), strict=True):
            alone = builder.build([sample for sample in samples if sample[1].id == name])
            call = runner.conditioned(alone.text, alone.mask, alone.drop_text, frame_mask=alone.frame_mask)
            drawn = alone.latents, alone.noise, alone.timesteps
            expected = objective_.losses(call, *drawn, frame_mask=alone.frame_mask)[0]
            torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    empty = builder.stand_in((4, 64, 64), 5)
    assert (empty.latents.shape, empty.weight) == ((1, 4, 1, 4, 6), 0.0)
