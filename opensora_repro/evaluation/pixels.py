"""What pixels alone say of a video: flicker, motion, sharpness, and whether it shows anything at all."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass

import numpy as np

from opensora_repro.data import clip_frames
from opensora_repro.data.score import pixels

ONE_COLOUR = 2.0  # grey levels: a frame whose standard deviation is below shows one colour
FRAMES_ALIKE = 0.3  # correlation of one frame with the next, below which a video looks like noise: cuts are rare
PIXELS_ALIKE = 0.5  # correlation of neighbouring pixels, likewise; pictures have 0.8 and more


@dataclass(frozen=True)
class Looks:
    """Of one video; None: a single frame has none."""

    flicker: float | None
    motion: float | None
    sharpness: float
    static: float | None  # 1 or 0, so that means are shares
    blank: float
    noise: float

    def numbers(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def look_at(video: np.ndarray) -> Looks:
    """Measure uint8 frames [T, H, W, 3]."""
    grey = clip_frames.grey(video)
    blank = is_blank(grey)
    several = len(video) > 1
    return Looks(
        flicker=flicker(video) if len(video) > 2 else None,
        motion=pixels.motion([pixels.flow_fields(grey)], fps=1.0) if several else None,
        sharpness=pixels.sharpness(grey),
        static=float(pixels.repeats(grey).all()) if several else None,
        blank=float(blank),
        noise=float(not blank and is_noise(grey)),
    )


def flicker(video: np.ndarray) -> float:
    """Mean distance of a frame's mean colour from halfway between its neighbours', 0 to 1, of uint8 [T, H, W, 3].

    Fades and things that move within the picture do not count, a light that goes on and off at every frame is 1.
    """
    colour = video.mean(axis=(1, 2)) / 255  # [T, 3]
    return float(np.abs(colour[1:-1] - (colour[:-2] + colour[2:]) / 2).mean())


def is_blank(grey: np.ndarray) -> bool:
    """Whether every frame [T, H, W] is black or of one colour."""
    return pixels.black_share(grey) == 1 or float(grey.std(axis=(1, 2)).max()) < ONE_COLOUR


def is_noise(grey: np.ndarray) -> bool:
    """Whether frames [T, H, W] have nothing to do with one another, or pixels nothing with their neighbours.

    An image autoencoder makes blots of noise, smooth within a frame, of which the next frame knows nothing.
    """
    values = grey.astype(np.float64)
    pairs = [(values[:, :, :-1], values[:, :, 1:]), (values[:, :-1], values[:, 1:])]
    if np.mean([_correlation(*pair) for pair in pairs]) < PIXELS_ALIKE:
        return True
    steps = [_correlation(first, second) for first, second in itertools.pairwise(values)]
    return bool(steps) and float(np.mean(steps)) < FRAMES_ALIKE


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's; 1 where one of them has no spread."""
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm > 0 else 1.0
