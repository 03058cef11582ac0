"""DiT and Latte against the published code: outputs, activations, gradients, keys, initial weights; and beyond it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.config import DiffusionConfig
from opensora_repro.diffusion.samplers import LatentSampler, guided_model
from opensora_repro.models.config import DiTConfig
from opensora_repro.models.dit import POSITION_TABLES, DiT, dit_xl_2, latte_xl_2
from tests.golden import (
    Case,
    dit_config,
    hashed_model,
    hashed_tensor,
    load_case,
    module_outputs,
    reference_layout,
    relative_error,
)
from tests.unit.test_golden_models import check_rule

CASES = ["dit_label_image", "dit_text_video", "dit_patch222", "latte_label", "latte_text"]
TINY = DiTConfig(hidden_size=48, depth=2, num_heads=4, num_classes=10)
LATTE = replace(TINY, factorised=True)
TEXT = replace(TINY, condition="text", caption_channels=16)


def run_case(model: DiT, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a case forward and backward; return the output and the gradients by their golden names."""
    x, y = case["in.x"].requires_grad_(), case["in.y"]
    if y.is_floating_point():
        y = rearrange(y.requires_grad_(), "b 1 1 c -> b 1 c")
    out = model(x, case["in.timestep"], y)
    (out * case["gout"]).sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    return out.detach(), grads | {"input.x": x.grad, "input.y": case["in.y"].grad}


def layout(model: DiT, name: str, value: Tensor) -> Tensor:
    """Lay one of our activations out as the reference's; Latte's blocks see frames or places as samples."""
    block = re.fullmatch(r"blocks\.(\d+)", name)
    if not block or not model.cfg.factorised:
        return reference_layout(name, value)
    return rearrange(value, "b t s d -> (b s) t d" if int(block[1]) % 2 else "b t s d -> (b t) s d")


