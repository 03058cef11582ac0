"""Clips, decoded, to micro-batches of pixels with the random numbers of each sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from opensora_repro.config import AutoencoderConfig
from opensora_repro.data.buckets import buckets_of
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader, to_tensor
from opensora_repro.data.sampler import SampleBatch, Shape, SharedBatches, keyed_generator
from opensora_repro.errors import TrainingError
from opensora_repro.kernels.ops import to_device
from opensora_repro.training.autoencoder.losses import Drawn
from opensora_repro.training.autoencoder.model import Trained
from opensora_repro.training.batches import HELD_BYTES, Fetched, PreparedBatch


@dataclass(frozen=True)
class VideoBatch:
    """What the autoencoder and its losses take."""

    ids: list[str]
    video: Tensor  # [B, 3, T, H, W] float32 in [-1, 1]
    drawn: Drawn
    weight: float  # 1, or 0 for the stand-in of a micro-batch without a readable sample
    num_tokens: int  # latents of all samples together, a token for each place

    def tensors(self) -> tuple[Tensor, ...]:
        return self.video, self.drawn.posterior, self.drawn.extra, self.drawn.level


class VideoBuilder:
    """Draws posterior and noise, keyed by (seed, epoch, sample id); cuts clips to images and random lengths."""

    def __init__(self, cfg: AutoencoderConfig, autoencoder: Trained, device: torch.device) -> None:
        self.seed, self.mixture, self.noisy = cfg.run.seed, cfg.mixture, cfg.loss.latent_noise > 0
        self.autoencoder, self.device, self.smallest = autoencoder, device, buckets_of(cfg.shared)[-1]

    def build(self, samples: Sequence[tuple[int, Clip]]) -> VideoBatch:
        """A micro-batch of (epoch, clip) pairs of one shape; at least one."""
        frames = self.num_frames(*samples[0])
        pixels = [to_device(clip.pixels[:frames], self.device) for _, clip in samples]
        video = torch.stack([to_tensor(clip) for clip in pixels])  # [B, 3, T, H, W]
        shape = self.autoencoder.latent_shape(*video.shape[2:])

        def normal(stream: str) -> Tensor:
            keys = ((self.seed, epoch, clip.id, stream) for epoch, clip in samples)
            return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])

        generators = [keyed_generator(self.seed, epoch, clip.id, "noise level") for epoch, clip in samples]
        levels = [torch.rand((), generator=generator) for generator in generators]
        posterior = normal("posterior")
        drawn = (posterior, normal("latent noise") if self.noisy else posterior, torch.stack(levels))
        return VideoBatch(
            ids=[clip.id for _, clip in samples],
            video=video,
            drawn=Drawn(*(to_device(value, self.device) for value in drawn)),
            weight=1.0,
            num_tokens=len(samples) * math.prod(shape[1:]),
        )

    def num_frames(self, epoch: int, first: Clip) -> int:
        """Frames that a micro-batch is cut to, by its first sample."""
        whole = len(first.pixels)
        share, length = torch.rand(2, generator=keyed_generator(self.seed, epoch, first.id, "length")).tolist()
        if share < self.mixture.image_share:
            return 1
        return 1 + int(length * whole) if self.mixture.random_length else whole

    def stand_in(self, shape: Shape | None = None, size: int = 0) -> VideoBatch:
        """Zeros with weight 0: a rank without a readable sample still joins the others' exchange."""
        shape, size = shape or self.smallest.shape, size or self.smallest.batch_size
        latents = torch.zeros(size, *self.autoencoder.latent_shape(*shape), device=self.device)
        video = torch.zeros(size, 3, *shape, device=self.device)
        level = torch.zeros(size, device=self.device)
        return VideoBatch([], video, Drawn(latents, latents, level), weight=0.0, num_tokens=0)


class VideoCollator:
    """Sets bad samples aside and builds a batch of the others."""

    def __init__(self, builder: VideoBuilder) -> None:
        self.builder = builder

    def collate(self, samples: Fetched | None) -> PreparedBatch:
        """`samples` None: this process cannot read on."""
        if samples is None:
            return PreparedBatch(cast(Any, [self.builder.stand_in()]), [], 0, lost=True)
        bad = [sample for _, sample in samples if isinstance(sample, BadSample)]
        good = [(epoch, sample) for epoch, sample in samples if isinstance(sample, Clip)]
        batch = self.builder.build(good) if good else self.builder.stand_in(samples.shape, len(samples))
        return PreparedBatch(cast(Any, [batch]), bad, len(bad))


class HeldFeed:
    """As ClipFeed, where `data.draws` are few: what was decoded once stays in memory, as bytes of pixels."""

    def __init__(self, dataset: ClipDataset, sampler: SharedBatches, num_workers: int, *, pinned: bool) -> None:
        self.dataset, self.sampler, self.num_workers, self.pinned = dataset, sampler, num_workers, pinned
        self._held: dict[tuple[int, int], Clip | BadSample] = {}

    @staticmethod
    def fits(dataset: ClipDataset, shapes: Sequence[Shape]) -> bool:
        """Whether all draws of all clips are few enough."""
        largest = 3 * max(map(math.prod, shapes))
        return 0 < dataset.cfg.draws * len(dataset) * largest <= HELD_BYTES

    def batches(self, first: int, count: int) -> Iterator[Fetched]:
        """Micro-batches first .. first + count - 1 of this rank, in order. Raises TrainingError."""
        fresh = _Fresh(self.sampler, self.dataset)
        loader = build_loader(self.dataset, fresh, first, count, self.num_workers, pinned=self.pinned)
        try:
            for number, clips in enumerate(loader, start=first):
                self._held |= zip(fresh.keys(fresh.batch(number)), clips, strict=True)
                whole = self.sampler.batch(number)
                found = [self._held[key] for key in fresh.keys(whole)]
                yield Fetched(((epoch, clip) for (epoch, _), clip in zip(whole, found, strict=True)), whole.shape)
        except LoaderDied as error:
            raise TrainingError(str(error)) from error


class _Fresh:
    """Of each micro-batch what none before it had: for the loader, which asks for them in order, some again."""

    def __init__(self, sampler: SharedBatches, dataset: ClipDataset) -> None:
        self._sampler, self._dataset = sampler, dataset
        self._asked: set[tuple[int, int]] = set()
        self._batches: dict[int, SampleBatch] = {}

    def keys(self, batch: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Row and draw of each."""
        return [(index, self._dataset.draw(epoch)) for epoch, index in batch]

    def batch(self, step: int) -> SampleBatch:
        if step not in self._batches:
            whole = self._sampler.batch(step)
            pairs = dict(zip(self.keys(whole), whole, strict=True))
            new = {key: pair for key, pair in pairs.items() if key not in self._asked}
            self._asked |= new.keys()
            self._batches[step] = SampleBatch(new.values(), whole.shape)
        return self._batches[step]
