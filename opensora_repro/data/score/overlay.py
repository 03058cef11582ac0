"""How much of a clip is covered by text and by marks that stay in place, told without a model.

Both are heuristics on structure: they read nothing. `text_area` finds rows of strokes, so a fence, a bookshelf or a
knitted pattern that stands still may count, and text that moves, is tilted, huge or tiny is not seen. `watermark_area`
finds edges that stay while the picture around them changes, so it sees logos, frames and captions of any shape, but
cannot tell them from the scene where the camera stands still (None), and takes a still thing before a moving ground,
such as a dashboard, for a mark.
"""

from __future__ import annotations

import numpy as np

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
