"""How many of our files a reader opens to follow one batch through a training step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import opensora_repro
from opensora_repro.training.loop import Trainer
from stages import stage2_video
from tests.training_world import make_world

LIBRARY = Path(opensora_repro.__file__).parent
MOST_FILES = {"cached latents": 24, "decoded clips": 31}  # the latter are read, cropped and encoded as well


@pytest.mark.parametrize("samples", MOST_FILES)
def test_a_batch_passes_through_few_files(tmp_path: Path, samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    seen: set[str] = set()
    step = Trainer._step

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            seen.add(frame.f_code.co_filename)

    def watched(self: Trainer) -> None:
        if self.state.step != 1:  # the first one also fills tables that are kept
            return step(self)
        sys.setprofile(note)
        try:
            step(self)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Trainer, "_step", watched)
    cache = {"data__cache": str(tmp_path / "cache"), "data__draws": 1} if samples == "cached latents" else {}
    arguments = world.arguments(tmp_path / "run", "clips", train__steps=3, **cache)
    assert stage2_video.main([str(tmp_path / "empty.toml"), *arguments]) == 0
    files = sorted(str(Path(name).relative_to(LIBRARY)) for name in seen if Path(name).is_relative_to(LIBRARY))
    print(f"{samples}: {len(files)} files: {', '.join(files)}")
    assert "training/loop.py" in files and "models/stdit.py" in files
    assert len(files) <= MOST_FILES[samples], files
