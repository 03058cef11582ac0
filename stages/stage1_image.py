"""Stage 1: an image model (PixArt) learns what things look like, from images or single frames with captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora_repro.config import Config, ConfigError
from opensora_repro.training.start import Stage
from stages._training import run_stage


def check(cfg: Config) -> None:
    if cfg.model.temporal_attention:
        raise ConfigError("model.temporal_attention = true: stage 1 trains images, set it to false")
    if cfg.data.num_frames != 1:
        raise ConfigError(f"data.num_frames = {cfg.data.num_frames}: stage 1 trains images, set it to 1")


STAGE = Stage("stage1_image", "text-to-image training", check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(STAGE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
