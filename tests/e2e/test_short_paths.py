"""How many of our files a reader opens to follow one batch through a training step, or one prompt to its file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import opensora_repro
from opensora_repro.data import dataset
from opensora_repro.sampling.run import SamplingRun
from opensora_repro.training.loop import Trainer
from stages import stage2_video
from tests.sample_home import PROMPTS, sample
from tests.training_world import make_world

LIBRARY = Path(opensora_repro.__file__).parent
MOST_FILES = 24


class Watch:
    """Notes the files of the library whose functions are called while a method runs."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def method(self, method: Callable[..., Any], when: Callable[[Any], bool] = lambda _: True) -> Callable[..., Any]:
        """`when` looks at the object whose method it is."""

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                self.seen.add(frame.f_code.co_filename)

        def watched(own: Any, *given: Any) -> Any:
            if not when(own):
                return method(own, *given)
            sys.setprofile(note)
            try:
                return method(own, *given)
            finally:
                sys.setprofile(None)

        return watched

    def check(self, *known: str) -> None:
        """Prints the list when it is too long, or when what is `known` to be on the path was not seen."""
        files = sorted(str(Path(name).relative_to(LIBRARY)) for name in self.seen if Path(name).is_relative_to(LIBRARY))
        shown = f"{len(files)} files:\n" + "\n".join(files)
        assert set(known) <= set(files), shown
        assert len(files) <= MOST_FILES, shown


@pytest.mark.parametrize("samples", ["cached latents", "decoded clips"])
def test_a_batch_passes_through_few_files(tmp_path: Path, samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world, watch = make_world(tmp_path), Watch()
    dataset.names_a_side.cache_clear()  # as if no caption had been looked at before
    # The first step also fills tables that are kept.
    monkeypatch.setattr(Trainer, "_step", watch.method(Trainer._step, when=lambda trainer: trainer.state.step > 0))
    cache = {"data__cache": str(tmp_path / "cache"), "data__draws": 1} if samples == "cached latents" else {}
    arguments = world.arguments(tmp_path / "run", "clips", train__steps=3, **cache)
    assert stage2_video.main([str(tmp_path / "empty.toml"), *arguments]) == 0
    watch.check("training/loop.py", "models/stdit.py", "data/cache.py" if cache else "data/video.py")


def test_a_prompt_passes_through_few_files(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the weights, which are loaded on the way, to the file and its record."""
    watch = Watch()
    monkeypatch.setattr(SamplingRun, "_sample_share", watch.method(SamplingRun._sample_share))
    (video,) = sample(home / "flow", tmp_path, prompts=PROMPTS[:1])
    assert video.any()
    watch.check("weights/load.py", "sampling/generate.py", "models/stdit.py", "data/write.py")
