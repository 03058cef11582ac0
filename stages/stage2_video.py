"""Stage 2: temporal attention is inserted into an image model at zero, and learns motion from captioned clips."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opensora_repro.config import Config, ConfigError
from opensora_repro.training.start import Stage
from stages._training import run_stage

if TYPE_CHECKING:
    from opensora_repro.models.captioned import CaptionedModel
    from opensora_repro.weights.load import LoadReport


def check(cfg: Config) -> None:
    if not cfg.model.temporal_attention:
        raise ConfigError("model.temporal_attention = false: stage 2 trains video, set it to true")


def check_start(model: CaptionedModel, cfg: Config, report: LoadReport | None, stride: int) -> Sequence[str]:
    """An STDiT made from an image model must still be that image model on every frame.

    Its successors are not: they norm queries and keys, and the image model does not.
    """
    if report is None or not report.inserted_temporal_attention or cfg.model.architecture != "stdit":
        return ()
    from opensora_repro.data.buckets import buckets_of
    from opensora_repro.weights.insertion import assert_equals_image_model

    difference = assert_equals_image_model(model)
    where = "frame" if model.cfg.patch_size[0] == 1 else "still clip"
    lines = [f"temporal attention inserted: on every {where} the video model is the image model (to {difference:.1e})"]
    if any(bucket.height != bucket.width for bucket in buckets_of(cfg)):
        lines.append("note: PixArt stretches positions of frames that are not square, STDiT does not")
    return lines


STAGE = Stage("stage2_video", "video training", check, check_start)


def main(argv: Sequence[str] | None = None) -> int:
    return run_stage(STAGE, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
