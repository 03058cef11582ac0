"""Sizes of samples by name: `480p` at `9:16`, four seconds. Names, tables and frame counts are Open-Sora's.

Needs no torch.
"""

from __future__ import annotations

import re
from typing import Any

from opensora_repro.config import Config, ConfigError
from opensora_repro.config.sections import sample_fps
from opensora_repro.data.buckets import MULTIPLE, PIXELS, published_table

DEFAULT_RATIO = "9:16"  # height to width
# What 1.2 calls its frame counts, whole chunks of its autoencoder at 24 frames a second
FRAMES = {
    "1x": 51, "2x": 102, "4x": 204, "8x": 408, "16x": 816,
    "2s": 51, "4s": 102, "8s": 204, "16s": 408, "32s": 816,
}  # fmt: skip
CHUNK, CHUNKS_A_SECOND, CHUNKED_RATE = 17, 1.5, 24


def parse_frames(text: str) -> int:
    """A number of frames, or one of FRAMES' names. Raises ValueError."""
    return FRAMES[text] if text in FRAMES else int(text)


def frames_of_seconds(cfg: Config, model: Any, seconds: float, *, fps: int | None = None) -> int:
    """Frames of a clip so long: at the rate that it is written with; 1.2's are whole chunks of 17 (2 s: 51)."""
    rate = fps or sample_fps(cfg)
    if getattr(model, "architecture", "") == "stdit3" and rate == CHUNKED_RATE:
        return CHUNK * max(1, round(CHUNKS_A_SECOND * seconds))
    return max(1, round(rate * seconds))


def named_size(resolution: str, aspect_ratio: str, *, whole: bool) -> tuple[int, int]:
    """(height, width) in pixels: the row of the resolution's table next to a ratio HEIGHT:WIDTH.

    `whole`: cut to whole latents, for models that are not told their pixels. Raises ConfigError.
    """
    if resolution not in PIXELS:
        raise ConfigError(f"--resolution {resolution}: expected one of {', '.join(PIXELS)}")
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", aspect_ratio)
    if found is None:
        raise ConfigError(f"--aspect-ratio {aspect_ratio}: expected HEIGHT:WIDTH, such as {DEFAULT_RATIO}")
    ratio, table = int(found[1]) / int(found[2]), published_table(resolution)
    if not table[0][0] / 1.05 <= ratio <= table[-1][0] * 1.05:
        ends = f"{table[0][0]:g} to {table[-1][0]:g}"
        raise ConfigError(f"--aspect-ratio {aspect_ratio}: the table of {resolution} has height / width from {ends}")
    _, height, width = min(table, key=lambda row: abs(row[0] - ratio))
    return (height // MULTIPLE * MULTIPLE, width // MULTIPLE * MULTIPLE) if whole else (height, width)
