"""PixArt and STDiT against the published code: outputs, activations, gradients, keys and initial weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from opensora_repro.models import layers
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiTConfig
from opensora_repro.models.cross_attention import CrossAttention, WholeCaptions, lay_out
from opensora_repro.models.stdit import POSITION_TABLES, STDiT, STDiTBlock, pixart_xl_2, stdit_xl_2
from opensora_repro.weights.load import load_model_weights
from tests.golden import (
    Case,
    build_model,
    check_rule,
    hashed_model,
    hashed_tensor,
    load_case,
    model_config,
    module_outputs,
    reference_layout,
    relative_error,
    rms_error,
)

STDIT_CASES = [
    "stdit_base",
    "stdit_T1",
    "stdit_nonsquare_scaled",
    "stdit_maskholes_patch222",
    "stdit_fractional_t_maskrepeat",
    "stdit_nomask",
    "stdit_nosigma",
    "stdit_train_drop",
]
PIXART_CASES = ["pixart_image", "pixart_image_tpos", "pixart_video"]


def run_case(model: STDiT, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a case forward and backward; return the output and the gradients by their golden names."""
    x, y = case["in.x"].requires_grad_(), case["in.y"].requires_grad_()
    model.y_embedder.y_embedding.requires_grad_()  # a buffer, yet the reference's gradient reaches it
    drop = case["in.rand"] < model.cfg.class_dropout_prob if "in.rand" in case.tensors else None
    out = model(x, case["in.timestep"], y[:, 0], case.tensors.get("in.mask"), drop_text=drop)
    (out * case["gout"]).sum().backward()
    grads = {name: value.grad for name, value in (*model.named_parameters(), *model.named_buffers())}
    return out.detach(), grads | {"input.x": x.grad, "input.y": y.grad}


