"""A T5 encoder whose weights are spread over processes (`text.shard`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.tiny_models import make_tiny_text
from tests.training_world import finish, losses, make_world, newest_tensors, start_processes


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_spread_weights_make_the_same_embeddings(tmp_path: Path, processes: int) -> None:
    """However many captions each process has, and in how many calls; between them each holds its share alone."""
    commands = start_processes("tests.text_shares", [str(make_tiny_text(tmp_path / "text"))], processes, tmp_path)
    finish(commands)
    ranks = [json.loads(command.out.splitlines()[-1]) for command in commands]
    for rank, found in enumerate(ranks):
        for dtype, share in found.items():
            assert share["calls"] == 2 * rank
            assert share["difference"] == 0, (rank, dtype)  # the same numbers meet the same kernels
            assert 1 <= share["gathered"] / share["part"] <= 1.2  # one block, and what it computes
            assert share["held"] <= 1.1 * share["whole"] / processes, (rank, dtype, share)
    for dtype in ranks[0]:
        assert sum(found[dtype]["held"] for found in ranks) >= ranks[0][dtype]["whole"]


def test_a_cache_is_filled_as_one_process_would(tmp_path: Path) -> None:
    """Of 7 clips one cannot be read, and 3 are held out: no process has as many to encode as the other."""
    world = make_world(tmp_path / "world")
    frame = pd.read_parquet(world.manifest("clips"))
    frame["path"] = [str(world.root / path) for path in frame["path"]]
    frame.loc[2, "path"] = str(tmp_path / "absent.mp4")
    frame.to_parquet(tmp_path / "clips.parquet")

    def run(name: str, processes: int, **changes: object) -> Path:
        given = {
            "data__manifest": str(tmp_path / "clips.parquet"),
            "data__max_bad_fraction": 0.5,
            "data__draws": 1,
            "data__cache": str(tmp_path / f"{name}-cache"),
            "data__val_manifest": str(world.manifest("val")),
            "validation__every": 3,
            "train__steps": 3,
            "optim__eps": 1e-6,  # AdamW makes whole steps of rounding errors where a gradient is nought
            "train__batch_size": 4 // processes,
            **changes,
        }
        arguments = [str(world.root / "empty.toml"), *world.arguments(tmp_path / name, "clips", **given)]
        finish(start_processes("stages.stage2_video", arguments, processes, tmp_path / f"{name}-log"))
        return tmp_path / name

    shared, whole = run("shared", 2, text__shard=True), run("whole", 1)
    np.testing.assert_allclose(losses(shared), losses(whole), rtol=1e-5)
    weights, expected = newest_tensors(shared), newest_tensors(whole)
    for key in expected:
        assert np.linalg.norm(weights[key] - expected[key]) <= 1e-5 * np.linalg.norm(expected[key]), key
    validations = [json.loads((path / "validation.jsonl").read_text())["losses"] for path in (shared, whole)]
    np.testing.assert_allclose(validations[0], validations[1], rtol=1e-5)
