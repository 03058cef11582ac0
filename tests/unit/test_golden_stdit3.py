"""STDiT3 against the published code of Open-Sora 1.2: outputs, activations, gradients, keys and initial weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn

from opensora_repro.models import layers
from opensora_repro.models.captioned import Block
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiT3Config
from opensora_repro.models.cross_attention import CrossAttention, lay_out
from opensora_repro.models.stdit3 import STDiT3, stdit3_3b_2, stdit3_b_2, stdit3_l_2, stdit3_s_2, stdit3_xl_2
from tests.golden import (
    Case,
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


def test_full_width(golden_1_2_dir: Path) -> None:
    case, recipe = load_case(golden_1_2_dir, "stdit3_xl_depth1"), load_recipe(golden_1_2_dir)
    model = recipe_model(video_config(case.info), case, recipe)
    case.tensors["in.y"] = torch.from_numpy(recipe.normal(case.info["seed"], "y", (1, 1, 300, 4096)))
    inputs, named = video_inputs(case, model.cfg)
    with torch.no_grad():
        assert relative_error(model(*inputs, **named), case["out_clean"]) <= case.info["tolerances"]["out_rel"]


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_bf16_errors(golden_1_2_dir: Path, name: str, how: str) -> None:
    """At most 1.2 % of the largest value; the published code's is 3.5 % in the worst of its two cases."""
    case = load_case(golden_1_2_dir, name)
    model = build_video_model(case)
    inputs, named = video_inputs(case, model.cfg)
    if how == "bf16 weights":
        model.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = model(*inputs, **named)
    assert out.dtype == torch.float32
    assert 1e-4 < relative_error(out, case.tensors.get("out_clean", case["out"])) <= 0.012
    published = load_case(golden_1_2_dir, "stdit3_bf16")
    if name in published.info["cases"]:
        mask = case.tensors.get("in.x_mask", torch.ones(out.shape[0], out.shape[2], dtype=torch.bool))
        theirs = (x.float().transpose(1, 2)[mask] for x in (published[f"out.{name}.bf16"], case["out"]))
        assert relative_error(*theirs) > 0.012


# ---------------------------------------------------------------------------------------------------------------------
# Layers


@pytest.fixture(scope="module")
def layers12(golden_1_2_dir: Path) -> Case:
    return load_case(golden_1_2_dir, "layers12")


def test_norms_near_zero(layers12: Case) -> None:
    """The only place where eps shows."""
    norm = layers.RMSNorm(12)
    norm.load_state_dict(layers12.group("param.rms"))
    assert relative_error(norm(layers12["in.rms"])[-2:], layers12["out.rms"][-2:]) <= 1e-5
    assert relative_error(norm(layers12["in.rms"]), layers12["out.rms"]) <= 1e-5


def test_positions_in_pixels(layers12: Case) -> None:
    for i, told in enumerate(layers12.info["shapes"]["pos_embed"]):
        model = STDiT3(STDiT3Config(hidden_size=24, depth=1, num_heads=2, input_sq_size=told["input_sq_size"]))
        rows, cols = told["tokens_h"], told["tokens_w"]
        size = (torch.tensor([float(told[side]), 7.0]) for side in ("height", "width"))  # the first picture's
        table = model._add_places(torch.zeros(2, 1, rows * cols, 24), rows, *size)[:1, 0]
        assert (table - layers12[f"out.pos_embed.{i}"]).abs().max() <= 2e-4


def test_sinusoid_and_sizes(layers12: Case) -> None:
    sinusoid = layers.timestep_sinusoid(layers12["in.sinusoid"], 256)
    assert (sinusoid - layers12["out.sinusoid"]).abs().max() <= 2e-4
    embedder = layers.SizeEmbedder(8)
    embedder.load_state_dict(layers12.group("param.size"))
    assert relative_error(embedder(layers12["in.size"]), layers12["out.size"]) <= 1e-5
    assert relative_error(embedder(layers12["in.size"][:, 0], 4), layers12["out.size_tiled"]) <= 1e-5
    with pytest.raises(ValueError, match="sizes of 2 rows cannot be repeated over 3 samples"):
        embedder(layers12["in.size"], 3)