@pytest.mark.parametrize("checkpointing", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", STDIT_CASES + PIXART_CASES)
def test_model_case(golden_dir: Path, name: str, checkpointing: str) -> None:
    case = load_case(golden_dir, name)
    model = build_model(case)
    model.activation_checkpointing = checkpointing
    expected_acts = case.group("act")
    acts = module_outputs(model, list(expected_acts))
    out, grads = run_case(model, case)

    tolerances = case.info["tolerances"]
    assert out.dtype == torch.float32
    assert relative_error(out, case["out"]) <= tolerances["out_rel"]
    for key, expected in expected_acts.items():
        assert relative_error(reference_layout(key, acts[key]), expected) <= tolerances["out_rel"], key
    assert set(case.group("grad")) == set(case.info["grads"])
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key


def test_every_stdit_and_pixart_case_is_tested(golden_dir: Path) -> None:
    index = json.loads((golden_dir / "index.json").read_text())
    ours = {name for name, entry in index.items() if re.search(r"opensora\.(STDiT|PixArt)\b(?!MS)", entry["kind"])}
    assert ours - {"stdit_bf16"} == set(STDIT_CASES + PIXART_CASES)


def test_block_at_small_magnitudes(golden_dir: Path) -> None:
    """Inputs near 1e-3 make the LayerNorm's eps of 1e-6 visible."""
    case = load_case(golden_dir, "stdit_block_tiny")
    info = case.info["config"]
    block = STDiTBlock(STDiTConfig(hidden_size=info["hidden_size"], num_heads=info["num_heads"]))
    block.load_state_dict(case.group("param"))
    x = case["in.x"].requires_grad_()
    tokens = rearrange(x, "b (t s) d -> b t s d", t=info["d_t"])
    modulation = rearrange(case["in.t6"], "b (six d) -> six b 1 1 d", six=6)
    text, mask = unpack(case["in.y_packed"], case["in.y_lens"])
    table = rearrange(case["in.tpe"], "1 t d -> t 1 d")
    for key, temporal in (("out_tpe", table), ("out_notpe", None)):
        out = rearrange(block(tokens, text, modulation, mask, temporal), "b t s d -> b (t s) d")
        assert relative_error(out, case[key]) <= case.info["tolerances"]["out_rel"], key
        if key == "out_tpe":
            (out * case["gout"]).sum().backward(retain_graph=True)
            assert relative_error(x.grad, case["grad.input.x(out_tpe)"]) <= case.info["tolerances"]["grad_rel"]


def unpack(packed: Tensor, lengths: Tensor) -> tuple[Tensor, WholeCaptions]:
    """Turn the reference's packed captions [1, sum(lengths), D] into what our blocks read of padded ones."""
    text = nn.utils.rnn.pad_sequence(packed[0].split(lengths.tolist()), batch_first=True, padding_value=7.0)
    captions = lay_out(torch.arange(text.shape[1]) < lengths[:, None], len(lengths), text.device)
    return captions.take(text), captions


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_bf16_keeps_the_timestep(golden_dir: Path, how: str) -> None:
    """The published code rounds 999 to 1000 in bf16; ours must stay near the float32 run at the true timestep."""
    case = load_case(golden_dir, "stdit_bf16")
    model = build_model(Case(case.info | {"kind": "opensora.STDiT"}, case.tensors))
    inputs = case["in.x"], case["in.timestep"], case["in.y"][:, 0], case["in.mask"]
    with torch.no_grad():
        assert relative_error(model(*inputs), case["out_fp32"]) <= 1e-5
        if how == "bf16 weights":
            out = model.bfloat16()(*inputs)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(*inputs)
    noise = case.info["rms_rel_bf16_vs_fp32_rounded_t"]
    assert out.dtype == torch.float32
    assert rms_error(out, case["out_fp32"]) <= 2 * noise
    # and the rounding it avoids is larger than the noise, so the line above can fail
    assert rms_error(case["out_bf16"], case["out_fp32"]) > 2 * noise


# ---------------------------------------------------------------------------------------------------------------------
# Layers and tables


def test_embedders(golden_dir: Path) -> None:
    case = load_case(golden_dir, "layers")
    timestep = layers.TimestepEmbedder(48)
    timestep.load_state_dict(case.group("param.t_embedder"))
    assert relative_error(timestep(case["t_embedder.in"]), case["t_embedder.out"]) <= 2e-4

    caption = layers.CaptionEmbedder(20, 48, 6)
    caption.load_state_dict(case.group("param.caption_embedder"))
    text = case["caption_embedder.in"][:, 0]
    forced = case["caption_embedder.force_drop_ids"] == 1
    assert forced.any() and not forced.all()
    assert relative_error(caption(text), case["caption_embedder.out"][:, 0]) <= 1e-5
    assert relative_error(caption(text, forced), case["caption_embedder.out_forced"][:, 0]) <= 1e-5


@pytest.mark.parametrize("over", ["space", "time", "space_time"])
def test_attention(golden_dir: Path, over: str) -> None:
    case = load_case(golden_dir, "layers")
    attention = layers.Attention(48, 4, over=over)
    attention.load_state_dict(case.group("param.attention"))
    axis = "b n d -> b n 1 d" if over == "time" else "b n d -> b 1 n d"
    out = attention(rearrange(case["attention.in"], axis))
    assert relative_error(out, rearrange(case["attention.out"], axis)) <= 1e-5


def test_cross_attention(golden_dir: Path) -> None:
    case = load_case(golden_dir, "layers")
    attention = CrossAttention(48, 4)
    attention.load_state_dict(case.group("param.cross_attention"))
    x = rearrange(case["cross_attention.x"], "b n d -> b 1 n d")
    packed = case["cross_attention.y_packed"]
    text, mask = unpack(packed, case["cross_attention.lens"])
    assert relative_error(attention(x, text, mask)[:, 0], case["cross_attention.out"]) <= 1e-5
    assert relative_error(attention(x[:1], packed)[:, 0], case["cross_attention.out_x0_nomask"]) <= 1e-5


@pytest.mark.parametrize("name", ["patch122", "patch222"])
def test_patch_embedding(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, "layers")
    patch = layers.PatchEmbed3D((1 if name == "patch122" else 2, 2, 2), 4, 48)
    patch.load_state_dict(case.group(f"param.{name}"))
    for suffix in ("", "_odd"):
        tokens = rearrange(patch(case[f"{name}.in{suffix}"]), "b t s d -> b (t s) d")
        assert relative_error(tokens, case[f"{name}.out{suffix}"]) <= 1e-5


def test_final_layer_and_unpatchify(golden_dir: Path) -> None:
    case = load_case(golden_dir, "layers")
    final = layers.FinalLayer(48, 4, 8)
    final.load_state_dict(case.group("param.t2i_final"))
    out = final(rearrange(case["final.x_tiny"], "b n d -> b 1 n d"), case["final.c"])
    assert relative_error(out[:, 0], case["t2i_final.out"]) <= 1e-5

    patches = rearrange(case["unpatchify222.in"], "b (t s) d -> b t s d", t=2)
    assert torch.equal(
        layers.unpatchify(patches, (2, 2, 2), case["unpatchify222.out"].shape[2:]), case["unpatchify222.out"]
    )


def test_embedding_tables(golden_dir: Path) -> None:
    case = load_case(golden_dir, "embeddings")
    for table in case.info["tables"]:
        key, expected = table["key"], case[table["key"]]
        if table["fn"] == "timestep_embedding":
            got = layers.timestep_sinusoid(case["ts"], table["dim"], table["max_period"])
            assert got.dtype == torch.float32
            tolerance = 1e-4  # float32 angles near 1000, as the case's note says
        elif table["fn"] == "get_2d_sincos_pos_embed":
            size = table["grid_size"]
            rows, cols = (size, size) if isinstance(size, int) else size
            got = layers.spatial_positions(
                table["embed_dim"], rows, cols, scale=table["scale"], base_size=table["base_size"]
            )
            tolerance = case.info["tolerances"]["pos_abs"]
        else:
            got = layers.temporal_positions(table["embed_dim"], table["length"], scale=table["scale"])
            tolerance = case.info["tolerances"]["pos_abs"]
        assert got.shape == expected.shape, key
        assert (got - expected).abs().max().item() <= tolerance, key


def test_full_size_position_tables(golden_dir: Path) -> None:
    case = load_case(golden_dir, "embeddings")
    cpu, rows2d, rows1d = torch.device("cpu"), case["xl.pos2d.rows"], case["xl.pos1d.rows"]
    for key, side, scale in (("xl.pos2d.d1152.g16x16.s0.5", 16, 0.5), ("xl.pos2d.d1152.g32x32.s1", 32, 1.0)):
        table = layers.spatial_table(1152, side, side, scale, None, cpu, torch.float32)
        assert (table[rows2d] - case[key]).abs().max().item() <= 1e-6, key
    for key, frames, scale in (("xl.pos1d.d1152.n16.s1", 16, 1.0), ("xl.pos1d.d1152.n64.s2_3", 64, 2 / 3)):
        table = layers.temporal_table(1152, frames, scale, cpu, torch.float32)
        assert (table[rows1d, 0] - case[key]).abs().max().item() <= 1e-6, key


# ---------------------------------------------------------------------------------------------------------------------
# Keys, conversion, initial weights


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("keys_stdit_xl2_16x256x256", stdit_xl_2),
        ("keys_stdit_xl2_16x512x512", stdit_xl_2),
        ("keys_pixart_xl2_opensora_16x256", pixart_xl_2),
        ("keys_pixart_xl2_256_alpha", pixart_xl_2),
        ("keys_pixart_xl2_512_alpha", pixart_xl_2),
    ],
)
def test_published_keys(golden_dir: Path, name: str, build: type[STDiT]) -> None:
    info = load_case(golden_dir, name).info
    with torch.device("meta"):
        model = build()
    expected = {key: list(shape) for key, shape in info["shapes"].items() if key not in POSITION_TABLES}
    if "alpha" in name:  # an image model's patch kernel has no frame axis
        kernel = expected["x_embedder.proj.weight"]
        kernel.insert(2, 1)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert [key for key, _ in model.named_buffers()] == ["y_embedder.y_embedding"]
    assert sum(value.numel() for value in model.parameters()) == (759_620_768 if build is stdit_xl_2 else 610_856_096)


