"""A second judge of the demo's videos, which knows nothing of outlines, mean colours or the centres of masks.

What share of its bounding box does a shape fill: a square all of it; a triangle's upper third is narrower than its
lower one; what is neither is a circle. Its colour is which channels are bright amid the box. It is where the light is:
the mean place of all pixels, weighed by how much brighter than the ground they are.
`python -m tests.bounding_box runs/demo` judges a finished demo's videos, and writes runs/demo/second_judge.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from opensora_repro.data.video import probe, read_frames
from opensora_repro.demo.adherence import ideal_mask, mask_of, overlap
from opensora_repro.demo.given import MAX_JUMP, TASKS
from opensora_repro.demo.report import group_of
from opensora_repro.demo.shapes import COLOURS, DIRECTIONS
from opensora_repro.files import write_text

MIN_AREA = 0.01  # of the picture; less is no shape
FILLED = 0.9  # of the bounding box
TAPER = 0.6  # of the lower third's width; an ideal triangle's upper third has a fifth of it
BRIGHT = 128  # of 255
MIN_TRAVEL = 0.25  # of the picture's side


def box_of(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a mask [H, W] that shows something."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def shape_by_box(mask: np.ndarray) -> str | None:
    """Name the shape in a mask [H, W]; None where there is none."""
    if mask.mean() < MIN_AREA:
        return None
    box = mask[box_of(mask)]
    if box.mean() > FILLED:
        return "square"
    third = max(1, len(box) // 3)
    return "triangle" if box[:third].mean() < TAPER * box[-third:].mean() else "circle"


def shape_of_video(masks: list[np.ndarray]) -> str | None:
    """The shape in more than half of a video's frames."""
    return most_often([shape_by_box(mask) for mask in masks])


def colour_by_channels(frame: np.ndarray) -> str | None:
    """The colour whose bright channels are those amid the bounding box."""
    mask = mask_of(frame)
    if mask.mean() < MIN_AREA:
        return None
    box = frame[box_of(mask)]
    height, width = len(box), box.shape[1]
    amid = box[height // 3 : -(height // 3) or None, width // 3 : -(width // 3) or None]
    bright = tuple(np.median(amid, axis=(0, 1)) > BRIGHT)
    return next((name for name, rgb in COLOURS.items() if tuple(value > BRIGHT for value in rgb) == bright), None)


def most_often(names: list[str | None]) -> str | None:
    return next((name for name in set(names) if 2 * names.count(name) > len(names)), None)


def places(frames: np.ndarray) -> np.ndarray:
    """(x, y) of the shape in each of [T, H, W, 3] in pixels: the mean place of light beyond the ground's."""
    light = frames.max(axis=-1).astype(float)
    light = (light - np.median(light, axis=(1, 2), keepdims=True)).clip(0)
    total = light.sum(axis=(1, 2)) + 1e-9
    rows, columns = np.arange(light.shape[1])[:, None], np.arange(light.shape[2])
    return np.stack([(light * columns).sum(axis=(1, 2)) / total, (light * rows).sum(axis=(1, 2)) / total], axis=1)


def direction_by_light(frames: np.ndarray, *, returns: bool) -> str | None:
    """From the first frame to the last, or of a shape that comes back to the farthest."""
    moved = places(frames) / np.array(frames.shape[2:0:-1])
    moved = moved - moved[0]
    end = moved[np.linalg.norm(moved, axis=1).argmax()] if returns else moved[-1]
    along = {name: float(end @ step) for name, step in DIRECTIONS.items()}
    best = max(along, key=along.__getitem__)
    return best if along[best] >= MIN_TRAVEL else None


def jump_by_light(frames: np.ndarray, seams: tuple[int, ...]) -> float:
    """The largest step at the seams, -1 from the last frame to the first one, in median steps of the video."""
    found = places(frames)
    steps = np.linalg.norm(np.roll(found, -1, axis=0) - found, axis=1)
    return float(max(steps[seam] for seam in seams) / (np.median(steps[:-1]) + 1e-9))


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """Of one video of the demo: which parts are as told, and the mean overlap with the ideal outline."""
    path = Path(record["path"])
    frames = read_frames(path, start=0, count=probe(path).num_frames).numpy()
    _, colour, shape, _, direction, *back = record["caption"].split()
    masks = [mask_of(frame) for frame in frames]
    found: dict[str, Any] = {
        "colour": most_often([colour_by_channels(frame) for frame in frames]) == colour,
        "shape": shape_of_video(masks) == shape,
        "direction": direction_by_light(frames, returns=bool(back)) == direction,
        "overlap": float(np.mean([overlap(mask, ideal_mask(shape, mask)) if mask.any() else 0.0 for mask in masks])),
    }
    if record.get("seams"):
        found["seam"] = jump_by_light(frames, tuple(record["seams"])) <= MAX_JUMP
    return found


def main(run: Path) -> None:
    """Print and write, for each group and format and each task, the shares that are as told, and the mean overlap."""
    rows: dict[str, list[dict[str, Any]]] = {}
    summary = json.loads((run / "adherence.json").read_text())
    for record in summary["records"] + summary.get("given", []):
        name = TASKS[record["task"]] if "task" in record else group_of(record)
        rows.setdefault(name, []).append(judged(record))
    means = {name: {part: float(np.mean([one[part] for one in own])) for part in own[0]} for name, own in rows.items()}
    for name, row in means.items():
        print(
            f"{name:>18}"
            + "".join(f"  {part} {value:.{3 if part == 'overlap' else 2}f}" for part, value in row.items())
        )
    write_text(run / "second_judge.json", json.dumps(means, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
