"""All scores of a clip that need no model, from one reading of a few of its frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.clip_frames import grey, middles, read_runs, spread
from opensora_repro.data.score import pixels
from opensora_repro.data.score.duplicates import clip_code

FRAMES_METHOD = 2  # raise when other frames are read, or their size changes
CODE = "code"  # what a record keeps of `duplicates`: the clip's code in hexadecimal digits, for comparing


@dataclass(frozen=True)
class Frames:
    """What scores are made from: grey frames, whole ones and the pictures inside any dark bars."""

    whole: Sequence[np.ndarray]  # uint8 [T, H, W] of each run
    num_frames: int
    fps: float

    @cached_property
    def box(self) -> tuple[int, int, int, int]:
        return pixels.picture_box(np.concatenate(self.whole))

    @cached_property
    def picture(self) -> list[np.ndarray]:
        """The runs [T, h, w] without their bars."""
        top, bottom, left, right = self.box
        return [run[:, top:bottom, left:right] for run in self.whole]

    @cached_property
    def flows(self) -> list[np.ndarray]:
        return [pixels.flow_fields(run) for run in self.picture]

    @cached_property
    def repeated(self) -> list[np.ndarray]:
        return [pixels.repeats(run) for run in self.picture]


Measured = dict[str, Any]  # values by column


def _brightness(frames: Frames) -> Measured:
    bright, black = pixels.brightness(spread(frames.picture)), pixels.black_share(np.concatenate(frames.whole))
    return {"brightness": bright, "black_share": black}


def _letterbox(frames: Frames) -> Measured:
    letterbox, pillarbox = pixels.bar_shares(frames.box, *frames.whole[0].shape[1:])
    return {"letterbox": letterbox, "pillarbox": pillarbox}


def _duplicates(frames: Frames) -> Measured:
    code = clip_code(middles(frames.picture, frames.num_frames))
    return {CODE: None if code is None else code.astype(">u2").tobytes().hex()}


@dataclass(frozen=True)
class Score:
    """How a score is made, and its method: raise it when the formula changes, so that clips are measured again."""

    measure: Callable[[Frames], Measured]
    method: int
    columns: tuple[str, ...]


SCORES = {
    "motion": Score(lambda f: {"motion": pixels.motion(f.flows, f.fps)}, 1, ("motion",)),
    "jitter": Score(lambda f: {"jitter": pixels.jitter(f.flows, f.repeated, f.fps)}, 1, ("jitter",)),
    "static": Score(lambda f: {"static_share": pixels.static_share(f.repeated)}, 1, ("static_share",)),
    "sharpness": Score(lambda f: {"sharpness": pixels.sharpness(spread(f.picture))}, 1, ("sharpness",)),
    "brightness": Score(_brightness, 1, ("brightness", "black_share")),
    "letterbox": Score(_letterbox, 1, ("letterbox", "pillarbox")),
    "text": Score(lambda f: {"text_area": pixels.text_area(spread(f.whole))}, 1, ("text_area",)),
    "watermark": Score(lambda f: {"watermark_area": pixels.watermark_area(spread(f.whole))}, 1, ("watermark_area",)),
    "duplicates": Score(_duplicates, 1, ()),
}


def methods_of(names: Collection[str]) -> list[Any]:
    """Return what tells one way of measuring from another."""
    return [FRAMES_METHOD, *((name, SCORES[name].method) for name in sorted(names))]


def columns_of(names: Collection[str]) -> dict[str, str]:
    """Return the columns that single clips have of these scores, with pyarrow's names of their types."""
    return {column: "double" for name in names for column in SCORES[name].columns}


def measure_clip(path: str | Path, *, num_frames: int, fps: float, names: Collection[str]) -> Measured:
    """Read the frames and return the named scores' columns. Raises DecodeError."""
    frames = Frames([grey(run) for run in read_runs(path, num_frames)], num_frames, fps)
    return {column: value for name in names for column, value in SCORES[name].measure(frames).items()}


def code_of(text: str) -> np.ndarray:
    """Return the uint16 code that a record keeps as hexadecimal digits."""
    return np.frombuffer(bytes.fromhex(text), dtype=">u2").astype(np.uint16)
