"""Film the demo's long videos: scenes of moving shapes joined by hard cuts, with a caption list beside them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from opensora_repro.demo.shapes import FORMATS, Scene, training_scenes
from opensora_repro.files import replacing

FPS = 24
FRAMES_A_SCENE = 24
SIZE = 96  # pixels of the longer side
CAPTION_COLUMNS = ("source", "start_frame", "end_frame", "caption")


def film(folder: Path, *, videos: int, seed: int) -> Path:
    """Write `videos` long mp4 files of each format, each showing every trained motion once; return the captions.

    A file's name says its number, counted over the formats in turn. Captions are CSV: a row names the source file, the
    frames [start, end) of the scene and the sentence. Finished files are kept.
    """
    from tqdm import tqdm

    from opensora_repro.data.write import write_video

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int, int, str]] = []
    pictures = list(FORMATS.values())
    for index in tqdm(range(videos * len(pictures)), desc="filming", unit="video"):
        path = folder / f"long_{index:02d}.mp4"
        scenes = list(training_scenes(1, seed=seed * 1000 + index, picture=pictures[index % len(pictures)]))
        rows += scene_rows(path.name, scenes)
        if not path.exists():
            frames = np.concatenate([scene.frames(count=FRAMES_A_SCENE, size=SIZE) for scene in scenes])
            write_video(path, frames, FPS)
    captions = folder / "captions.csv"
    write_rows(captions, rows)
    return captions


def scene_rows(source: str, scenes: list[Scene]) -> list[tuple[str, int, int, str]]:
    """One caption row a scene."""
    starts = range(0, len(scenes) * FRAMES_A_SCENE, FRAMES_A_SCENE)
    return [(source, start, start + FRAMES_A_SCENE, s.motion.caption) for start, s in zip(starts, scenes, strict=True)]


def write_rows(path: Path, rows: list[tuple[str, int, int, str]]) -> None:
    with replacing(path) as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CAPTION_COLUMNS)
        writer.writerows(rows)
