"""STDiT3 against the published code of Open-Sora 1.2: outputs, activations, gradients, keys and initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_repro.models.config import ACTIVATION_CHECKPOINTING
from opensora_repro.models.stdit3 import STDiT3
from tests.golden import build_video_model, check_video_case, load_case

CASES = [
    "stdit3_base",
    "stdit3_xmask_odd",
    "stdit3_image",
    "stdit3_cfg_maskrepeat",
    "stdit3_noqknorm_holes",
    "stdit3_skip_y",
    "stdit3_long_time",
    "stdit3_patch222_nosigma",
    "stdit3_train_drop",
]


@pytest.mark.parametrize("checkpointing", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", CASES)
def test_model_case(golden_1_2_dir: Path, name: str, checkpointing: str) -> None:
    case = load_case(golden_1_2_dir, name)
    model = build_video_model(case)
    assert isinstance(model, STDiT3)
    model.activation_checkpointing = checkpointing
    check_video_case(model, case)