def test_published_pixart_file(golden_dir: Path, tmp_path: Path) -> None:
    """A PixArt-alpha .pth in our PixArt, and in an STDiT, whose frames then equal the image model's."""
    case = load_case(golden_dir, "orig_pixart_alpha")
    torch.save({"state_dict": case.group("param")}, tmp_path / "PixArt.pth")
    info = {"config": case.info["config"] | {"patch_size": [1, 2, 2]}}
    image_model = STDiT(model_config(info, temporal_attention=False))
    report = load_model_weights(image_model, tmp_path / "PixArt.pth")
    assert report.dropped == ("pos_embed",) and not report.inserted

    image = Case(case.info, dict(case.tensors))
    image.tensors["in.x"] = rearrange(case["in.x"], "b c h w -> b c 1 h w")
    image.tensors["gout"] = rearrange(case["gout"], "b c h w -> b c 1 h w")
    out, grads = run_case(image_model, image)
    grads = {key: value.squeeze(2) if value is not None and value.ndim == 5 else value for key, value in grads.items()}
    tolerances = case.info["tolerances"]
    for expected in (case["out"], case["out_opensora_pixart"]):
        assert relative_error(out[:, :, 0], expected) <= tolerances["out_rel"]
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key

    video_model = STDiT(model_config(info, temporal_attention=True))
    nn.init.ones_(video_model.blocks[0].attn_temp.proj.weight)  # insertion at zero is the loader's promise
    report = load_model_weights(video_model, tmp_path / "PixArt.pth")
    lacking = [key for key in case.info["opensora_stdit_load"]["missing"] if key not in POSITION_TABLES]
    assert sorted(report.inserted) == sorted(lacking)
    video = repeat(case["in.x"], "b c h w -> b c t h w", t=4)
    with torch.no_grad():
        out = video_model(video, case["in.timestep"], case["in.y"][:, 0], case["in.mask"])
    assert relative_error(out, case["out_opensora_stdit"]) <= tolerances["out_rel"]


