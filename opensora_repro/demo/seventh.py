"""Clips of a colour that the demo does not train on, for an adapter that teaches it to the finished model."""

from __future__ import annotations

from pathlib import Path

from opensora_repro.demo.footage import FPS, FRAMES_A_SCENE, SIZE
from opensora_repro.demo.shapes import DIRECTIONS, FORMATS, OTHER_COLOURS, SHAPES, Motion, draw_scene, pixels

TAKES = 5  # of each of the twelve motions: 60 clips
# Of stage 3, trained on them and on as many of its own, without which the six colours are forgotten
SETTINGS = {"lora.rank": 8, "optim.lr": "2e-3", "optim.decay_steps": 200, "train.steps": 300, "checkpoint.every": 300,
            "validation.every": 300, "sample.every": 300}  # fmt: skip


def motions_of(colour: str) -> list[Motion]:
    """Every motion of one of OTHER_COLOURS."""
    assert colour in OTHER_COLOURS
    return [Motion(colour, shape, direction) for shape in SHAPES for direction in DIRECTIONS]


def film_clips(folder: Path, colour: str, known: Path, seed: int = 0) -> Path:
    """Write TAKES square clips of each motion of a colour; return a manifest of them and of as many of `known`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from opensora_repro.data.manifest import read_manifest, write_manifest
    from opensora_repro.data.write import write_video

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(seed), []
    width, height = pixels(FORMATS["1:1"], SIZE)
    for number, motion in enumerate(motions_of(colour) * TAKES):
        path = folder / f"{number:02d}.mp4"
        write_video(path, draw_scene(motion, rng).frames(count=FRAMES_A_SCENE, size=SIZE), FPS)
        rows.append({"id": f"{colour}-{number:02d}", "path": str(path.resolve()), "caption": motion.caption,
                     "num_frames": FRAMES_A_SCENE, "fps": float(FPS), "height": height, "width": width})  # fmt: skip
    clips = read_manifest(known)
    clips = clips.filter(pc.and_(pc.greater(clips["num_frames"], 1), pc.equal(clips["width"], clips["height"])))
    for number in rng.permutation(len(clips))[: len(rows)]:
        rows.append({key: clips[key][int(number)].as_py() for key in rows[0]})
    write_manifest(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"
