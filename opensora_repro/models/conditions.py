"""What a model is told of a sample beside its caption and timestep: rate and size, under the names of its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IMAGE_FPS = 120.0  # what Open-Sora tells a model of a picture


def conditions_of(cfg: Any, size: tuple[int, int, int], fps: Tensor, *, frame_interval: int) -> dict[str, Tensor]:
    """Those that the model's config names of fps, height, width, num_frames and ar (width / height), each [B] float32.

    `size`: frames, height and width in pixels. `fps` [B] as the frames were taken, 0 for a picture: every
    `frame_interval`-th of the source's, whose own rate STDiT2 is told, as it was trained.
    """
    names = getattr(cfg, "conditions", ())
    if not names:
        return {}
    frames, height, width = map(float, size)
    rate = fps * frame_interval if cfg.architecture == "stdit2" else fps
    rate = torch.where(rate > 0, rate, torch.full_like(rate, IMAGE_FPS))
    sizes = {"num_frames": frames, "height": height, "width": width, "ar": width / height}
    return {name: rate if name == "fps" else torch.full_like(rate, sizes[name]) for name in names}
