"""The few frames of a clip that its scores are measured on.

RUNS runs of RUN_FRAMES consecutive frames, centred in the thirds of the clip (all frames of a clip that is not longer
than that): consecutive ones show motion, repeats and shake, runs far apart show what stays over the clip. At 24 frames
a clip the cost hardly grows with its length. Everything is measured at one size, so that scores of clips of different
sizes compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

RUNS, RUN_FRAMES = 3, 8
SHORT_SIDE = 256  # pixels; smaller clips are scaled up, which shows in their sharpness, as it should


def runs_of(num_frames: int) -> list[range]:
    """Return the frames to read, as ascending ranges that do not overlap."""
    if num_frames <= RUNS * RUN_FRAMES:
        return [range(num_frames)]
    starts = [(2 * part + 1) * num_frames // (2 * RUNS) - RUN_FRAMES // 2 for part in range(RUNS)]
    return [range(start, start + RUN_FRAMES) for start in starts]


def middles_of(num_frames: int, parts: int = RUNS) -> list[int]:
    """Return up to `parts` frames, the middles of equal parts: they stand for a clip where motion does not matter."""
    return sorted({(2 * part + 1) * num_frames // (2 * parts) for part in range(parts)})


def read_runs(path: str | Path, num_frames: int) -> list[np.ndarray]:
    """Return uint8 [T, H, W, 3] for each run, short side SHORT_SIDE. Raises DecodeError."""
    from opensora_repro.data.video import read_pictures_at

    size = SHORT_SIDE, SHORT_SIDE
    return [read_pictures_at(path, run, size=size) for run in runs_of(num_frames)]


def read_middles(path: str | Path, num_frames: int, *, parts: int = RUNS, short_side: int = SHORT_SIDE) -> np.ndarray:
    """Return the frames of `middles_of` as uint8 [T, H, W, 3]. Raises DecodeError."""
    from opensora_repro.data.video import read_pictures_at

    size = short_side, short_side
    return np.concatenate([read_pictures_at(path, [frame], size=size) for frame in middles_of(num_frames, parts)])


def grey(frames: np.ndarray) -> np.ndarray:
    """Return the luma (BT.601) of uint8 [T, H, W, 3] as uint8 [T, H, W]."""
    import cv2

    return np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames])


def shrink(frames: np.ndarray, short_side: int) -> np.ndarray:
    """Return grey frames [T, H, W] at a smaller short side; each pixel is the mean of those it covers."""
    import cv2

    height, width = frames.shape[1:]
    scale = short_side / min(height, width)
    if scale >= 1:
        return frames
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def middles(runs: Sequence[np.ndarray], num_frames: int) -> np.ndarray:
    """Return of what `read_runs` gave the frames of `middles_of`, [T, ...]."""
    if len(runs) == 1:
        return runs[0][middles_of(num_frames)]
    return np.stack([run[RUN_FRAMES // 2] for run in runs])


def spread(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Return up to 2 * RUNS frames from all over the clip, [T, ...]: the first and last of each run."""
    if len(runs) == 1:
        return runs[0][sorted(set(np.linspace(0, len(runs[0]) - 1, 2 * RUNS).round().astype(int).tolist()))]
    return np.stack([run[end] for run in runs for end in (0, -1)])
