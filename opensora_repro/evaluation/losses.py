"""Held-out loss by noise level; what captions and the order of frames are worth to a model.

The caption gap is the loss with another clip's caption less the loss with the clip's own, the motion gap that of frames
out of order less that of frames in order. Noise is keyed by the clip, and the same on both sides; a gap near 0 means
that the model does without: it ignores text, or motion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opensora_repro.config import Config
from opensora_repro.data.dataset import BadSample, Clip
from opensora_repro.data.sample_frames import interval_of
from opensora_repro.data.sampler import keyed_generator, keyed_seed
from opensora_repro.diffusion.gaussian import Objective
from opensora_repro.evaluation.distances import Estimate, mean_of
from opensora_repro.frozen.encoder import Encoded, Encoder
from opensora_repro.models.captioned import conditions_of
from opensora_repro.parallel.engine import TorchEngine
from opensora_repro.training.step import ModelRunner

SIDES = ("right", "other caption", "frames out of order")
Text = tuple[Tensor, Tensor]  # of a caption: embedding [L, Ct] and mask [L]


@dataclass(frozen=True)
class HeldClip:
    """A held-out clip as the model takes it."""

    encoded: Encoded
    shuffled: Tensor | None  # moments of the clip with its frames out of order; None of a picture
    order: Tensor  # [T] of its frames


def shuffled_order(name: str, num_frames: int) -> Tensor:
    """A keyed order of frames that is not the right one, nor that backwards where there are more than two."""
    for attempt in range(100):
        order = torch.randperm(num_frames, generator=keyed_generator(0, attempt, name, "frame order"))
        steps = order.diff()
        if num_frames < 2 or not (steps.eq(1).all() or (num_frames > 2 and steps.eq(-1).all())):
            return order
    raise AssertionError("no other order found")


def encode_held(encoder: Encoder, clips: Sequence[Clip]) -> Iterator[HeldClip]:
    """Each clip twice, as it is and with its frames out of order. Whoever is done calls `encoder.join`."""
    for clip in clips:
        order = shuffled_order(clip.id, len(clip.pixels))
        both = [clip] if len(clip.pixels) == 1 else [clip, replace(clip, pixels=clip.pixels[order])]
        found = [sample.cpu() for sample in encoder.encoded(both) if not isinstance(sample, BadSample)]
        yield HeldClip(found[0], found[1].moments if len(found) > 1 else None, order)


def other_clip(index: int, captions: Sequence[str], ids: Sequence[str]) -> int | None:
    """A keyed choice of a clip with another caption; None where all have the same."""
    others = [i for i, caption in enumerate(captions) if caption != captions[index]]
    return others[keyed_seed(0, "other caption", ids[index]) % len(others)] if others else None


class HeldOutLosses:
    """This process's share of the held-out clips, encoded once, in host memory."""

    def __init__(
        self, cfg: Config, encoder: Encoder, objective: Objective, engine: TorchEngine, clips: Sequence[Clip],
        timesteps: Sequence[float],
    ) -> None:  # fmt: skip
        """`clips`: this process's share. `timesteps`: noise levels, as shares of the range. Collective."""
        self.cfg, self.encoder, self.objective, self.engine, self.levels = cfg, encoder, objective, engine, timesteps
        self.samples = list(encode_held(encoder, clips))
        encoder.join()
        captions = [clip.caption for clip in clips]
        texts = [(s.encoded.id, c, s.encoded.text, s.encoded.mask) for s, c in zip(self.samples, captions, strict=True)]
        parts = engine.world.gather(texts)[:: engine.mesh.model_size]
        everyone = sorted((text for part in parts for text in part), key=lambda text: text[0])
        names, all_captions = [text[0] for text in everyone], [text[1] for text in everyone]
        self.ids = names
        self.others: dict[str, Text] = {}
        for sample in self.samples:
            other = other_clip(names.index(sample.encoded.id), all_captions, names)
            if other is not None:
                self.others[sample.encoded.id] = everyone[other][2:]

    def measure(self, model: ModelRunner) -> dict[str, Estimate]:
        """Metrics by name, over the clips of all processes. Collective."""
        own = {sample.encoded.id: found for sample, found in zip(self.samples, self._losses(model), strict=True)}
        parts = self.engine.world.gather(own)
        everyone = {name: losses for part in parts for name, losses in part.items()}
        return summary(torch.stack([everyone[name] for name in self.ids]), self.levels)

    @torch.no_grad()
    def _losses(self, model: ModelRunner) -> Iterator[Tensor]:
        """Float64 [sides, levels] of each clip; NaN for a side that it does not have."""
        size = self.cfg.train.batch_size
        for first in range(0, len(self.samples), size):
            yield from self._of_batch(model, self.samples[first : first + size])

    def _of_batch(self, model: ModelRunner, samples: Sequence[HeldClip]) -> Tensor:
        found = torch.full((len(samples), len(SIDES), len(self.levels)), torch.nan, dtype=torch.float64)
        clips = [sample.encoded for sample in samples]
        own = [(clip.text, clip.mask) for clip in clips]
        noise = [self._noise(clip) for clip in clips]
        sides: list[tuple[Sequence[Tensor], Sequence[Text], Sequence[Tensor]]] = [
            ([clip.moments for clip in clips], own, noise)
        ]
        if all(clip.id in self.others for clip in clips):
            sides.append((sides[0][0], [self.others[clip.id] for clip in clips], noise))
        moved = [s.shuffled for s in samples if s.shuffled is not None]
        for number, side in enumerate(sides):
            found[:, number] = self._of_side(model, clips, *side)
        if len(moved) == len(samples):
            # Frame by frame the noise goes with its frame: to a model that looks at each alone nothing has changed.
            together = [n[:, s.order] if n.shape[1] == len(s.order) else n for n, s in zip(noise, samples, strict=True)]
            found[:, 2] = self._of_side(model, clips, moved, own, together)
        return found

    def _noise(self, clip: Encoded) -> Tensor:
        channels, *size = clip.moments.shape
        return torch.randn(channels // 2, *size, generator=keyed_generator(0, 0, clip.id, "validation noise"))

    def _of_side(
        self, model: ModelRunner, clips: Sequence[Encoded], moments: Sequence[Tensor], texts: Sequence[Text],
        noise: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        device = self.engine.device
        latents = torch.stack([self.encoder.vae.sample_latents(of, None) for of in moments]).to(device)
        text, mask = torch.stack([text for text, _ in texts]).to(latents), torch.stack([mask for _, mask in texts])
        fps, data = torch.stack([clip.fps for clip in clips]).to(latents), self.cfg.data
        size = (data.num_frames, data.height, data.width)
        told = conditions_of(self.cfg.model, size, fps, frame_interval=interval_of(data))
        forward = model.conditioned(text, mask, **told)
        levels = []
        for timestep in self.objective.fixed_timesteps(self.levels):
            timesteps = torch.full((len(clips),), timestep, device=device)
            levels.append(self.objective.losses(forward, latents, torch.stack(list(noise)).to(latents), timesteps))
        return torch.stack(levels, dim=1).double().cpu()


def summary(losses: Tensor, levels: Sequence[float]) -> dict[str, Estimate]:
    """Metrics of losses [N, sides, levels]."""
    right, other, moved = losses.unbind(dim=1)
    found = {"loss": mean_of(right.mean(dim=1))}
    found |= {f"loss@{level:g}": mean_of(right[:, number]) for number, level in enumerate(levels)}
    for name, side in (("caption_gap", other), ("motion_gap", moved)):
        gap = (side - right).mean(dim=1)
        if gap.isfinite().any():
            found[name] = mean_of(gap[gap.isfinite()])
    return found
