"""All scores of a clip that need no model, from one reading of a few of its frames."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.clip_frames import grey, middles, read_runs, spread

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
        from opensora_repro.data.score.pixels import picture_box

        return picture_box(np.concatenate(self.whole))

    @cached_property
    def picture(self) -> list[np.ndarray]:
        """The runs [T, h, w] without their bars."""
        top, bottom, left, right = self.box
        return [run[:, top:bottom, left:right] for run in self.whole]

    @cached_property
    def flows(self) -> list[np.ndarray]:
        from opensora_repro.data.score.pixels import flow_fields

        return [flow_fields(run) for run in self.picture]

    @cached_property
    def repeated(self) -> list[np.ndarray]:
        from opensora_repro.data.score.pixels import repeats

        return [repeats(run) for run in self.picture]


Measured = dict[str, Any]  # values by column


def _motion(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import motion

    return {"motion": motion(frames.flows, frames.fps)}


def _static(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import static_share

    return {"static_share": static_share(frames.repeated)}


def _jitter(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import jitter

    return {"jitter": jitter(frames.flows, frames.repeated, frames.fps)}


def _sharpness(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import sharpness

    return {"sharpness": sharpness(spread(frames.picture))}


def _brightness(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import black_share, brightness

    return {"brightness": brightness(spread(frames.picture)), "black_share": black_share(np.concatenate(frames.whole))}


def _letterbox(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import bar_shares

    letterbox, pillarbox = bar_shares(frames.box, *frames.whole[0].shape[1:])
    return {"letterbox": letterbox, "pillarbox": pillarbox}


def _text(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import text_area

    return {"text_area": text_area(spread(frames.whole))}


def _watermark(frames: Frames) -> Measured:
    from opensora_repro.data.score.pixels import watermark_area

    return {"watermark_area": watermark_area(spread(frames.whole))}


def _duplicates(frames: Frames) -> Measured:
    from opensora_repro.data.score.duplicates import clip_code

    code = clip_code(middles(frames.picture, frames.num_frames))
    return {CODE: None if code is None else code.astype(">u2").tobytes().hex()}


@dataclass(frozen=True)
class Score:
    """How a score is made, and its method: raise it when the formula changes, so that clips are measured again."""

    measure: Callable[[Frames], Measured]
    method: int


SCORES = {
    "motion": Score(_motion, 1),
    "jitter": Score(_jitter, 1),
    "static": Score(_static, 1),
    "sharpness": Score(_sharpness, 1),
    "brightness": Score(_brightness, 1),
    "letterbox": Score(_letterbox, 1),
    "text": Score(_text, 1),
    "watermark": Score(_watermark, 1),
    "duplicates": Score(_duplicates, 1),
}


def methods_of(names: Collection[str]) -> list[Any]:
    """Return what tells one way of measuring from another."""
    return [FRAMES_METHOD, *((name, SCORES[name].method) for name in sorted(names))]


def measure_clip(path: str | Path, *, num_frames: int, fps: float, names: Collection[str]) -> Measured:
    """Read the frames and return the named scores' columns. Raises DecodeError."""
    frames = Frames([grey(run) for run in read_runs(path, num_frames)], num_frames, fps)
    return {column: value for name in names for column, value in SCORES[name].measure(frames).items()}


def code_of(text: str) -> np.ndarray:
    """Return the uint16 code that a record keeps as hexadecimal digits."""
    return np.frombuffer(bytes.fromhex(text), dtype=">u2").astype(np.uint16)
