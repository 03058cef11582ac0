"""What differs between the stages: what a config must hold, and what is checked once the first weights are in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opensora_repro.config import Config

if TYPE_CHECKING:
    from opensora_repro.models.stdit import STDiT
    from opensora_repro.weights.load import LoadReport


def no_start_check(model: STDiT, cfg: Config, report: LoadReport | None, stride: int) -> Sequence[str]:
    return ()


@dataclass(frozen=True)
class Stage:
    name: str  # the runner's module, "stage1_image"
    title: str  # a few words for people
    check: Callable[[Config], None]  # raises ConfigError
    # After the initial weights are loaded, at a run's first start alone; returns lines to print, raises on a fault.
    # Takes the model, the config, what was loaded (None: nothing) and the autoencoder's stride in pixels.
    check_start: Callable[[STDiT, Config, LoadReport | None, int], Sequence[str]] = no_start_check
    takes_image_models: bool = True  # whether `init.weights` may be an image model's