@pytest.mark.parametrize("name", CASES)
def test_model_case(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    model = DiT(dit_config(case.info, factorised="Latte" in case.info["kind"]))
    model.load_state_dict(case.group("param"))
    expected_acts = case.group("act")
    acts = module_outputs(model, list(expected_acts))
    out, grads = run_case(model, case)

    tolerances = case.info["tolerances"]
    assert out.dtype == torch.float32
    assert relative_error(out, case["out"]) <= tolerances["out_rel"]
    for key, expected in expected_acts.items():
        assert relative_error(layout(model, key, acts[key]), expected) <= tolerances["out_rel"], key
    assert set(case.group("grad")) == set(case.info["grads"])
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key


def test_every_dit_and_latte_case_is_tested(golden_dir: Path) -> None:
    index = json.loads((golden_dir / "index.json").read_text())
    assert {name for name, entry in index.items() if re.search(r"opensora\.(DiT|Latte)\b", entry["kind"])} == set(CASES)


# ---------------------------------------------------------------------------------------------------------------------
# Published files: image models' kernels have no frame axis, Latte's videos are [B, F, C, H, W]

TO_OURS = {"orig_fb_dit": "b c h w -> b c 1 h w", "orig_latte": "b f c h w -> b c f h w"}
TO_THEIRS = {"orig_fb_dit": "b c 1 h w -> b c h w", "orig_latte": "b c f h w -> b f c h w"}


def published_model(case: Case, name: str) -> DiT:
    theirs = case.info["config"]
    sizes = {key: theirs[key] for key in ("in_channels", "hidden_size", "depth", "num_heads", "num_classes")}
    model = DiT(DiTConfig(**sizes, factorised=name == "orig_latte"))
    weights = case.group("param")
    weights["x_embedder.proj.weight"] = rearrange(weights["x_embedder.proj.weight"], "d c h w -> d c 1 h w")
    model.load_state_dict(weights)  # strictly: the position tables are passed over
    return model


@pytest.mark.parametrize("name", list(TO_OURS))
def test_published_file(golden_dir: Path, name: str) -> None:
    case = load_case(golden_dir, name)
    assert set(POSITION_TABLES) & set(case.group("param"))
    model = published_model(case, name)
    ours = Case(case.info, dict(case.tensors))
    for key in ("in.x", "gout"):
        ours.tensors[key] = rearrange(case[key], TO_OURS[name])
    out, grads = run_case(model, ours)
    out = rearrange(out, TO_THEIRS[name])
    grads["input.x"] = rearrange(grads["input.x"], TO_THEIRS[name])
    grads["x_embedder.proj.weight"] = grads["x_embedder.proj.weight"].squeeze(2)

    tolerances = case.info["tolerances"]
    for key in case.tensors:
        if key.startswith("out"):  # theirs, and Open-Sora's after its conversion
            assert relative_error(out, case[key]) <= tolerances["out_rel"], key
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key


@torch.no_grad()
def test_guidance_by_class(golden_dir: Path) -> None:
    case = load_case(golden_dir, "orig_fb_dit")
    model = published_model(case, "orig_fb_dit")
    labels, nulls = case["cfg_in.y"].chunk(2)
    assert (nulls == model.null_condition()).all()
    x = rearrange(case["cfg_in.x"].chunk(2)[0], TO_OURS["orig_fb_dit"])
    guided = guided_model(model, labels, None, model.null_condition(), guidance=4.0, num_guided=3)
    out = guided(x, case["cfg_in.timestep"].chunk(2)[0])
    assert relative_error(out[:, :, 0], case["cfg_out"].chunk(2)[0]) <= case.info["tolerances"]["out_rel"]


@pytest.mark.parametrize(
    ("name", "build", "parameters"),
    [
        ("keys_dit_xl2_opensora_label", dit_xl_2, 674_834_720),
        ("keys_dit_xl2_256_fb", dit_xl_2, 674_834_720),
        ("keys_dit_xl2_opensora_text_16x256", lambda: dit_xl_2(condition="text"), 675_600_800),
        ("keys_latte_xl2_opensora_label101", lambda: latte_xl_2(num_classes=101), 673_799_072),
        ("keys_latte_xl2_ucf101_vchitect", lambda: latte_xl_2(num_classes=101), 673_799_072),
    ],
)
def test_published_keys(golden_dir: Path, name: str, build: Callable[[], DiT], parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    shapes = load_case(golden_dir, name).info["shapes"]
    expected = {key: list(shape) for key, shape in shapes.items() if key not in POSITION_TABLES}
    kernel = expected["x_embedder.proj.weight"]
    if len(kernel) == 4:
        kernel.insert(2, 1)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(value.numel() for value in model.parameters()) == parameters


@pytest.mark.parametrize("kind", ["DiT_text", "DiT_label_10"])
def test_initial_weights(golden_dir: Path, kind: str) -> None:
    info = load_case(golden_dir, "init_freeze").info
    condition = {"condition": kind.removeprefix("DiT_")}
    state = DiT(dit_config({"config": info["config"] | condition}, factorised=False)).state_dict()
    rules = info["init"][kind]
    assert {re.sub(r"blocks\.\d+", "blocks.*", key) for key in state} == set(rules)
    for key, value in state.items():
        shape, rule = rules[re.sub(r"blocks\.\d+", "blocks.*", key)]
        assert list(value.shape) == shape, key
        check_rule(key, value, rule)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.timeout(1500)  # 675 M parameters on whatever cores there are
def test_full_size(golden_dir: Path) -> None:
    case = load_case(golden_dir, "xl_dit_1x32x32")
    info = case.info
    model = hashed_model(dit_config(info, factorised=False))
    state = model.state_dict()
    for key, samples in info["tensor_samples"].items():
        assert state[key].flatten()[: len(samples)].tolist() == pytest.approx(samples, rel=1e-6), key
    latents = hashed_tensor("xl_dit_1x32x32.in.x", (len(case["y"]), 4, *info["config"]["input_size"]))
    with torch.no_grad():
        out = model(latents, case["timestep"], case["y"])
    assert relative_error(out, case["out"]) <= info["tolerances"]["fp32_out_rel"]


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the published code


def make_model(cfg: DiTConfig = TINY, seed: int = 0) -> DiT:
    """Return a model none of whose branches is silent."""
    torch.manual_seed(seed)
    model = DiT(cfg).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def make_inputs(cfg: DiTConfig = TINY, batch: int = 2, size: tuple[int, int, int] = (3, 8, 8)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 1, cfg.caption_channels, generator=generator)
    return {
        "latents": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 1000,
        "condition": text if cfg.condition == "text" else torch.arange(batch) + 3,
    }


@torch.no_grad()
@pytest.mark.parametrize("cfg", [TINY, LATTE, TEXT], ids=["dit", "latte", "text"])
def test_sizes_at_call_time(cfg: DiTConfig) -> None:
    """A model takes any square size; an odd one is padded with zeros and cropped."""
    model = make_model(cfg)
    inputs = make_inputs(cfg, size=(2, 7, 7))
    padded = torch.zeros(2, 4, 2, 8, 8)
    padded[..., :7, :7] = inputs["latents"]
    out = model(**inputs)
    assert out.shape == (2, 8, 2, 7, 7)
    assert torch.equal(out, model(**inputs | {"latents": padded})[..., :7, :7])
    assert model(**make_inputs(cfg, batch=1, size=(5, 4, 4))).shape == (1, 8, 5, 4, 4)


@torch.no_grad()
def test_latte_at_one_depth_sees_frames_apart() -> None:
    """Its first block attends within frames alone, its second across them; DiT's first sees all."""
    for cfg, apart in ((replace(LATTE, depth=1), True), (LATTE, False), (replace(TINY, depth=1), False)):
        model, inputs = make_model(cfg), make_inputs(cfg)
        changed = inputs["latents"].clone()
        changed[:, :, 2] += 1
        out, other = model(**inputs), model(**inputs | {"latents": changed})
        assert torch.allclose(out[:, :, :2], other[:, :, :2], atol=1e-6) == apart, cfg
        assert not torch.allclose(out[:, :, 2], other[:, :, 2], atol=1e-3), cfg


@torch.no_grad()
def test_the_order_of_frames() -> None:
    for cfg, same in ((TINY, True), (replace(TINY, no_temporal_pos_emb=False), False), (LATTE, False)):
        model, inputs = make_model(cfg), make_inputs(cfg)
        turned = model(**inputs | {"latents": inputs["latents"].flip(2)}).flip(2)
        assert torch.allclose(turned, model(**inputs), atol=1e-5) == same, cfg


@torch.no_grad()
def test_bf16_keeps_the_timestep() -> None:
    """999 and 1000 are one number in bf16; the model must tell them apart and stay near float32."""
    model, inputs = make_model(), make_inputs()
    inputs["timestep"] = torch.tensor([999.0, 999.0])
    full = model(**inputs)
    half = model.bfloat16()
    out, other = half(**inputs), half(**inputs | {"timestep": torch.tensor([1000.0, 1000.0])})
    assert out.dtype == torch.float32
    assert not torch.equal(out, other)
    assert relative_error(out, full) < 0.05


def test_position_tables_are_not_state() -> None:
    model = make_model(LATTE)
    model(**make_inputs(LATTE))
    assert not set(POSITION_TABLES) & set(model.state_dict()) and not list(model.buffers())
    tables = {key: torch.zeros(1, 3, 48) for key in POSITION_TABLES}
    make_model(LATTE, seed=2).load_state_dict(model.state_dict() | tables, strict=True)


@pytest.mark.parametrize(
    ("cfg", "change", "message"),
    [
        (TINY, {"latents": torch.zeros(2, 3, 1, 8, 8)}, r"expected latents \[B, 4, T, H, W\], got \[2, 3, 1, 8, 8\]"),
        (TINY, {"latents": torch.zeros(2, 4, 1, 8, 6)}, "expected square latents, got 8x6"),
        (TINY, {"timestep": torch.zeros(1)}, r"one timestep a sample, \[2\], got \[1\]"),
        (TINY, {"condition": torch.tensor([1])}, r"expected int64 labels \[2\], got torch.int64 \[1\]"),
        (TINY, {"condition": torch.tensor([1.0, 2.0])}, r"expected int64 labels \[2\], got torch.float32 \[2\]"),
        (TINY, {"condition": torch.tensor([1, 11])}, r"labels from 0 to 10 \(none\), got \[1, 11\]"),
        (TINY, {"condition": torch.tensor([-1, 1])}, r"labels from 0 to 10 \(none\), got \[-1, 1\]"),
        (TINY, {"mask": torch.ones(2, 1)}, "a label condition has no tokens to mask"),
        (TEXT, {"condition": torch.zeros(2, 3, 16)}, r"expected text \[2, 1, 16\], got \[2, 3, 16\]"),
        (TEXT, {"mask": torch.ones(2, 1)}, "a text condition has no tokens to mask"),
    ],
)
def test_wrong_inputs_are_named(cfg: DiTConfig, change: dict[str, Any], message: str) -> None:
    model = make_model(cfg)
    with pytest.raises(ValueError, match=message):
        model(**make_inputs(cfg) | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide"),
        ({"hidden_size": 42, "num_heads": 2}, "multiple of 4"),
        ({"patch_size": (1, 2)}, "three positive numbers"),
        ({"patch_size": (1, 2, 4)}, "rows and columns must be alike"),
        ({"condition": "label_10"}, r'condition="label_10": expected "label" or "text"'),
    ],
)
def test_wrong_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(replace(TINY, **change))


@pytest.mark.parametrize("cfg", [TINY, LATTE, TEXT], ids=["dit", "latte", "text"])
@pytest.mark.parametrize(
    ("objective", "sampler"), [("flow", "euler"), ("iddpm", "iddpm"), ("iddpm", "ddim"), ("iddpm", "dpm")]
)
def test_sampling(cfg: DiTConfig, objective: str, sampler: str) -> None:
    """Every sampler takes classes and pooled text; the condition counts, a sample's neighbours do not."""
    model = make_model(cfg)
    conditions = make_inputs(cfg, batch=3)["condition"]

    def sample(rows: list[int], seeds: list[int]) -> Tensor:
        return LatentSampler(DiffusionConfig(objective=objective), sampler, steps=3, guidance=4.0)(
            model,
            conditions[rows],
            None,
            model.null_condition(),
            shape=(4, 2, 4, 4),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )

    together = sample([0, 1, 2], [0, 1, 2])
    assert together.shape == (3, 4, 2, 4, 4)
    apart = torch.cat([sample([0], [0]), sample([1, 2], [1, 2])])
    assert relative_error(apart, together) < 1e-5
    assert relative_error(sample([1], [0]), together[:1]) > 1e-3  # another class, the same noise


@torch.no_grad()
def test_guidance_leads_away_from_the_null_condition() -> None:
    for cfg in (TINY, TEXT):
        model, inputs = make_model(cfg), make_inputs(cfg)
        x, t, condition = inputs.values()
        null = model.null_condition()
        assert null.shape == (() if cfg is TINY else (1, 16))
        out = guided_model(model, condition, None, null, guidance=3.0)(x, t)
        nothing = model(x, t, torch.stack([null, null]))
        torch.testing.assert_close(out, nothing + 3 * (model(x, t, condition) - nothing), atol=1e-4, rtol=1e-4)
