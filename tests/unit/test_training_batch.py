"""A micro-batch's randomness: the sample's own, whatever its neighbours, its place and the process that draws it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opensora_repro.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    FrameMasksConfig,
    RunConfig,
    TrainConfig,
    VaeConfig,
)
from opensora_repro.diffusion.flow import OPEN_SORA_1_2
from opensora_repro.diffusion.frame_masks import FrameMasks
from opensora_repro.diffusion.gaussian import build_objective
from opensora_repro.frozen.autoencoder import FrameVAE
from opensora_repro.frozen.encoder import Encoded
from opensora_repro.frozen.vae import open_vae
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.training.batches import Batch, BatchBuilder
from tests.tiny_models import TINY_LATENT_CHANNELS, make_tiny_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> FrameVAE:
    folder = make_tiny_vae(tmp_path_factory.mktemp("vae"))
    return open_vae(VaeConfig(path=str(folder)), "cpu", torch.float32)


def builder(vae: FrameVAE, seed: int = 7, drop: float = 0.3, objective: str = "flow") -> BatchBuilder:
    stride = vae.spatial_stride
    cfg = Config(
        run=RunConfig(seed=seed),
        data=DataConfig(num_frames=3, height=5 * stride, width=4 * stride),
        model=STDiTConfig(model_max_length=6, caption_channels=12, class_dropout_prob=drop),
        train=TrainConfig(batch_size=2),
    )
    return BatchBuilder(cfg, vae, build_objective(DiffusionConfig(objective=objective)), torch.device("cpu"))


def sample(name: str) -> Encoded:
    generator = torch.Generator().manual_seed(len(name) + ord(name[-1]))
    moments = torch.randn(2 * TINY_LATENT_CHANNELS, 3, 5, 4, generator=generator)
    text = torch.randn(6, 12, generator=generator)
    return Encoded(name, moments, text, torch.arange(6) < 4, torch.tensor(float(ord(name[-1]))))


def row(batch: Batch, index: int) -> list[torch.Tensor]:
    names = ("latents", "noise", "timesteps", "text", "mask", "drop_text", "fps")
    return [getattr(batch, name)[index] for name in names]


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_neighbours_and_places_change_nothing(vae: FrameVAE, objective: str) -> None:
    build = builder(vae, objective=objective).build
    together = build([(0, sample("a")), (3, sample("b")), (0, sample("c"))])
    alone = build([(3, sample("b"))])
    assert together.ids == ["a", "b", "c"] and together.fps.tolist() == [97, 98, 99]
    assert all(torch.equal(x, y) for x, y in zip(row(together, 1), row(alone, 0), strict=True))
    assert together.num_tokens == 3 * (3 * 3 * 2)


def test_seed_epoch_and_sample_each_change_the_draws(vae: FrameVAE) -> None:
    first = builder(vae).build([(0, sample("a"))])
    others = [
        builder(vae, seed=8).build([(0, sample("a"))]),
        builder(vae).build([(1, sample("a"))]),
        builder(vae).build([(0, replace(sample("a"), id="b"))]),
    ]
    for other in others:
        for name in ("latents", "noise", "timesteps"):
            assert not torch.equal(getattr(first, name), getattr(other, name))
    # Posterior sample and noise are two streams, not one drawn twice.
    spread = (first.latents / vae.scale - sample("a").moments[:TINY_LATENT_CHANNELS]).flatten()
    assert abs(torch.corrcoef(torch.stack([spread, first.noise.flatten()]))[0, 1]) < 0.3


def test_captions_are_dropped_as_often_as_asked(vae: FrameVAE) -> None:
    def share(drop: float) -> float:
        build = builder(vae, drop=drop).build
        return sum(float(build([(epoch, sample("a"))]).drop_text.float().mean()) for epoch in range(400)) / 400

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert 0.22 < share(0.3) < 0.38


def test_global_random_state_is_left_alone(vae: FrameVAE) -> None:
    before = torch.get_rng_state()
    builder(vae).build([(0, sample("a"))])
    assert torch.equal(before, torch.get_rng_state())


def test_stand_in_has_the_shape_and_no_weight(vae: FrameVAE) -> None:
    build = builder(vae)
    real, empty = build.build([(0, sample("a")), (0, sample("b"))]), build.stand_in()
    assert [x.shape for x in real.tensors()] == [x.shape for x in empty.tensors()]
    assert [x.shape for x in row(real, 0)] == [x.shape for x in row(empty, 0)]
    assert (empty.weight, empty.num_tokens, empty.ids) == (0.0, 0, [])
    assert build.stand_in((3, 16, 30), 5).latents.shape[2:] == (3, 2, 3)


def test_frame_masks_are_the_samples_own_and_change_no_other_draw(vae: FrameVAE) -> None:
    plain, masked = builder(vae), builder(vae)
    masked.frame_masks = FrameMasks(FrameMasksConfig(random=0.5, image_head=0.5))
    samples = [(epoch, sample(name)) for epoch in range(4) for name in "abc"]
    without, batch = plain.build(samples), masked.build(samples)
    assert without.frame_mask is None and batch.frame_mask is not None
    assert batch.frame_mask.shape == (12, 3) and batch.frame_mask.dtype == torch.bool
    assert len({tuple(mask.tolist()) for mask in batch.frame_mask}) > 2
    for index in (0, 7):
        assert all(torch.equal(x, y) for x, y in zip(row(without, index), row(batch, index), strict=True))
        alone = masked.build([samples[index]])
        assert alone.frame_mask is not None and torch.equal(alone.frame_mask[0], batch.frame_mask[index])
    assert any(tensor is batch.frame_mask for tensor in batch.tensors())
    masked.frame_masks.noise = 0.25
    noisy = masked.build(samples)
    assert torch.equal(noisy.frame_mask, batch.frame_mask) and torch.equal(noisy.noise, batch.noise)
    there = batch.frame_mask[:, None, :, None, None].expand_as(batch.latents)
    assert torch.equal(noisy.latents[there], batch.latents[there])
    change = noisy.latents - batch.latents
    levels = change.pow(2).mean(dim=(1, 3, 4)).sqrt()[~batch.frame_mask] / (1 + batch.latents.var()).sqrt()
    assert 0 < levels.min() < 0.1 < levels.max() < 0.3  # each sample has its own
    assert torch.equal(masked.build([samples[7]]).latents[0], noisy.latents[7])


def test_the_size_in_pixels_is_the_buckets(vae: FrameVAE) -> None:
    """Also where it is no multiple of the autoencoder's stride; of another shape it follows from the latents."""
    stride = vae.spatial_stride
    cfg = Config(data=DataConfig(num_frames=3, height=5 * stride + 2, width=4 * stride + 7))
    objective = build_objective(DiffusionConfig(objective="flow", schedule=OPEN_SORA_1_2))
    build = BatchBuilder(cfg, vae, objective, torch.device("cpu"))
    drawn = build.build([(0, sample("a"))])
    assert drawn.size == build.stand_in().size == (3, 5 * stride + 2, 4 * stride + 7)
    cut = replace(sample("a"), moments=sample("a").moments[:, :2])
    assert build.build([(0, cut)]).size == (2, 5 * stride, 4 * stride)
    assert build.build([(0, sample("a"))], (3, 5 * stride + 4, 4 * stride)).size == (3, 5 * stride + 4, 4 * stride)
    bent = BatchBuilder(cfg, vae, build_objective(DiffusionConfig(objective="flow")), torch.device("cpu"))
    assert not torch.equal(bent.build([(0, sample("a"))]).timesteps, drawn.timesteps)  # another shift


