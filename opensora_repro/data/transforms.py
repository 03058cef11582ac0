"""From a clip to a training sample: which frames, which part of the picture, mirrored or not.

Every random choice takes a generator, so that it can be keyed to the sample; without one the middle is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from einops import rearrange

from opensora_repro.data.sides import names_a_side as names_a_side  # where it does, `mirror` must not be used
from opensora_repro.data.video import Size

if TYPE_CHECKING:
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


def crop(frames: torch.Tensor, size: Size, generator: torch.Generator | None = None) -> torch.Tensor:
    """Cut [T, H, W, C] to [T, height, width, C] at a random place (the centre without a generator)."""
    height, width = size
    if frames.shape[1] < height or frames.shape[2] < width:
        raise ValueError(f"frames of {frames.shape[1]}x{frames.shape[2]} are smaller than the crop of {height}x{width}")
    top = pick(frames.shape[1] - height + 1, generator)
    left = pick(frames.shape[2] - width + 1, generator)
    return frames[:, top : top + height, left : left + width]


def mirror(frames: torch.Tensor) -> torch.Tensor:
    """Swap left and right of [T, H, W, C]."""
    return frames.flip(2)


def to_tensor(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [T, H, W, C] to float32 [C, T, H, W] in [-1, 1]."""
    return rearrange(frames, "t h w c -> c t h w").contiguous().float().div_(127.5).sub_(1.0)


def pick(choices: int, generator: torch.Generator | None) -> int:
    """Return one of `choices` numbers from 0: random, or the middle one without a generator."""
    import torch

    if generator is None:
        return (choices - 1) // 2
    return int(torch.randint(choices, (), generator=generator))
