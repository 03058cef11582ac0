"""A second judge of the demo's shapes, which knows nothing of outlines: what share of its bounding box a shape fills.

A square fills all of it; a triangle's upper third is narrower than its lower one; what is neither is a circle.
`python -m tests.bounding_box runs/demo` judges a finished demo's videos.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from opensora_repro.data.video import probe, read_frames
from opensora_repro.demo.adherence import ideal_mask, mask_of, overlap
from opensora_repro.demo.report import group_of

MIN_AREA = 0.01  # of the picture; less is no shape
FILLED = 0.9  # of the bounding box
TAPER = 0.6  # of the lower third's width; an ideal triangle's upper third has a fifth of it


def shape_by_box(mask: np.ndarray) -> str | None:
    """Name the shape in a mask [H, W]; None where there is none."""
    if mask.mean() < MIN_AREA:
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if box.mean() > FILLED:
        return "square"
    third = max(1, len(box) // 3)
    return "triangle" if box[:third].mean() < TAPER * box[-third:].mean() else "circle"


def shape_of_video(masks: list[np.ndarray]) -> str | None:
    """The shape in more than half of a video's frames."""
    names = [shape_by_box(mask) for mask in masks]
    return next((name for name in set(names) if 2 * names.count(name) > len(names)), None)


def main(run: Path) -> None:
    """Print, for each group and format, the share of right shapes and the mean overlap with the ideal outline."""
    rows: dict[str, list[tuple[bool, float]]] = {}
    summary = json.loads((run / "adherence.json").read_text())
    for record in summary["records"] + summary.get("given", []):
        path, shape = Path(record["path"]), record["caption"].split()[2]
        frames = read_frames(path, start=0, count=probe(path).num_frames).numpy()
        masks = [mask_of(frame) for frame in frames]
        overlaps = [overlap(mask, ideal_mask(shape, mask)) if mask.any() else 0.0 for mask in masks]
        name = f"given {record['task']}" if "task" in record else group_of(record)
        rows.setdefault(name, []).append((shape_of_video(masks) == shape, float(np.mean(overlaps))))
    for name, judged in sorted(rows.items()):
        right, overlaps = zip(*judged, strict=True)
        print(f"{name:>18}  shape {np.mean(right):.2f}  overlap {np.mean(overlaps):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
