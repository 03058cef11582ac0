"""Validation loss: held-out samples, fixed timesteps, noise keyed by the sample, so that only the weights change it.

Every frame is generated, whatever `[frame_masks]` gives in training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.buckets import Bucket, buckets_of, largest
from opensora_repro.data.dataset import BadSample, ClipDataset
from opensora_repro.data.sample_frames import interval_of
from opensora_repro.data.sampler import keyed_generator, keyed_seed
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.errors import DataError, TrainingError
from opensora_repro.frozen.encoder import Encoded, Encoder
from opensora_repro.models.captioned import CaptionedModel, conditions_of
from opensora_repro.models.layers import count_tokens
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.training.fill import load_listed
from opensora_repro.training.metrics import Quarantine
from opensora_repro.training.step import ModelRunner


@contextlib.contextmanager
def largest_activation(model: CaptionedModel) -> Iterator[list[Tensor]]:
    """Of what the last block hands on within this block of code: a float32 scalar on the device, none of no call."""
    found: list[Tensor] = []

    def look(_: Any, inputs: tuple[Tensor, ...]) -> None:
        largest = inputs[0].detach().abs().amax().float()
        found[:] = [torch.maximum(found[0], largest) if found else largest]

    hook = model.final_layer.register_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


Chosen = tuple[int, Bucket]  # a row, and the largest bucket that takes it


def chosen_rows(ids: Sequence[str], max_samples: int) -> list[int]:
    """Indexes of at most `max_samples`, the same in every run: a keyed choice, so that order in the file is no bias."""
    order = sorted(range(len(ids)), key=lambda index: keyed_seed(0, "validation", ids[index]))
    return sorted(order[:max_samples])


def chosen_samples(table: Any, cfg: Config) -> list[Chosen]:
    """Those of a held-out manifest's chosen rows that a bucket takes."""
    rows, buckets = chosen_rows(table["id"].to_pylist(), cfg.validation.max_samples), buckets_of(cfg)
    return [(row, buckets[of]) for row, of in zip(rows, largest(table.take(rows), cfg), strict=True) if of >= 0]


class Validator:
    """Keeps this data rank's share of the held-out samples, encoded once, in host memory."""

    def __init__(
        self,
        cfg: Config,
        dataset: ClipDataset,
        chosen: Sequence[Chosen],
        encoder: Encoder,
        objective: Objective,
        engine: TorchEngine,
        quarantine: Quarantine,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """`chosen`: of `dataset`. What cannot be read of them goes to `quarantine`, which counts these alone.

        Collective. Once `stopped()`, no more are read: nothing will be validated. Raises DataError, in all processes
        alike, where too many cannot be read, TrainingError where a process cannot go on.
        """
        self.cfg, self.encoder, self.objective, self.engine = cfg, encoder, objective, engine
        self.timesteps = objective.fixed_timesteps(cfg.validation.timesteps)
        self.samples: dict[Bucket, list[Encoded]] = {}
        bad: list[BadSample] = []
        error = None
        try:
            own = chosen[engine.mesh.data_rank :: engine.mesh.data_size]
            rows, shapes = [row for row, _ in own], [bucket.shape for _, bucket in own]
            samples = encoder.encoded(load_listed(dataset, rows, shapes, cfg.data.num_workers))
            for (_, bucket), sample in zip(own, samples, strict=True):
                if isinstance(sample, BadSample):
                    bad.append(sample)
                else:
                    self.samples.setdefault(bucket, []).append(sample.cpu())
                if stopped():
                    break
        except TrainingError as found:
            error = found
        encoder.join()
        engine.world.agree(error)
        everywhere = engine.world.gather(bad)
        for sample in (sample for samples in everywhere for sample in samples):
            quarantine.add(sample)
        engine.world.agree(quarantine.error)
        self.num_samples = len(chosen) - len(quarantine)
        quarantine.saw(range(len(chosen)))
        quarantine.check()
        if not self.num_samples:
            raise DataError(f"data.val_manifest: no held-out sample can be read; {quarantine.latest()}")

    def losses(self, model: ModelRunner, timesteps: Sequence[float] = ()) -> list[float]:
        """Mean loss at each fixed timestep (or at these of them) over all held-out samples of all ranks."""
        return np.mean(list(self.by_clip(model, timesteps).values()), axis=0).tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def by_clip(self, model: ModelRunner, timesteps: Sequence[float] = ()) -> dict[str, list[float]]:
        """The losses that `losses` has the means of, by id, in the ids' order. Collective."""
        chosen, own = timesteps or self.timesteps, dict[str, list[float]]()
        for bucket, samples in self._batches():
            latents = torch.stack([self.encoder.vae.sample_latents(sample.moments, None) for sample in samples])
            latents = latents.to(self.engine.device)
            generators = [keyed_generator(0, 0, sample.id, "validation noise") for sample in samples]
            noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
            text = torch.stack([sample.text for sample in samples]).to(latents)
            mask = torch.stack([sample.mask for sample in samples])
            fps = torch.stack([sample.fps for sample in samples]).to(latents)
            told = conditions_of(self.cfg.model, bucket.shape, fps, frame_interval=interval_of(self.cfg.data))
            found = []
            for timestep in chosen:
                levels = torch.full((len(samples),), timestep, device=latents.device)
                found.append(self.objective.losses(model.conditioned(text, mask, **told), latents, noise, levels))
            losses = torch.stack(found, dim=1).double().tolist()
            own |= {sample.id: of for sample, of in zip(samples, losses, strict=True)}
        parts = self.engine.world.gather(own)[:: self.engine.mesh.model_size]  # others have the same samples
        return dict(sorted(item for part in parts for item in part.items()))

    @property
    def middle(self) -> float:
        """One of the fixed timesteps, to stand for all."""
        return self.timesteps[len(self.timesteps) // 2]

    def _batches(self) -> Iterator[tuple[Bucket, list[Encoded]]]:
        for bucket, samples in self.samples.items():
            size, row = bucket.batch_size, self.cfg.data.packing_tokens
            if row:  # for so many tokens there is memory
                size = max(1, row // count_tokens(samples[0].moments.shape, self.cfg.model.patch_size))
            for first in range(0, len(samples), size):
                yield bucket, samples[first : first + size]
