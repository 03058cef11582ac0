"""STDiT2 against the published code of Open-Sora 1.1: outputs, activations, gradients, keys and initial weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiT2Config
from opensora_repro.models.stdit2 import STDiT2, stdit2_b_2, stdit2_s_2, stdit2_xl_2
from tests.golden import (
    build_video_model,
    check_rule,
    check_video_case,
    load_case,
    load_recipe,
    recipe_model,
    relative_error,
    video_config,
    video_inputs,
)

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


def test_every_case_is_tested(golden_1_2_dir: Path) -> None:
    names = {path.stem for path in golden_1_2_dir.glob("stdit2_*.json")}
    assert names - {"stdit2_xl_depth1"} == set(CASES)


def test_full_width(golden_1_2_dir: Path) -> None:
    case, recipe = load_case(golden_1_2_dir, "stdit2_xl_depth1"), load_recipe(golden_1_2_dir)
    model = recipe_model(video_config(case.info), case, recipe)
    length = model.cfg.model_max_length
    case.tensors["in.y"] = torch.from_numpy(recipe.normal(case.info["seed"], "y", (1, 1, length, 4096)))
    inputs, named = video_inputs(case, model.cfg)
    with torch.no_grad():
        out = model(*inputs, **named)
    assert relative_error(out, case.tensors.get("out_clean", case["out"])) <= case.info["tolerances"]["out_rel"]


@pytest.mark.parametrize("name", CASES)
def test_bf16_errors(golden_1_2_dir: Path, name: str) -> None:
    case = load_case(golden_1_2_dir, name)
    model = build_video_model(case)
    inputs, named = video_inputs(case, model.cfg)
    with torch.no_grad():
        out = model.bfloat16()(*inputs, **named)
    assert 1e-4 < relative_error(out, case.tensors.get("out_clean", case["out"])) <= 0.012


def test_published_keys(golden_1_2_dir: Path) -> None:
    info = load_case(golden_1_2_dir, "keys_stdit2_xl2").info
    with torch.device("meta"):
        model = stdit2_xl_2()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == info["shapes"]
    assert [key for key, _ in model.named_buffers()] == info["buffers"]
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == info["frozen_parameters"]
    assert sum(value.numel() for value in model.parameters()) == info["n_parameters"]


@pytest.mark.parametrize("build", [stdit2_s_2, stdit2_b_2, stdit2_xl_2])
def test_parameters_are_as_many_as_is_said(build: type[STDiT2]) -> None:
    with torch.device("meta"):
        model = build()
    counted = sum(value.numel() for value in model.parameters())
    assert f"({counted:,} parameters)" in str(build.__doc__)


def test_initial_weights(golden_1_2_dir: Path) -> None:
    rules = load_case(golden_1_2_dir, "init_stdit2").info["init"]
    model = STDiT2(STDiT2Config(hidden_size=288, depth=1, num_heads=4, caption_channels=256, model_max_length=24))
    state = model.state_dict()
    assert state.keys() == rules.keys()
    for key, value in state.items():
        shape, rule = rules[key]
        assert list(value.shape) == shape, key
        check_rule(key, value, rule)


def test_the_size_is_split_in_three() -> None:
    with pytest.raises(ValueError, match=r"model\.hidden_size=1024 must be a multiple of 3"):
        STDiT2(STDiT2Config(hidden_size=1024))
