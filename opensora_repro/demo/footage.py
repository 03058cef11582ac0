"""Film the demo's long videos: scenes of moving shapes joined by hard cuts, with a caption list beside them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from opensora_repro.demo.shapes import FORMATS, Scene, training_scenes
from opensora_repro.files import replacing

FPS = 24
FRAMES_A_SCENE = 23  # of which every other makes the 12 of stage 3, all as far apart
SIZE = 96  # pixels of the longer side
CAPTION_COLUMNS = ("source", "start_frame", "end_frame", "caption")


def film(folder: Path, *, videos: int, returning: int, seed: int) -> Path:
    """Write long mp4 files, each showing every trained motion once: `videos` of each format, and `returning` square
    ones of shapes that come back; return the captions.

    A file's name ends with its number among its like. Captions are CSV: a row names the source file, the frames [start,
    end) of the scene and the sentence. Finished files are kept.
    """
    from tqdm import tqdm

    from opensora_repro.data.write import write_video

    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, int, int, str]] = []
    kinds = [(name.replace(":", "x"), picture, False) for name, picture in FORMATS.items()] * videos
    kinds += [("back", FORMATS["1:1"], True)] * returning
    for index, (kind, picture, returns) in enumerate(tqdm(kinds, desc="filming", unit="video")):
        path = folder / f"{kind}_{sum(earlier[0] == kind for earlier in kinds[:index]):02d}.mp4"
        scenes = list(training_scenes(1, seed=seed * 1000 + index, picture=picture, returns=returns))
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
