"""Memorisation: prompts that bring training clips back, whatever the noise.

A sample near a training clip is no copy yet: so is now and then a clip that was never trained on, where a world has
few scenes. Two things tell them apart. What a model has learned by heart comes at every noise, what lies there by
chance does so once; and it is that clip, not one between several (both are known from Carlini et al. 2023, who find
copies by samples of one prompt that are alike, and by the ratio of distances to the nearest clip and those after it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from opensora_repro.evaluation.features import evenly

THUMBNAIL = (4, 16, 16)  # frames, height, width
SAME = 0.005  # of values from 0 to 1: thumbnails of one clip, encoded twice, differ by less
NEAR = 0.1  # share of held-out clips that are as near to a training clip as a sample has to be
ALONE = 2 / 3  # as far as the second nearest, at most
SUSPECTS = 8  # captions with a near sample that are sampled again
AGAIN = 8  # so often, with other noise: all of these must be near, too


@dataclass(frozen=True)
class Nearest:
    """Of each of N clips: the number of the nearest training clip, how far away it is, and how far the one after it."""

    numbers: list[int]
    distances: list[float]  # of features, in their standard deviations
    pixels: list[float]  # root mean square of the difference, 0 to 1
    seconds: list[float]  # of the second nearest, in pixels; infinite where there is one training clip


def nearest(features: Tensor, training: Tensor) -> list[int]:
    """The number of the nearest of `training` [M, D] to each of `features` [N, D].

    Channels count alike: each is measured in its standard deviation over the training clips.
    """
    scale = scale_of(training)
    found: list[int] = torch.cdist(features.double() / scale, training.double() / scale).argmin(dim=1).tolist()
    return found


def thumbnail(video: np.ndarray) -> Tensor:
    """What nearest clips are looked up by besides features, which need not know places: float32 [D] of uint8 frames."""
    frames = torch.tensor(evenly(video, min(THUMBNAIL[0], len(video)))).permute(0, 3, 1, 2).float()
    return interpolate(frames, THUMBNAIL[1:], mode="area").flatten() / 255


def one_apart(looks: Tensor, training: Tensor, first: int) -> int | None:
    """The nearest of `training` [M, D] to a thumbnail [D] that is not the first one once more, as another file."""
    others = (training - training[first]).square().mean(dim=1).sqrt() > SAME
    far = (training - looks).square().mean(dim=1).masked_fill(~others, math.inf)
    return int(far.argmin()) if others.any() else None


def scale_of(training: Tensor) -> Tensor:
    """What each channel [D] is measured in: its standard deviation over the training clips [M, D]."""
    return training.double().std(dim=0, correction=0).clamp(min=1e-6)


def rms(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square difference of two uint8 videos of one size, 0 to 1."""
    return float(np.sqrt(np.square(first.astype(np.float32) - second.astype(np.float32)).mean()) / 255)


def limit_of(held: Nearest, clip: int) -> float:
    """The distance of pixels below which a sample of this held-out clip's caption is near.

    Nearer than nine of ten held-out clips are, and than the one that was filmed for that caption: some scenes are
    common. All as the autoencoder gives them back: what it loses would set even an exact copy apart from its clip.
    """
    return min(float(np.quantile(held.pixels, NEAR, method="lower")), held.pixels[clip])


def are_near(samples: Nearest, held: Nearest, clips: Sequence[int]) -> list[bool]:
    """Whether each sample is near a training clip, and that one alone; `clips`: the held-out ones of their captions.

    A model whose samples are as held-out clips are has one of ten near at most; and that AGAIN more of its caption are
    near, too, happens to one caption of AGAIN + 2 at most, however common its scene: else their own clip is as near.
    One that makes little of noise has all of a caption alike: a mean of clips, and nearly as far from the next one.
    """
    found = zip(samples.pixels, samples.seconds, clips, strict=True)
    return [pixels < min(limit_of(held, clip), ALONE * second) for pixels, second, clip in found]


def suspects(samples: Nearest, flags: Sequence[bool], clips: Sequence[int]) -> list[int]:
    """Of the `clips` whose captions samples have: those with near samples, the nearest first."""
    order = sorted((pixels, clip) for pixels, clip, flag in zip(samples.pixels, clips, flags, strict=True) if flag)
    return list(dict.fromkeys(clip for _, clip in order))[:SUSPECTS]


def side_by_side(pairs: list[tuple[np.ndarray, np.ndarray]], frames: int = 4) -> np.ndarray:
    """One picture: a row a pair, frames of the sample, then of the training clip. Videos uint8 [T, H, W, 3]."""
    rows = []
    for sample, clip in pairs:
        strips = [np.concatenate(list(evenly(video, min(frames, len(video)))), axis=1) for video in (sample, clip)]
        gap = np.full((strips[0].shape[0], 6, 3), 255, dtype=np.uint8)
        rows.append(np.concatenate([strips[0], gap, strips[1]], axis=1))
        rows.append(np.full((2, rows[0].shape[1], 3), 255, dtype=np.uint8))
    picture: np.ndarray = np.concatenate(rows[:-1])
    return picture


def as_lines(
    samples: Nearest, clips: Sequence[int], again: Mapping[int, int], flags: Sequence[bool], prompts: Sequence[str],
    ids: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """What is written of each sample, copies and then the nearest first.

    `again`: of the captions of some clips, how many of AGAIN more samples were near.
    """
    lines = [
        {"sample": i, "prompt": prompt, "training_clip": ids[samples.numbers[i]], "distance": samples.distances[i],
         "pixels": samples.pixels[i], "second": samples.seconds[i] if math.isfinite(samples.seconds[i]) else None,
         "near_again": again.get(clip), "memorised": flag}
        for i, (prompt, clip, flag) in enumerate(zip(prompts, clips, flags, strict=True))
    ]  # fmt: skip
    return sorted(lines, key=lambda line: (not line["memorised"], line["pixels"]))
