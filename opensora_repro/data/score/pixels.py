"""Scores by formula, from grey frames: sharpness, light, bars; motion, repeats, shake; text and marks that stay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from opensora_repro.data.clip_frames import shrink

# ffmpeg's blackdetect: a frame is black where 98 % of its pixels are below a tenth of the range.
BLACK_LEVEL, BLACK_PIXELS = 0.1, 0.98
BAR_LEVEL, BAR_PIXELS = 20, 0.98  # a little below cropdetect's 24: night skies are often as dark as that
MIN_BAR = 0.01  # thinner ones are encoders' padding
LARGEST_BAR = 0.35  # an upright film in a wide picture has 0.342; what is dark further in is a dark picture
MIN_PICTURE = 16  # pixels that must be left between bars

FLOW_SIDE = 128  # pixels of the short side at which flow is computed
REPEAT_SIDE, REPEAT_LEVEL = 32, 2.0  # a repeat differs nowhere by more grey levels, looked at in squares of 1/32
SMOOTH_DEGREE = 1  # a pan that gathers or loses speed evenly is no shake
MIN_STEPS = 4  # steps of a run below which a straight line explains everything

STROKE_LEVEL = 48  # grey levels between a stroke and its ground
TEXT_HEIGHT = 0.02, 0.2  # of the short side: smallest and largest line of text
TEXT_ASPECT = 1.5  # a line is at least so many times as wide as high
STROKES = 1.2  # at least so many strokes on a length of the line's height
STROKE_FILL = 0.35, 0.95  # share of a line's box that lies at strokes
STAYS = 0.8  # of the frames that must have a stroke
STEADY_LEVEL = 40.0  # grey levels (standard deviation over time) that a stroke keeps within

EDGE_LEVEL = 8.0  # grey levels a pixel that an edge must keep on average
KEPT = 0.5  # share of that which every single frame must have, in the same direction
CHANGE_LEVEL = 6.0  # grey levels (standard deviation over time) by which a pixel counts as changing
CHANGING = 0.5  # share of all pixels, and of those around an edge, that must change, or nothing can be told


# ---- single pictures, put together over a clip


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


# ---- consecutive frames


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


# ---- what covers the picture
#
# Heuristics on structure: they read nothing. `text_area` finds rows of strokes, so a fence, a bookshelf or a knitted
# pattern that stands still may count, and text that moves, is tilted, huge or tiny is not seen. `watermark_area` finds
# edges that stay while the picture around them changes, so it sees logos, frames and captions of any shape, but cannot
# tell them from the scene where the camera stands still (None), and takes a still thing before a moving ground, such as
# a dashboard, for a mark.


def text_area(grey: np.ndarray) -> float:
    """Return the share, 0 to 1, of frames [T, H, W] covered by boxes of text-like structure that stays in place.

    Strokes give a strong morphological gradient on both sides. Those that are there in nearly all frames are joined
    along the line, and size, shape and the number of strokes tell lines of text from other things.
    """
    import cv2

    short = min(grey.shape[1:])
    square = np.ones((3, 3), np.uint8)
    gradients = np.stack([cv2.morphologyEx(frame, cv2.MORPH_GRADIENT, square) for frame in grey])
    steady = grey.std(axis=0, dtype=np.float32) <= STEADY_LEVEL  # or running text, dense as it is, would stay as well
    strokes = (((gradients >= STROKE_LEVEL).mean(axis=0) >= STAYS) & steady).astype(np.uint8)
    reach = max(3, round(0.03 * short)) | 1
    lines = cv2.morphologyEx(strokes, cv2.MORPH_CLOSE, np.ones((1, reach), np.uint8))
    lines = cv2.morphologyEx(lines, cv2.MORPH_OPEN, square)  # loose single edges
    usual = grey.mean(axis=0)
    mask = np.zeros(strokes.shape, dtype=bool)
    count, _, boxes, _ = cv2.connectedComponentsWithStats(lines, connectivity=4)
    for left, top, width, height, _ in boxes[1:count]:
        part = slice(top, top + height), slice(left, left + width)
        if _is_line(strokes[part], usual[part], short):
            mask[part] = True
    return float(mask.mean())


def _is_line(strokes: np.ndarray, picture: np.ndarray, short: int) -> bool:
    """Whether a box [h, w] of strokes, bool, and of the picture, float, looks like a line of text."""
    height, width = strokes.shape
    if not TEXT_HEIGHT[0] * short <= height <= TEXT_HEIGHT[1] * short or width < TEXT_ASPECT * height:
        return False
    if not STROKE_FILL[0] <= strokes.mean() <= STROKE_FILL[1]:
        return False
    middle = picture[height // 4 : max(height // 4 + 1, height - height // 4)]
    light = middle > (picture.min() + picture.max()) / 2
    crossings = np.abs(np.diff(light.astype(np.int8), axis=1)).sum(axis=1)
    return bool(np.median(crossings) / 2 >= STROKES * width / height / 2)


def watermark_area(grey: np.ndarray) -> float | None:
    """Return the share, 0 to 1, of the picture near edges that stay while it changes; None where too little changes.

    `grey` [T, H, W] are frames far enough apart to differ, at least three.
    """
    import cv2

    if len(grey) < 3:
        return None
    changing = grey.std(axis=0, dtype=np.float32) >= CHANGE_LEVEL
    if changing.mean() < CHANGING:
        return None
    short = min(changing.shape)
    around = cv2.blur(changing.astype(np.float32), (short // 4 | 1, short // 4 | 1))
    across = np.stack([cv2.Sobel(frame, cv2.CV_32F, 1, 0) for frame in grey]) / 8
    down = np.stack([cv2.Sobel(frame, cv2.CV_32F, 0, 1) for frame in grey]) / 8
    mean_across, mean_down = across.mean(axis=0), down.mean(axis=0)
    lasting = np.hypot(mean_across, mean_down)
    weakest = (across * mean_across + down * mean_down).min(axis=0) / np.maximum(lasting, 1e-6)
    edges = ((lasting >= EDGE_LEVEL) & (weakest >= KEPT * lasting) & (around >= CHANGING)).astype(np.uint8)
    reach = max(3, round(0.03 * short)) | 1
    marks = cv2.morphologyEx(edges, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))  # the inside of letters
    marks = cv2.morphologyEx(marks, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    return float(marks.mean())
