"""Decoding in tiles stays within the planner's figure: resident memory of real processes, each with one clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import TINY_OPEN_SORA, TINY_VIDEO_VAES, make_tiny_video_vae

OPEN_SORA = "VideoAutoencoderPipeline"
NARROW: dict[str, tuple[int, int, int, dict[str, Any]]] = {  # frames, tile, tiles decoded, what makes a class quick
    OPEN_SORA: (129, 128, 3, {}),
    "AutoencoderKLLTXVideo": (129, 256, 28, {}),  # all
    "AutoencoderKLWan": (129, 128, 3, {"base_dim": 2}),
    "AutoencoderKLCogVideoX": (129, 128, 3, {"block_out_channels": (2,) * 4}),
    "AutoencoderKLHunyuanVideo": (129, 128, 3, {"block_out_channels": (2,) * 4}),
    "AutoencoderKLMochi": (127, 128, 3, {}),
}
GIB = 2**30


def measure(folder: Path, *sizes: int) -> dict[str, Any]:
    words = [sys.executable, "-m", "tests.decoding_memory", str(folder), *map(str, sizes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    shown = [f"{found[name] / GIB:.2f} GiB" for name in ("peak", "planned")]
    print(f"{folder.name} {sizes}: {shown[0]} at most, planned {shown[1]}; after tiles {found['after']}")
    return found


def check(found: dict[str, Any]) -> None:
    """Within the figure, and flat: later tiles need what the second left, but for what lies scattered."""
    assert found["peak"] <= found["planned"]
    assert max(found["after"]) <= 1.15 * found["after"][1]


def test_a_small_clip_in_tiles(tmp_path: Path) -> None:
    check(measure(make_tiny_video_vae(tmp_path / OPEN_SORA, OPEN_SORA), 17, 192, 320, 128))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", NARROW)
def test_129_frames_of_720p(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each class, narrow: the pixels are most of it."""
    frames, tile, tiles, narrower = NARROW[kind]
    if kind != OPEN_SORA:
        monkeypatch.setitem(TINY_VIDEO_VAES, kind, TINY_VIDEO_VAES[kind] | narrower)
    check(measure(make_tiny_video_vae(tmp_path / kind, kind), frames, 720, 1280, tile, tiles))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["AutoencoderKLWan", OPEN_SORA])
def test_first_tiles_at_published_widths(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random weights: the feature maps are most of it."""
    with torch.random.fork_rng(devices=[]):
        if kind == OPEN_SORA:
            for name in ("vae_2d", "vae_temporal"):
                monkeypatch.setitem(TINY_OPEN_SORA, name, {})
        else:
            monkeypatch.setitem(TINY_VIDEO_VAES, kind, {})
        check(measure(make_tiny_video_vae(tmp_path / kind, kind), 17, 720, 1280, 128, 3))
