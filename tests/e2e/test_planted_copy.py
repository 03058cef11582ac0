"""A clip that a run has learned by heart is found in its samples, and nothing in those of a run without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from opensora_repro.data.write import write_video
from opensora_repro.demo.shapes import training_scenes
from stages import evaluate, stage2_video
from tests.frames import write_manifest

REPO = Path(__file__).parents[2]
TIMES, PLANTED = 500, 5  # as often in the manifest, the clip of this number


def film(folder: Path, takes: int, *, seed: int) -> pd.DataFrame:
    """The demo's scenes, so many takes of each caption."""
    folder.mkdir()
    rows = []
    for number, scene in enumerate(training_scenes(takes, seed=seed)):
        path = folder / f"{number}.mp4"
        write_video(path, scene.frames(count=12, size=96), 8)
        rows.append({"id": f"{folder.name}-{number}", "path": str(path), "caption": scene.motion.caption,
                     "num_frames": 12, "fps": 8.0, "height": 96, "width": 96})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.exhaustive
@pytest.mark.parametrize("times", [TIMES, 1])
def test_a_planted_copy_is_found_and_nothing_else(tmp_path: Path, times: int) -> None:
    clips = film(tmp_path / "clips", 2, seed=0)
    copies = clips.iloc[[PLANTED] * (times - 1)].assign(id=[f"copy-{number}" for number in range(times - 1)])
    write_manifest(pd.concat([clips, copies]), tmp_path / "clips.parquet")
    write_manifest(film(tmp_path / "held", 1, seed=1), tmp_path / "held.parquet")
    changes = {
        "run.dir": tmp_path / "run", "data.manifest": tmp_path / "clips.parquet", "data.flip": "false",
        "data.val_manifest": tmp_path / "held.parquet", "data.cache": tmp_path / "cache", "data.num_workers": 0,
        "vae.path": REPO / "checkpoints/demo/vae", "text.path": REPO / "checkpoints/demo/text",
        "train.steps": 1500, "optim.decay_steps": 500, "sample.every": 0, "validation.every": 0,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in changes.items()]
    assert stage2_video.main([str(REPO / "configs/demo/scaling.toml"), *words]) == 0
    given = ["--manifest", str(tmp_path / "held.parquet"), "--out", str(tmp_path / "out"), "--levels", "0.5"]
    assert evaluate.main([str(tmp_path / "run"), *given, "--clips", "62", "--samples", "62"]) == 0
    (file,) = tmp_path.glob("out/*/nearest.json")
    lines: list[dict[str, Any]] = json.loads(file.read_text())
    found = [(line["training_clip"], line["prompt"], line["near_again"]) for line in lines if line["memorised"]]
    assert found == ([(clips.id[PLANTED], clips.caption[PLANTED], 8)] if times > 1 else []), lines[:3]
