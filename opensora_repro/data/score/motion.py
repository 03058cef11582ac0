"""Scores of consecutive frames: how much moves, which frames repeat, how the camera shakes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from opensora_repro.data.clip_frames import shrink

FLOW_SIDE = 128  # pixels of the short side at which flow is computed
REPEAT_SIDE, REPEAT_LEVEL = 32, 2.0  # a repeat differs nowhere by more grey levels, looked at in squares of 1/32
SMOOTH_DEGREE = 1  # a pan that gathers or loses speed evenly is no shake
MIN_STEPS = 4  # steps of a run below which a straight line explains everything


def flow_fields(grey: np.ndarray) -> np.ndarray:
    """Return the optical flow between consecutive frames [T, H, W], float32 [T - 1, h, w, 2], in short sides a frame.

    Dense inverse search (Kroeger et al., 2016) as OpenCV has it.
    """
    import cv2

    small = shrink(grey, FLOW_SIDE)
    height, width = small.shape[1:]
    if len(small) < 2 or min(height, width) < 16:  # too small for its patches
        return np.zeros((max(0, len(small) - 1), height, width, 2), dtype=np.float32)
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = itertools.pairwise(small)
    return np.stack([method.calc(first, second, None) for first, second in pairs]) / min(height, width)


def repeats(grey: np.ndarray) -> np.ndarray:
    """Return bool [T - 1]: which frames [T, H, W] show what the frame before did."""
    small = shrink(grey, REPEAT_SIDE).astype(np.int16)
    return np.asarray(np.abs(np.diff(small, axis=0)).max(axis=(1, 2)) <= REPEAT_LEVEL)


def motion(flows: Sequence[np.ndarray], fps: float) -> float | None:
    """Return the mean length of the flow vectors in short sides a second; None for an image.

    `flows` are one field [T - 1, h, w, 2] a run. 1 means that the picture moves by its own short side in a second.
    """
    lengths = [np.hypot(flow[..., 0], flow[..., 1]).mean(axis=(1, 2)) for flow in flows]
    steps = np.concatenate(lengths) if lengths else np.zeros(0)
    return float(steps.mean() * fps) if len(steps) else None


def static_share(repeated: Sequence[np.ndarray]) -> float | None:
    """Return the share of frames that repeat the one before; None for an image."""
    steps = np.concatenate(repeated) if repeated else np.zeros(0)
    return float(steps.mean()) if len(steps) else None


def jitter(flows: Sequence[np.ndarray], repeated: Sequence[np.ndarray], fps: float) -> float | None:
    """Return how the camera shakes: the uneven part of the picture's movement, in short sides a second (RMS).

    The camera's step is the median flow of a pair of frames, so single moving things do not count; turning and zooming
    do not either. From each run's steps the straight line that fits best is taken away. Repeated frames are left out:
    a film shown at a higher rate is no shaken one. None where no run has enough steps.
    """
    squares: list[np.ndarray] = []
    for flow, repeat in zip(flows, repeated, strict=True):
        times = np.flatnonzero(~repeat)
        if len(flow) < MIN_STEPS:
            continue
        if len(times) < MIN_STEPS:
            squares.append(np.zeros(len(flow)))  # it stands still
            continue
        steps = np.median(flow[times].reshape(len(times), -1, 2), axis=1)
        line = np.polynomial.polynomial.polyfit(times, steps, SMOOTH_DEGREE)
        uneven = steps - np.polynomial.polynomial.polyval(times, line).T
        squares.append((uneven**2).sum(axis=1))
    return float(np.sqrt(np.concatenate(squares).mean()) * fps) if squares else None