@pytest.mark.parametrize("in_place", [False, True])
def test_rotary_and_attention(layers12: Case, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`in_place`: as the kernel for short videos takes queries and keys."""
    table = layers.rotary_table(12, 5, torch.device("cpu"))
    assert relative_error(layers.rotate(layers12["in.rope"], table[:, 0]), layers12["out.rope"]) <= 1e-5
    monkeypatch.setattr(layers.ops, "attends_in_place", lambda x: in_place)
    monkeypatch.setattr(layers.Attention, "attend", staticmethod(layers.eager.time_attention))
    x = rearrange(layers12["in.attn"], "b t d -> b t 1 d")
    for key, first, rotary in (("attn", False, table), ("attn_rope_first", True, table), ("attn_no_rope", False, None)):
        attention = layers.Attention(24, 2, over="time", qk_norm=True, rotary_first=first)
        attention.load_state_dict(layers12.group("param.attn"))
        assert relative_error(attention(x, rotary)[:, :, 0], layers12[f"out.{key}"]) <= 1e-5, key


def test_cross_attention_of_packed_captions(layers12: Case) -> None:
    attention = CrossAttention(24, 2)
    attention.load_state_dict(layers12.group("param.cross"))
    lengths = layers12.info["shapes"]["cross_lens"]
    text = nn.utils.rnn.pad_sequence(layers12["in.cross_y"][0].split(lengths), batch_first=True)
    captions = lay_out(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], 2, text.device)
    x = rearrange(layers12["in.attn"], "b n d -> b 1 n d")
    assert relative_error(attention(x, captions.take(text), captions)[:, 0], layers12["out.cross"]) <= 1e-5


def test_a_block_and_the_final_layer_with_given_frames(layers12: Case) -> None:
    lengths = layers12.info["shapes"]["cross_lens"]
    text = nn.utils.rnn.pad_sequence(layers12["in.cross_y"][0].split(lengths), batch_first=True)
    captions = lay_out(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], 2, text.device)
    x = rearrange(layers12["in.block_x"], "b (t s) d -> b t s d", t=5)
    generated, table = layers12["in.block_x_mask"], layers.rotary_table(12, 5, x.device)
    cfg = STDiT3Config(hidden_size=24, num_heads=2)
    for key, over, mask in (
        ("temporal", "time", generated),
        ("temporal_nomask", "time", None),
        ("spatial", "space", generated),
    ):
        block = Block(cfg, layers.Attention(24, 2, over=over, qk_norm=True))
        block.load_state_dict(layers12.group("param.block"))
        vectors = [layers12["in.block_t"]] + [layers12["in.block_t0"]] * (mask is not None)
        modulation = layers.by_vector(layers.of_frames(vectors, mask), 6)
        out = rearrange(block(x, captions.take(text), modulation, captions, table), "b t s d -> b (t s) d")
        assert relative_error(out, layers12[f"out.block_{key}"]) <= 1e-5, key

    final = layers.FinalLayer(24, 4, 8)
    final.load_state_dict(layers12.group("param.final"))
    vectors = [layers12["in.final_t"], layers12["in.final_t0"]]
    for key, told in (("final", layers.of_frames(vectors, generated)), ("final_nomask", vectors[0])):
        out = rearrange(final(x, told), "b t s d -> b (t s) d")
        assert relative_error(out, layers12[f"out.{key}"]) <= 1e-5, key


# ---------------------------------------------------------------------------------------------------------------------
# Keys and initial weights


def test_published_keys(golden_1_2_dir: Path) -> None:
    info = load_case(golden_1_2_dir, "keys_stdit3_xl2").info
    with torch.device("meta"):
        model = stdit3_xl_2()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == info["shapes"]
    assert [key for key, _ in model.named_buffers()] == info["buffers"]
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == info["frozen_parameters"]
    assert sum(value.numel() for value in model.parameters()) == info["n_parameters"]


@pytest.mark.parametrize("build", [stdit3_s_2, stdit3_b_2, stdit3_l_2, stdit3_xl_2, stdit3_3b_2])
def test_parameters_are_as_many_as_is_said(build: type[STDiT3]) -> None:
    with torch.device("meta"):
        model = build()
    counted = sum(value.numel() for value in model.parameters())
    assert f"({counted:,} parameters)" in str(build.__doc__)


def test_what_is_trained(golden_1_2_dir: Path) -> None:
    counts = load_case(golden_1_2_dir, "keys_diff_pixart_to_stdit3").info["trainable_parameters"]
    for key in ("freeze_y_embedder", "only_train_temporal"):
        with torch.device("meta"):
            model = stdit3_xl_2(**{key: True})
        assert sum(value.numel() for value in model.parameters() if value.requires_grad) == counts[key]


def test_initial_weights(golden_1_2_dir: Path) -> None:
    rules = load_case(golden_1_2_dir, "init_stdit3").info["init"]
    model = STDiT3(STDiT3Config(hidden_size=288, depth=1, num_heads=4, caption_channels=256, model_max_length=24))
    state = model.state_dict()
    assert state.keys() == rules.keys()
    for key, value in state.items():
        shape, rule = rules[key]
        assert list(value.shape) == shape, key
        check_rule(key, value, rule)


def test_temporal_blocks_add_nothing_at_first() -> None:
    model = STDiT3(STDiT3Config(hidden_size=24, depth=2, num_heads=2, caption_channels=8, model_max_length=5))
    x = torch.randn(2, 3, 4, 24)
    captions = lay_out(torch.ones(2, 5), 2, x.device)
    for block in model.temporal_blocks:
        out = block(
            x, torch.randn(2, 5, 24), torch.randn(6, 2, 1, 1, 24), captions, layers.rotary_table(12, 3, x.device)
        )
        assert torch.equal(out, x)


def test_every_case_is_tested(golden_1_2_dir: Path) -> None:
    names = {path.stem for path in golden_1_2_dir.glob("stdit3_*.json")}
    assert names - {"stdit3_bf16", "stdit3_xl_depth1"} == set(CASES)
    assert all(re.match("stdit3_", name) for name in names)