@pytest.mark.parametrize("kind", ["STDiT", "PixArt"])
def test_initial_weights(golden_dir: Path, kind: str) -> None:
    reference = load_case(golden_dir, "init_freeze").info
    model = STDiT(model_config(reference, temporal_attention=kind == "STDiT"))
    rules = reference["init"][kind]
    state = model.state_dict()
    assert {re.sub(r"blocks\.\d+", "blocks.*", key) for key in state} == set(rules)
    for key, value in state.items():
        shape, rule = rules[re.sub(r"blocks\.\d+", "blocks.*", key)]
        assert list(value.shape) == shape, key
        check_rule(key, value, rule)


def test_trainable_parameters(golden_dir: Path) -> None:
    reference = load_case(golden_dir, "init_freeze").info
    model = STDiT(model_config(reference, temporal_attention=True))
    names = {
        re.sub(r"blocks\.\d+", "blocks.*", name) for name, value in model.named_parameters() if value.requires_grad
    }
    assert sorted(names) == sorted(reference["stdit_freeze"]["None"]["trainable"])


# ---------------------------------------------------------------------------------------------------------------------
# Full size


@pytest.fixture(scope="module")
def xl_stdit() -> STDiT:
    return hashed_model(STDiTConfig())


def check_xl(model: STDiT, case: Case, name: str) -> None:
    info = case.info
    state = model.state_dict()
    for key, samples in info["tensor_samples"].items():
        assert state[key].flatten()[: len(samples)].tolist() == pytest.approx(samples, rel=1e-6), key
    size, batch = info["config"]["input_size"], len(info["caption_lens"])
    latents = hashed_tensor(f"{name}.in.x", (batch, 4, *size))
    text = hashed_tensor(f"{name}.in.y", (batch, 1, 120, 4096))[:, 0]
    with torch.no_grad():
        out = model(latents, case["timestep"], text, case["mask"])
    assert relative_error(out, case["out"]) <= info["tolerances"]["fp32_out_rel"]


def with_config(model: STDiT, cfg: STDiTConfig) -> STDiT:
    """Return a model of another config that shares the weights of `model`: 3 GB need no second copy."""
    with torch.device("meta"):
        other = STDiT(cfg)
    keys = other.state_dict().keys()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key in keys}, assign=True)
    return other.eval()


LARGER = ("xl_pixart_1x32x32", "xl_stdit_16x32x32")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # 760 M parameters on whatever cores there are
@pytest.mark.parametrize(
    "name", ["xl_stdit_2x16x16", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LARGER)]
)
def test_full_size(golden_dir: Path, xl_stdit: STDiT, name: str) -> None:
    case = load_case(golden_dir, name)
    cfg = model_config(case.info, temporal_attention="stdit" in name)
    check_xl(with_config(xl_stdit, cfg), case, name)
