"""Stage 3: a video model goes on with fewer, better clips, at more frames and higher resolution."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora_repro.config import Config, ConfigError
from opensora_repro.planning.positions import describe_rescaling, source_config
from opensora_repro.training.start import Stage
from stages._training import run_stage

if TYPE_CHECKING:
    from opensora_repro.models.captioned import CaptionedModel
    from opensora_repro.weights.load import LoadReport


def check(cfg: Config) -> None:
    if not cfg.model.temporal_attention:
        raise ConfigError("model.temporal_attention = false: stage 3 trains video, set it to true")
    if not cfg.init.weights:
        raise ConfigError("init.weights is not set: stage 3 goes on from a stage 2 run, name its folder")


def check_start(model: CaptionedModel, cfg: Config, report: LoadReport | None, stride: int) -> Sequence[str]:
    return describe_rescaling(cfg, source_config(cfg.init.weights), stride)


STAGE = Stage("stage3_hq", "high-quality video training", check, check_start, takes_image_models=False)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(STAGE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
