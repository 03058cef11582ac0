"""STDiT2 against the published code of Open-Sora 1.1: outputs, activations, gradients, keys and initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from opensora_repro.models.config import ACTIVATION_CHECKPOINTING
from opensora_repro.models.stdit2 import STDiT2
from tests.golden import build_video_model, check_video_case, load_case

CASES = [
    "stdit2_base",
    "stdit2_xmask_odd",
    "stdit2_image",
    "stdit2_noqknorm_cfg",
    "stdit2_newnorm",
    "stdit2_train_drop",
]


@pytest.mark.parametrize("checkpointing", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", CASES)
def test_model_case(golden_1_2_dir: Path, name: str, checkpointing: str) -> None:
    case = load_case(golden_1_2_dir, name)
    model = build_video_model(case)
    assert isinstance(model, STDiT2)
    model.activation_checkpointing = checkpointing
    check_video_case(model, case)
