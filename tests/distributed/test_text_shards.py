"""A T5 encoder whose weights are spread over processes (`text.shard`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_text
from tests.training_world import finish, start_processes


@pytest.mark.parametrize("processes", [2, 4])
def test_spread_weights_make_the_same_embeddings(tmp_path: Path, processes: int) -> None:
    """However many captions each process has, and in how many calls; between them each holds its share alone."""
    commands = start_processes("tests.text_shares", [str(make_tiny_text(tmp_path / "text"))], processes, tmp_path)
    finish(commands)
    ranks = [json.loads(command.out.splitlines()[-1]) for command in commands]
    for rank, found in enumerate(ranks):
        for dtype, share in found.items():
            assert share["calls"] == 2 * rank
            assert share["difference"] == 0, (rank, dtype)  # the same numbers meet the same kernels
            assert share["held"] <= 1.1 * share["whole"] / processes, (rank, dtype, share)
    for dtype in ranks[0]:
        assert sum(found[dtype]["held"] for found in ranks) >= ranks[0][dtype]["whole"]
