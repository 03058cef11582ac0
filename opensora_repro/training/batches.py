"""From samples, decoded or cached, to micro-batches: encoded, collated, and prefetched while the model trains.

Every random number comes from the sample's own keyed generators.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.buckets import buckets_of
from opensora_repro.data.cache import CacheRows, LatentCache
from opensora_repro.data.dataset import BadSample, Clip, ClipDataset, LoaderDied, build_loader
from opensora_repro.data.packing import first_fit_decreasing
from opensora_repro.data.sample_frames import interval_of
from opensora_repro.data.sampler import Shape, SharedBatches, interleave, keyed_generator, keyed_seed
from opensora_repro.diffusion.flow import Size
from opensora_repro.diffusion.frame_masks import FrameMasks
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.errors import TrainingError
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.encoder import Encoded, Encoder
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.layers import count_frames, count_tokens
from opensora_repro.parallel.device import SideStream
from opensora_repro.parallel.engine import Collectives

Sample: TypeAlias = "tuple[int, Clip | Encoded | BadSample]"  # with the epoch it is drawn in

HELD_BYTES = 1 << 30  # cached samples kept in memory


class Fetched(list[Sample]):
    """What one process reads of a micro-batch; `shape` is that of its bucket's samples (None: of the run's one)."""

    def __init__(self, samples: Iterable[Sample], shape: Shape | None = None) -> None:
        super().__init__(samples)
        self.shape = shape


class Feed(Protocol):
    def batches(self, first: int, count: int) -> Iterator[Fetched]:
        """Micro-batches first .. first + count - 1 of this rank, in order. Raises TrainingError, OSError."""
        ...


class ClipFeed:
    """Decodes in loader processes while the model computes."""

    def __init__(self, dataset: ClipDataset, sampler: SharedBatches, num_workers: int, *, pinned: bool) -> None:
        """`pinned`: the clips will be encoded on a GPU."""
        self.dataset, self.sampler, self.num_workers, self.pinned = dataset, sampler, num_workers, pinned

    def batches(self, first: int, count: int) -> Iterator[Fetched]:
        loader = build_loader(self.dataset, self.sampler, first, count, self.num_workers, pinned=self.pinned)
        try:
            for number, clips in enumerate(loader, start=first):
                epochs = [epoch for epoch, _ in self.sampler.batch(number)]
                yield Fetched(zip(epochs, clips, strict=True), clips.shape)
        except LoaderDied as error:
            raise TrainingError(str(error)) from error


class CacheFeed:
    """Reads what was encoded before; the first `HELD_BYTES` met stay in memory.

    A sample that is not in the cache could not be read when it was filled. Of a cache in a store, what the next batch
    needs is fetched meanwhile.
    """

    def __init__(self, cache: LatentCache, sampler: SharedBatches, rows: CacheRows) -> None:
        self.cache, self.sampler, self.rows = cache, sampler, rows
        self._absent = set(cache.missing(rows.keys()))
        self._held: dict[tuple[str, int], Encoded] = {}
        self._held_bytes = 0

    def batches(self, first: int, count: int) -> Iterator[Fetched]:
        with ThreadPoolExecutor(1) as pool:
            for number in range(first, first + count):
                batch = self.sampler.batch(number)
                if self.cache.is_remote and number + 1 < first + count:
                    coming = [self.rows.key(i, epoch % self.rows.draws) for epoch, i in self.sampler.batch(number + 1)]
                    pool.submit(self.cache.prefetch, coming)
                own = ((epoch, self._get(index, epoch % self.rows.draws)) for epoch, index in batch)
                yield Fetched(own, batch.shape)

    def _get(self, index: int, draw: int) -> Encoded | BadSample:
        key = self.rows.key(index, draw)
        if key in self._held:
            return self._held[key]
        if key in self._absent:
            reason = "could not be read when the cache was filled"
            return BadSample(self.rows.id(index), self.rows.path(index), reason)
        encoded = Encoded(self.rows.id(index), **self.cache.get(key))
        size = encoded.moments.nbytes + encoded.text.nbytes + encoded.mask.nbytes
        if self._held_bytes + size <= HELD_BYTES:
            self._held[key] = encoded
            self._held_bytes += size
        return encoded


@dataclass(frozen=True)
class Batch:
    """What the model and the loss take."""

    ids: list[str]
    latents: Tensor  # [B, C, T, h, w]
    noise: Tensor  # [B, C, T, h, w]
    timesteps: Tensor  # [B] float32
    text: Tensor  # [B, L, Ct]
    mask: Tensor  # [B, L] bool, in host memory, from where the captions' lengths are read without a wait
    drop_text: Tensor  # [B] bool
    fps: Tensor  # [B] float32, frames a second; 0: a picture
    weight: float  # 1, or 0 for the stand-in of a micro-batch without a readable sample
    num_tokens: int  # of all samples together
    size: Size  # of each sample in pixels: frames, height, width
    frame_mask: Tensor | None = None  # [B, T] bool, True: generated, False: given; None: all are generated
    conditions: dict[str, Tensor] = field(default_factory=dict)  # what else the model is told, [B] each, by name
    dropout_seeds: list[int] = field(default_factory=list)  # of adapters, a sample's each; none: nothing is dropped

    def tensors(self) -> tuple[Tensor, ...]:
        given = () if self.frame_mask is None else (self.frame_mask,)
        own = (self.latents, self.noise, self.timesteps, self.text, self.mask, self.drop_text, self.fps)
        return *own, *given, *self.conditions.values()


@dataclass(frozen=True)
class PackedBatch:
    """Batches of one shape each that go through the model as one row of tokens."""

    parts: list[Batch]

    @property
    def ids(self) -> list[str]:
        return [name for part in self.parts for name in part.ids]

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def weight(self) -> float:
        return self.parts[0].weight

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors())


class BatchBuilder:
    """Draws posterior sample, noise, timestep, text dropout and frame mask, keyed by (seed, epoch, sample id)."""

    def __init__(self, cfg: Config, vae: Autoencoder, objective: Objective, device: torch.device) -> None:
        self.vae, self.objective, self.device = vae, objective, device
        self.seed, self.smallest, self.packing_tokens = cfg.run.seed, buckets_of(cfg)[-1], cfg.data.packing_tokens
        self.patch_size, self.drop_probability = cfg.model.patch_size, cfg.model.class_dropout_prob
        self.drops = cfg.lora.rank > 0 and cfg.lora.dropout > 0
        self.text_shape = (cfg.model.model_max_length, cfg.model.caption_channels)
        masks = FrameMasks(cfg.frame_masks, cfg.model.patch_size[0])
        self.frame_masks = masks if masks else None
        self.model_cfg, self.frame_interval = cfg.model, interval_of(cfg.data)
        self.sizes = {self._latent_size(bucket.shape): bucket.shape for bucket in reversed(buckets_of(cfg))}

    def rows(self, samples: Sequence[tuple[int, Encoded]]) -> list[PackedBatch]:
        """A micro-batch of (epoch, sample) pairs of any shapes, packed into rows of at most `data.packing_tokens`."""
        shapes = [sample.moments.shape for _, sample in samples]
        found = []
        for row in first_fit_decreasing([count_tokens(s, self.patch_size) for s in shapes], self.packing_tokens):
            alike = ([samples[i] for i in row if shapes[i] == shape] for shape in dict.fromkeys(shapes[i] for i in row))
            found.append(PackedBatch(list(map(self.build, alike))))
        return found

    def build(self, samples: Sequence[tuple[int, Encoded]], size: Size | None = None) -> Batch:
        """A micro-batch of (epoch, sample) pairs of one shape; at least one.

        `size`: of each in pixels; None: that of the bucket whose samples have so many latents.
        """

        def generators(stream: str) -> list[torch.Generator]:
            return [keyed_generator(self.seed, epoch, sample.id, stream) for epoch, sample in samples]

        latents = torch.stack(
            [
                self.vae.sample_latents(sample.moments, generator)
                for (_, sample), generator in zip(samples, generators("posterior"), strict=True)
            ]
        )
        num_tokens = count_tokens(latents.shape[1:], self.patch_size)
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators("noise")])
        frames = count_frames(latents.shape[1:], self.patch_size)
        size = size or self._size_of(latents.shape[2:])
        timesteps = self.objective.draw_timesteps(generators("timestep"), num_tokens, frames, size=size)
        frame_mask = None
        if self.frame_masks is not None:
            frame_mask = self.frame_masks.draw(latents.shape[2], generators("frame mask"))
            if frame_mask is not None and self.frame_masks.noise:
                latents = self.frame_masks.with_noise(latents, frame_mask, generators("frame noise"))
        fps = self._to_device(torch.stack([sample.fps for _, sample in samples]))
        chances = torch.cat([torch.rand(1, generator=g) for g in generators("text dropout")])
        return Batch(
            ids=[sample.id for _, sample in samples],
            latents=self._to_device(latents),
            noise=self._to_device(noise),
            timesteps=self._to_device(timesteps),
            text=self._to_device(torch.stack([sample.text for _, sample in samples])).float(),
            mask=torch.stack([sample.mask for _, sample in samples]),
            drop_text=self._to_device(chances < self.drop_probability),
            fps=fps,
            weight=1.0,
            num_tokens=num_tokens * len(samples),
            size=size,
            frame_mask=None if frame_mask is None else self._to_device(frame_mask),
            conditions=self._conditions(size, fps),
            dropout_seeds=self._dropout_seeds(samples) if self.drops else [],
        )

    def _dropout_seeds(self, samples: Sequence[tuple[int, Encoded]]) -> list[int]:
        return [keyed_seed(self.seed, epoch, sample.id, "adapter dropout") for epoch, sample in samples]

    def stand_in(self, shape: Shape | None = None, size: int = 0) -> Batch:
        """Zeros with weight 0: a rank without a readable sample still joins the others' exchange.

        As many samples as the batch should have had, for which memory is there and compiled blocks exist; None: any's.
        Of rows one sample, which fits into any.
        """
        shape, size = (None, 1) if self.packing_tokens else (shape, size)
        shape, size, device = shape or self.smallest.shape, size or self.smallest.batch_size, self.device
        zeros = torch.zeros(size, self.vae.latent_channels, *self._latent_size(shape), device=device)
        fps = torch.zeros(size, device=device)
        return Batch(
            ids=[],
            latents=zeros,
            noise=zeros,
            timesteps=torch.zeros(size, device=device),
            text=torch.zeros(size, *self.text_shape, device=device),
            mask=torch.ones(size, self.text_shape[0], dtype=torch.bool),
            drop_text=torch.zeros(size, dtype=torch.bool, device=device),
            fps=fps,
            weight=0.0,
            num_tokens=0,
            size=shape,
            conditions=self._conditions(shape, fps),
        )

    def _latent_size(self, size: Size) -> Size:
        """Latent frames, rows and columns of a sample of so many frames and pixels."""
        _, *found = self.vae.latent_shape(*size)
        frames, rows, columns = found
        return frames, rows, columns

    def _size_of(self, latent_size: Sequence[int]) -> Size:
        """The pixels of samples of so many latents, which a few buckets share: those of the first."""
        frames, rows, columns = latent_size
        stride = self.vae.spatial_stride
        return self.sizes.get((frames, rows, columns), (frames, rows * stride, columns * stride))

    def _conditions(self, size: Size, fps: Tensor) -> dict[str, Tensor]:
        return conditions_of(self.model_cfg, size, fps, frame_interval=self.frame_interval)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device)


@dataclass(frozen=True)
class PreparedBatch:
    """A micro-batch and what could not become part of it."""

    batches: Sequence[Batch | PackedBatch]  # one, or a row each
    bad_samples: list[BadSample]  # those that this process has read
    num_bad: int  # of all processes that work on this micro-batch
    lost: bool = False  # one of them could not read on


class Collator:
    """Encodes what is not yet encoded, sets bad samples aside, draws the random numbers."""

    def __init__(self, encoder: Encoder, builder: BatchBuilder, members: Collectives, *, spread: bool = False) -> None:
        """`members`: the processes that work on the same samples; each has read and encodes a share.

        `spread`: clips come, and the text encoder that they need is held by all processes together.
        """
        self.encoder, self.builder, self.members, self.spread = encoder, builder, members, spread

    def collate(self, samples: Fetched | None) -> PreparedBatch:
        """Collective among `members`, or all processes where the text encoder is `spread`.

        `samples` None: this process cannot read on.
        """
        if samples is None:
            self._join()
            self.members.gather(None)
            return self._lost()
        bad = [sample for _, sample in samples if isinstance(sample, BadSample)]
        encoded = [sample for _, sample in samples if not isinstance(sample, Clip)]
        if len(encoded) < len(samples):
            encoded = list(self.encoder.encoded((sample for _, sample in samples), len(samples)))
        self._join()
        own = [(epoch, self._good(sample)) for (epoch, _), sample in zip(samples, encoded, strict=True)]
        parts = self.members.gather(own)
        if None in parts:
            return self._lost()
        everyone = interleave(parts)
        good = [(epoch, encoded) for epoch, encoded in everyone if encoded is not None]
        batches: Sequence[Batch | PackedBatch]
        if not good:
            batches = [self.builder.stand_in(samples.shape, len(everyone))]
        elif self.builder.packing_tokens:
            batches = self.builder.rows(good)
        else:
            batches = [self.builder.build(good, samples.shape)]
        return PreparedBatch(batches, bad, len(everyone) - len(good))

    def _join(self) -> None:
        if self.spread:
            self.encoder.join()

    def _lost(self) -> PreparedBatch:
        return PreparedBatch([self.builder.stand_in()], [], 0, lost=True)

    def _good(self, sample: Encoded | BadSample) -> Encoded | None:
        if isinstance(sample, BadSample):
            return None
        return sample if self.members.size == 1 else sample.cpu()


class Collates(Protocol):
    def collate(self, samples: Fetched | None) -> PreparedBatch: ...


class Prefetcher:
    """A run's micro-batches in order. Whether they are prefetched changes when things are done, not what."""

    def __init__(self, samples: Iterator[Fetched], collator: Collates, device: torch.device, *, overlap: bool) -> None:
        """`overlap`: collate the next micro-batch on a stream of its own beside the training, not only fetch it."""
        self._samples, self._collator = samples, collator
        self._side = SideStream(device) if overlap else None
        self._fetched: Fetched | None = None
        self._over = False
        self._ready: PreparedBatch | None = None
        self.error: TrainingError | None = None  # why nothing more can be read
        self.seconds_waited = 0.0  # for samples to be read

    def prefetch(self) -> None:
        """Called once the device has work: fetch the next micro-batch, and collate it where that overlaps.

        Where it cannot be read, `error` says why, and all that follows is stand-ins, with which the others can end
        their step.
        """
        started = time.perf_counter()
        self._fetched = self._next()
        self.seconds_waited += time.perf_counter() - started
        if self._side is not None and not self._over:
            with self._side.entered():
                self._ready = self._collator.collate(self._fetched)

    def _next(self) -> Fetched | None:
        if self.error is not None:
            return None
        try:
            fetched = next(self._samples, None)
        except TrainingError as error:
            self.error = error
            return None
        except (OSError, SafetensorError) as error:
            broken = f"cannot read {error.filename}: {error.strerror}" if isinstance(error, OSError) else ""
            self.error = TrainingError(broken or f"a shard of the cache cannot be read: {error}")
            return None
        self._over = fetched is None
        return fetched

    def take(self) -> PreparedBatch:
        """The micro-batch that the last `prefetch` was for."""
        assert not self._over
        if self._side is None:
            return self._collator.collate(self._fetched)
        assert self._ready is not None
        ready, self._ready = self._ready, None
        self._side.hand_over([tensor for batch in ready.batches for tensor in batch.tensors()])
        return ready
