"""Which frames of a clip are a sample's: a window of them by number or by time, or the whole clip evenly.

Random choices take a generator, keyed to the sample; without one the middle is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensora_repro.config import DataConfig
from opensora_repro.data.video import DecodeError, frame_times

if TYPE_CHECKING:
    import torch

MOST_FRAMES = 1 << 40  # of clips whose rates are a slip
SLACK = 1e-6  # of seconds and of frames: what fractions lose as floating-point numbers


def interval_of(data: DataConfig) -> int:
    """Return which frames are taken, every first or n-th: by time, and of a whole clip, none is passed over."""
    return 1 if data.fps or data.frame_sampling == "uniform" else data.frame_interval


def frames_at_rate(data: DataConfig, num_frames: Any, fps: Any) -> Any:
    """Return how many frames clips have, int64 [N] from counts and rates [N]: their own without `data.fps`.

    With it, as many as moments 1 / data.fps apart fall into the time that a clip lasts.
    """
    if not data.fps:
        return num_frames
    rates = np.where(num_frames == 1, data.fps, fps)  # a picture is one frame, and may have no rate
    return np.ceil(np.minimum(num_frames * (data.fps / rates), MOST_FRAMES) - SLACK).astype(np.int64)


def choose_frames(
    data: DataConfig, path: str, clip_frames: int, fps: float, num_frames: int, generator: torch.Generator | None
) -> list[int]:
    """Return the `num_frames` frames of a sample, ascending; by time, one may come again. Raises DecodeError, OSError.

    `clip_frames` and `fps` are the manifest's; `frames_at_rate` of them is at least `num_frames`.
    """
    if clip_frames == 1 or (data.frame_sampling == "window" and not data.fps):
        return frame_window(clip_frames, num_frames, data.frame_interval, generator)
    times = clip_times(path, clip_frames, fps)
    if data.frame_sampling == "uniform":
        return evenly(times, num_frames)
    found = time_window(times, num_frames, data.fps, generator)
    if found is None:
        raise DecodeError(
            f"{path}: lasts {times[-1]:.3g} s, its row of the manifest says {clip_frames / fps:.3g} s; the sample "
            f"needs {(num_frames - 1) / data.fps:.3g} s"
        )
    return found


def rate_of(data: DataConfig, frames: list[int], fps: float) -> float:
    """Return how many frames a second a sample has, 0 for a picture: of a clip of `fps`, these `frames`."""
    if len(frames) == 1:
        return 0.0
    return data.fps or fps * (len(frames) - 1) / (frames[-1] - frames[0])


def frame_window(
    clip_frames: int, num_frames: int, interval: int, generator: torch.Generator | None = None
) -> list[int]:
    """Return `num_frames` ascending frames of a clip that has at least so many.

    Every `interval`-th frame of a random window of (num_frames - 1) * interval + 1 frames. A clip shorter than the
    window is taken whole, in evenly spaced frames.
    """
    window = (num_frames - 1) * interval + 1
    if clip_frames < window:
        return [round(i * (clip_frames - 1) / (num_frames - 1)) for i in range(num_frames)]
    start = pick(clip_frames - window + 1, generator)
    return list(range(start, start + window, interval))


def time_window(
    times: np.ndarray, num_frames: int, fps: float, generator: torch.Generator | None = None
) -> list[int] | None:
    """Return the frames that are shown at `num_frames` moments 1 / fps apart, the first one random; None: too short.

    Of a clip of k * fps frames a second, which ones and with what chances is as in `frame_window` with interval k.
    """
    import torch

    room = times[-1] - (num_frames - 1) / fps
    if room <= -0.5 / fps:
        return None
    part = 0.5 if generator is None else float(torch.rand((), generator=generator, dtype=torch.float64))
    return shown_at(times, part * max(room, 0.0) + np.arange(num_frames) / fps)


def evenly(times: np.ndarray, num_frames: int) -> list[int]:
    """Return the frames shown at `num_frames` moments from a clip's first to its last frame (ViViT's uniform ones)."""
    middle = times[-2] / 2
    return shown_at(times, np.linspace(0.0, times[-2], num_frames) if num_frames > 1 else np.array([middle]))


def shown_at(times: np.ndarray, moments: np.ndarray) -> list[int]:
    """Return the frame that a player shows at each moment."""
    found: list[int] = (np.searchsorted(times[:-1], moments + SLACK, side="right") - 1).tolist()
    return found


def clip_times(path: str | Path, clip_frames: int, fps: float) -> np.ndarray:
    """Return when each frame of a clip is shown, seconds from its first, and when the last ends, float64 [N + 1].

    By the file's clock. Where that does not tell, or the file has fewer frames than the manifest says, the others
    follow at the mean rate: who asks for one that is not there hears that from the reader.
    """
    known = frame_times(path)[: clip_frames + 1]
    step = known[-1] / (len(known) - 1) if len(known) > 1 else 1 / fps
    known = known if len(known) else np.zeros(1)
    return np.concatenate([known, known[-1] + step * np.arange(1, clip_frames + 2 - len(known))])


def pick(choices: int, generator: torch.Generator | None) -> int:
    """Return one of `choices` numbers from 0: random, or the middle one without a generator."""
    import torch

    if generator is None:
        return (choices - 1) // 2
    return int(torch.randint(choices, (), generator=generator))
