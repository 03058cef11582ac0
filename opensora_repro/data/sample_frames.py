"""Which frames of a clip are a sample's.

Random choices take a generator, keyed to the sample; without one the middle is taken.
"""

from __future__ import annotations

import torch


def frame_window(
    clip_frames: int, num_frames: int, interval: int, generator: torch.Generator | None = None
) -> list[int] | None:
    """Return `num_frames` ascending frame indices of a clip, or None if it has fewer frames than that.

    Every `interval`-th frame of a random window of (num_frames - 1) * interval + 1 frames (the middle one without a
    generator). A clip shorter than the window is taken whole, in evenly spaced frames.
    """
    if clip_frames < num_frames:
        return None
    window = (num_frames - 1) * interval + 1
    if clip_frames < window:
        return [round(i * (clip_frames - 1) / (num_frames - 1)) for i in range(num_frames)]
    start = pick(clip_frames - window + 1, generator)
    return list(range(start, start + window, interval))


def pick(choices: int, generator: torch.Generator | None) -> int:
    """Return one of `choices` numbers from 0: random, or the middle one without a generator."""
    if generator is None:
        return (choices - 1) // 2
    return int(torch.randint(choices, (), generator=generator))