def test_models_are_told_what_their_configs_name(vae: FrameVAE) -> None:
    size, fps = (48, 240, 426), torch.tensor([8.0, 0.0])
    assert conditions_of(STDiTConfig(), size, fps, frame_interval=3) == {}
    told = conditions_of(STDiT3Config(), size, fps, frame_interval=3)
    assert {name: value.tolist() for name, value in told.items()} == {
        "fps": [8.0, 120.0],
        "height": [240.0, 240.0],
        "width": [426.0, 426.0],
    }
    told = conditions_of(STDiT2Config(), size, fps, frame_interval=3)
    assert list(told) == ["fps", "height", "width", "num_frames", "ar"]
    assert told["fps"].tolist() == [24.0, 120.0]  # of the source, of which every third frame was taken
    assert told["num_frames"].tolist() == [48.0, 48.0]
    assert told["ar"].tolist() == pytest.approx([426 / 240] * 2)

    build = builder(vae)
    build.model_cfg = STDiT3Config()  # type: ignore[assignment]
    drawn, empty = build.build([(0, sample("a")), (0, sample("b"))]), build.stand_in()
    assert drawn.conditions["fps"].tolist() == [97.0, 98.0]
    assert empty.conditions.keys() == drawn.conditions.keys() == {"fps", "height", "width"}
    assert [x.shape for x in drawn.tensors()] == [x.shape for x in empty.tensors()]
