"""Pictures whose scores are known."""

from __future__ import annotations

import cv2
import numpy as np


def texture(height: int = 128, width: int = 192, seed: int = 0) -> np.ndarray:
    """A grey picture with structure of several sizes, uint8 [H, W]."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width), dtype=np.float32)
    for cells in (4, 8, 16, 32):
        coarse = random.normal(size=(cells, cells)).astype(np.float32)
        picture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 30
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def moving(steps: list[tuple[float, float]], height: int = 128, width: int = 192) -> np.ndarray:
    """A window that moves over a large texture by `steps` of (x, y) pixels, uint8 [T, H, W]."""
    ground = texture(height + 240, width + 240)
    places = np.cumsum([(120.0, 120.0), *steps], axis=0)
    moves = [np.array([[1, 0, -x], [0, 1, -y]], dtype=np.float32) for x, y in places]
    return np.stack([cv2.warpAffine(ground, move, (width, height)) for move in moves])
