"""Stage 1: an image model learns what things look like, from images or single frames with captions.

PixArt does; STDiT2 and STDiT3 do, too, whose pictures are clips of one frame.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from opensora_repro.config import Config, ConfigError
from opensora_repro.training.start import Stage
from stages._training import run_stage


def check(cfg: Config) -> None:
    # What came after STDiT sees pictures as clips of one frame, and is trained on them as it is.
    if cfg.model.architecture == "stdit" and cfg.model.temporal_attention:
        raise ConfigError("model.temporal_attention = true: stage 1 trains images, set it to false")
    for size in cfg.data.buckets or (cfg.data,):
        if size.num_frames != 1:
            name = "data.buckets: num_frames" if cfg.data.buckets else "data.num_frames"
            raise ConfigError(f"{name} = {size.num_frames}: stage 1 trains images, set it to 1")


STAGE = Stage("stage1_image", "text-to-image training", check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(STAGE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
