"""Scores of single pictures, put together over a clip: sharpness, brightness, black frames, dark bars."""

from __future__ import annotations

import numpy as np

# ffmpeg's blackdetect: a frame is black where 98 % of its pixels are below a tenth of the range.
BLACK_LEVEL, BLACK_PIXELS = 0.1, 0.98
BAR_LEVEL, BAR_PIXELS = 20, 0.98  # a little below cropdetect's 24: night skies are often as dark as that
MIN_BAR = 0.01  # thinner ones are encoders' padding
LARGEST_BAR = 0.35  # an upright film in a wide picture has 0.342; what is dark further in is a dark picture
MIN_PICTURE = 16  # pixels that must be left between bars


def sharpness(grey: np.ndarray) -> float:
    """Return the median over frames [T, H, W] of the variance of the Laplacian (Pech-Pacheco et al., 2000).

    In squared grey levels (0 to 255) at the short side that all clips are scaled to: comparable between sizes, but it
    grows with contrast and texture too, and with noise. Below about 100 pictures look soft.
    """
    import cv2

    return float(np.median([cv2.Laplacian(frame, cv2.CV_32F).var() for frame in grey]))


def brightness(grey: np.ndarray) -> float:
    """Return the mean of frames [T, H, W], 0 (black) to 1 (white)."""
    return float(grey.mean() / 255)


def black_share(grey: np.ndarray) -> float:
    """Return the share of frames [T, H, W] that are black, by the rule of ffmpeg's blackdetect."""
    dark = (grey < BLACK_LEVEL * 255).mean(axis=(1, 2))
    return float((dark >= BLACK_PIXELS).mean())


def picture_box(grey: np.ndarray) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right), half-open: the part of frames [T, H, W] inside constant dark bars.

    A row or column belongs to a bar where nearly all its pixels stay dark in all frames. Where no picture would be
    left, as in a black clip, the whole frame is returned.
    """
    dark = grey.max(axis=0) <= BAR_LEVEL
    top, bottom = _bars(dark.mean(axis=1) >= BAR_PIXELS)
    left, right = _bars(dark[top:bottom].mean(axis=0) >= BAR_PIXELS)
    if min(bottom - top, right - left) < MIN_PICTURE:
        return 0, grey.shape[1], 0, grey.shape[2]
    return top, bottom, left, right


def _bars(dark: np.ndarray) -> tuple[int, int]:
    """The half-open span between the dark ends of a line; each end counts from MIN_BAR to LARGEST_BAR alone."""
    size = len(dark)
    if dark.all():
        return 0, size
    first = int(np.argmin(dark))
    last = size - int(np.argmin(dark[::-1]))
    start = first if MIN_BAR * size <= first <= LARGEST_BAR * size else 0
    end = last if MIN_BAR * size <= size - last <= LARGEST_BAR * size else size
    return start, end


def bar_shares(box: tuple[int, int, int, int], height: int, width: int) -> tuple[float, float]:
    """Return the shares of the height (letterbox) and of the width (pillarbox) that bars take, 0 to 1."""
    top, bottom, left, right = box
    return 1 - (bottom - top) / height, 1 - (right - left) / width
