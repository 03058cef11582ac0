"""A picture of the clips on both sides of a threshold, to judge by eye whether it lies well."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opensora_repro.data.filter.near import NearRow

CELL, LABEL, GAP = 192, 18, 4  # pixels: a square for each clip, a line of text, between cells
Thumbnail = tuple[NearRow, np.ndarray]


def read_thumbnails(rows: list[NearRow], folder: Path, count: int) -> list[Thumbnail]:
    """Return the middle frames, uint8 [CELL, CELL, 3], of the first `count` clips that can be read."""
    from opensora_repro.data.video import DecodeError, read_pictures_at

    found: list[Thumbnail] = []
    for row in rows:
        if len(found) == count:
            break
        try:
            frame = read_pictures_at(folder / row.path, [max(0, row.num_frames // 2)])[0]
        except (DecodeError, OSError, ValueError):
            continue
        found.append((row, _fit(frame)))
    return found


def contact_sheet(title: str, below: list[Thumbnail], above: list[Thumbnail]) -> np.ndarray:
    """Return uint8 [H, W, 3]: the clips below the threshold in the first row, those above in the second.

    The nearest to the threshold come first; each has its value and the start of its id.
    """
    columns = max(len(below), len(above))
    width = columns * (CELL + GAP) + GAP
    bands = [_band(title, width, 20)]
    for name, side in (("below", below), ("at or above", above)):
        bands.append(_band(f"{name}, nearest first" if side else f"{name}: none to show", width, 14))
        row = np.full((CELL + LABEL + GAP if side else 0, width, 3), 24, dtype=np.uint8)
        for number, (clip, picture) in enumerate(side):
            left = GAP + number * (CELL + GAP)
            row[:CELL, left : left + CELL] = picture
            row[CELL : CELL + LABEL, left : left + CELL] = _band(f"{clip.value:.4g}  {clip.id}", CELL, 12)
        bands.append(row)
    return np.concatenate(bands)


def _fit(frame: np.ndarray) -> np.ndarray:
    """Scale a picture into a dark square."""
    import cv2

    height, width = frame.shape[:2]
    scale = CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    square = np.full((CELL, CELL, 3), 24, dtype=np.uint8)
    top, left = (CELL - small.shape[0]) // 2, (CELL - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _band(text: str, width: int, size: int) -> np.ndarray:
    """Light text on a dark line; names are anybody's, so only plain characters are drawn."""
    from PIL import Image, ImageDraw, ImageFont

    plain = "".join(c if " " <= c <= "~" else "?" for c in text)
    image = Image.new("RGB", (width, size + 6), (24, 24, 24))
    ImageDraw.Draw(image).text((GAP, 2), plain, fill=(220, 220, 220), font=ImageFont.load_default(size))
    return np.asarray(image).copy()
