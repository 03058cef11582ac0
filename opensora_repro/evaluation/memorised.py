"""Memorisation: whether samples lie nearer to training clips than clips that were never trained on do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Nearest:
    """Of each of N clips: the number of the nearest training clip, and how far away it is."""

    numbers: list[int]
    distances: list[float]  # of features
    pixels: list[float]  # root mean square of the difference, 0 to 1


def nearest(features: Tensor, training: Tensor) -> tuple[list[int], list[float]]:
    """Numbers and distances of the nearest of `training` [M, D] to each of `features` [N, D].

    Channels count alike: each is measured in its standard deviation over the training clips.
    """
    scale = scale_of(training)
    apart = torch.cdist(features.double() / scale, training.double() / scale)
    found = apart.min(dim=1)
    return found.indices.tolist(), found.values.tolist()


def scale_of(training: Tensor) -> Tensor:
    """What each channel [D] is measured in: its standard deviation over the training clips [M, D]."""
    return training.double().std(dim=0).clamp(min=1e-6)


def rms(first: np.ndarray, second: np.ndarray) -> float:
    """Root mean square difference of two uint8 videos of one size, 0 to 1."""
    return float(np.sqrt(np.square(first.astype(np.float32) - second.astype(np.float32)).mean()) / 255)


def memorised(samples: Nearest, held_out: Nearest) -> list[bool]:
    """Whether each sample is nearer to a training clip than any held-out clip is, by features and by pixels.

    All as the autoencoder gives them back: what it loses would set even an exact copy apart from its clip, and in some
    worlds by more than two takes of one scene are.
    A sample as good as a held-out clip is nearer by one of the two by chance, one in as many as there are held-out
    clips; by both, hardly ever.
    """
    features, pixels = min(held_out.distances), min(held_out.pixels)
    return [d < features and p < pixels for d, p in zip(samples.distances, samples.pixels, strict=True)]


def side_by_side(pairs: list[tuple[np.ndarray, np.ndarray]], frames: int = 4) -> np.ndarray:
    """One picture: a row a pair, frames of the sample, then of the training clip. Videos uint8 [T, H, W, 3]."""
    from opensora_repro.evaluation.features import evenly

    rows = []
    for sample, clip in pairs:
        strips = [np.concatenate(list(evenly(video, min(frames, len(video)))), axis=1) for video in (sample, clip)]
        gap = np.full((strips[0].shape[0], 6, 3), 255, dtype=np.uint8)
        rows.append(np.concatenate([strips[0], gap, strips[1]], axis=1))
        rows.append(np.full((2, rows[0].shape[1], 3), 255, dtype=np.uint8))
    picture: np.ndarray = np.concatenate(rows[:-1])
    return picture


def as_lines(samples: Nearest, flags: list[bool], prompts: list[str], ids: list[str]) -> list[dict[str, Any]]:
    """What is written of each sample, the nearest first."""
    lines = [
        {"sample": i, "prompt": prompts[i], "training_clip": ids[n], "distance": d, "pixels": p, "memorised": flag}
        for i, (n, d, p, flag) in enumerate(zip(samples.numbers, samples.distances, samples.pixels, flags, strict=True))
    ]
    return sorted(lines, key=lambda line: (not line["memorised"], line["distance"]))
