"""Adapters: what a model computes with them, what is saved of them, who else reads it, and what they take."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from opensora_repro.config import (
    Config,
    ConfigError,
    DataConfig,
    InitConfig,
    LoraConfig,
    ParallelConfig,
    TrainConfig,
    check_config,
    load_config,
)
from opensora_repro.models.captioned import CaptionedModel, conditions_of
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig, TrainedConfig, block_layers
from opensora_repro.models.packing import PackedSTDiT
from opensora_repro.parallel.mesh import Mesh
from opensora_repro.planning.memory import needed_memory
from opensora_repro.planning.parameters import adapter_parameters
from opensora_repro.training.adapters import SampleDropout, apply_lora, dropout_keys
from opensora_repro.weights.adapters import adapter_config, add_adapters, check_adapters, read_adapter, saved_name
from opensora_repro.weights.families import family_of
from opensora_repro.weights.files import WeightsError

SIZE: dict[str, Any] = {
    "hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 24, "model_max_length": 6
}  # fmt: skip
MODELS: dict[str, TrainedConfig] = {
    "STDiT": STDiTConfig(**SIZE),
    "PixArt": STDiTConfig(**SIZE, temporal_attention=False),
    "STDiT2": STDiT2Config(**SIZE),
    "STDiT3": STDiT3Config(**SIZE),
}
LORA = LoraConfig(rank=3, alpha=5.0)


def config(model: TrainedConfig, lora: LoraConfig = LORA, **train: Any) -> Config:
    given = TrainConfig(**{"dtype": "fp32", **train})
    return Config(model=model, lora=lora, train=given, init=InitConfig("base"))


def make_model(cfg: TrainedConfig, kind: Any = None) -> CaptionedModel:
    model: CaptionedModel = (kind or family_of(cfg).network)(cfg)
    for name, value in model.named_parameters():  # none at zero, or adapters would change nothing behind it
        if "rope" not in name:
            nn.init.normal_(value, std=0.1)
    return model


def adapt(model: CaptionedModel, cfg: Config) -> CaptionedModel:
    apply_lora(model, cfg)
    for value in model.parameters():
        if value.requires_grad:
            nn.init.normal_(value, std=0.2)
    return model


def save(model: CaptionedModel, cfg: Config, folder: Path) -> Path:
    """As a checkpoint has them."""
    folder.mkdir(exist_ok=True)
    trained = {saved_name(k): v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    save_file(trained, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(adapter_config(cfg))
    return folder


def call(model: Any, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    cfg = model.cfg
    latents = torch.randn(2, cfg.in_channels, 3, 8, 8, generator=generator)
    text = torch.randn(2, 6, cfg.caption_channels, generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    told = conditions_of(cfg, (3, 64, 64), torch.full((2,), 8.0), frame_interval=1)
    out: torch.Tensor = model(latents, torch.tensor([10.0, 700.0]), text, mask, **told, **more)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_compute_what_adapters_do(name: str, tmp_path: Path) -> None:
    cfg = config(MODELS[name])
    base = make_model(cfg.model)
    merged = family_of(cfg.model).network(cfg.model)
    merged.load_state_dict(base.state_dict())
    plain = call(base)
    adapted = adapt(base, cfg)
    assert all("lora_" in k for k, v in adapted.named_parameters() if v.requires_grad)
    adapter = read_adapter(str(save(adapted, cfg, tmp_path / "a")))
    check_adapters([adapter], cfg.model)
    assert len(adapter.pairs) == 2 * sum(len(block_layers(cfg.model, spans)) for spans in cfg.model.block_spans)
    count = sum(v.numel() for v in adapted.parameters() if v.requires_grad)
    assert count == adapter_parameters(cfg.model, cfg.lora)
    add_adapters(merged, [adapter])
    found, expected = call(adapted), call(merged)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.detach().abs().max().item())


def test_what_text_is_made_of_once_sees_adapters(tmp_path: Path) -> None:
    """Folded cross-attention, which reads weights by themselves, and rows of packed clips."""
    cfg = config(MODELS["STDiT"])
    model = adapt(make_model(cfg.model, PackedSTDiT), cfg)
    generator = torch.Generator().manual_seed(2)
    latents, text = (torch.randn(2, 4, 3, 8, 8, generator=generator), torch.randn(2, 6, 24, generator=generator))
    mask, times = torch.tensor([[True] * 6, [True] * 3 + [False] * 3]), torch.tensor([3.0, 90.0])
    with torch.no_grad():
        expected = model(latents, times, text, mask)
        prepared = model(latents, times, model.prepare_text(text, mask))
        (packed,) = model([latents], times, text, mask)
    torch.testing.assert_close(prepared, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [("cross_attn", "attn.qkv"), ("fc1", "proj")])
def test_targets_and_peft_reads_what_was_saved(targets: tuple[str, ...], tmp_path: Path) -> None:
    from peft import PeftModel

    cfg = config(MODELS["STDiT3"], dataclasses.replace(LORA, targets=targets))
    base = make_model(cfg.model)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    adapted = adapt(base, cfg)
    folder = save(adapted, cfg, tmp_path / "a")
    assert {layer.split(".", 2)[2] for layer in read_adapter(str(folder)).pairs} == {
        ("cross_attn", "attn.qkv"): {"cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "attn.qkv"},
        ("fc1", "proj"): {"mlp.fc1", "attn.proj", "cross_attn.proj"},
    }[targets]
    fresh = family_of(cfg.model).network(cfg.model)
    fresh.load_state_dict(weights)
    theirs = PeftModel.from_pretrained(fresh, str(folder))
    assert torch.equal(call(theirs.base_model.model), call(adapted))


def test_bfloat16_keeps_what_autocast_rounds_anyway() -> None:
    cfg = config(MODELS["STDiT2"])
    full, half = make_model(cfg.model), family_of(cfg.model).network(cfg.model)
    half.load_state_dict(full.state_dict())
    for model, dtype in ((full, "fp32"), (half, "bf16")):
        torch.manual_seed(4)
        adapt(model, config(cfg.model, dtype=dtype))
    assert half.blocks[0].mlp.fc1.base_layer.weight.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in half.parameters() if v.requires_grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(full), call(half))


# Dropout


def test_dropout_belongs_to_samples() -> None:
    cfg = config(MODELS["STDiT"], dataclasses.replace(LORA, dropout=0.5))
    model = adapt(make_model(cfg.model), cfg)
    keys = dropout_keys(model)
    assert keys is not None
    plain = call(model)
    keys.seeds = [7, 8]
    both, again = call(model), call(model)
    assert torch.equal(both, again) and not torch.equal(both, plain)
    keys.seeds = [8, 7]
    assert not torch.equal(call(model), both)
    first, x = next(m for m in model.modules() if isinstance(m, SampleDropout)), torch.ones(2, 3, 500)
    keys.seeds = [7, 8]
    whole = first(x)
    keys.seeds = [8]
    assert torch.equal(first(x[1:]), whole[1:])  # whoever it is computed beside
    assert set(whole.unique().tolist()) == {0.0, 2.0} and 0.45 < (whole == 0).float().mean() < 0.55
    keys.seeds = [7, 8]
    grads = []
    for kept in ("none", "full", "selective"):  # which recomputes with the same masks
        model.activation_checkpointing = kept
        model.zero_grad()
        call(model).square().mean().backward()
        grads.append(torch.cat([v.grad.flatten() for v in model.parameters() if v.grad is not None]))
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


# Mistakes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init": InitConfig()}, 'init.weights = "": expected weights, which lora.rank = 3 adapts'),
        ({"lora": LoraConfig(rank=3, targets=("qvk",))}, 'lora.targets: "qvk" is no layer of this model: expected'),
        ({"lora": LoraConfig(rank=3, dropout=1.0)}, "lora.dropout = 1.0: expected a share from 0 to below 1"),
        ({"lora": LoraConfig(rank=-1)}, "lora.rank = -1: expected 0 or more"),
        ({"parallel": ParallelConfig(sp_size=2)}, "parallel.sp_size = 2: expected 1 with lora.rank = 3"),
        (
            {"parallel": ParallelConfig(engine="colossalai", plugin="hybrid", tp_size=2)},
            "parallel.tp_size = 2: expected 1 with lora.rank = 3 (adapters are not cut)",
        ),
    ],
)
def test_mistakes_of_a_config(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(dataclasses.replace(config(MODELS["STDiT"]), **changes))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_mistakes_of_an_adapter(tmp_path: Path) -> None:
    cfg = config(MODELS["STDiT"])
    folder = save(adapt(make_model(cfg.model), cfg), cfg, tmp_path / "a")

    def fails(spec: str, expected: str) -> None:
        with pytest.raises(WeightsError, match=expected) as caught:
            check_adapters([read_adapter(spec)], cfg.model)
        assert "\n" not in str(caught.value)

    adapter = read_adapter(f"{folder}:-0.5")
    assert (adapter.weight, adapter.scale) == (-0.5, 5 / 3)
    assert read_adapter(str(folder / "adapter_model.safetensors")).pairs.keys() == adapter.pairs.keys()
    fails(str(tmp_path / "none"), "no adapter there: expected a run with")
    fails(f"{folder}:heavy", "no adapter there")
    fails(f"{folder}:nan", "expected a finite weight")
    with pytest.raises(WeightsError, match=r"made for another model: blocks\.0"):
        check_adapters([adapter], dataclasses.replace(cfg.model, hidden_size=64))
    with pytest.raises(WeightsError, match="this one has no such layer"):
        check_adapters([adapter], MODELS["STDiT3"])
    told = json.loads((folder / "adapter_config.json").read_text())
    for key, value in (("use_dora", True), ("peft_type", "LOHA"), ("r", 7), ("rank_pattern", {"qkv": 8})):
        (folder / "adapter_config.json").write_text(json.dumps(told | {key: value}))
        fails(str(folder), key if key != "r" else "r = 7 is not the rank")
    (folder / "adapter_config.json").unlink()
    fails(str(folder), "without which nobody knows its alpha")
    save_file({"base_model.model.x.lora_A.weight": torch.full((2, 4), torch.nan)}, folder / "adapter_model.safetensors")
    fails(str(folder), "expected lora_A")
    pair = {f"base_model.model.x.lora_{k}.weight": torch.full((2, 2), torch.nan) for k in "AB"}
    save_file(pair, folder / "adapter_model.safetensors")
    fails(str(folder), "not finite")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    fails(str(folder), "no LoRA of a linear layer as peft names it")


# Memory


def test_a_large_model_fits_into_12_gb() -> None:
    """XL/2 with rank 16 at 16x256, latents and text from the cache; trained whole it takes more than twice as much."""
    cfg = load_config(Path(__file__).parents[2] / "configs" / "stage2_16x256x256.toml")
    cfg = dataclasses.replace(
        cfg,
        init=InitConfig("base"),
        lora=LoraConfig(rank=16),
        train=dataclasses.replace(cfg.train, batch_size=1, dtype="bf16"),
        data=dataclasses.replace(cfg.data, cache="cache", draws=1),
        sample=dataclasses.replace(cfg.sample, every=0),
    )
    assert (cfg.model.depth, cfg.data.num_frames, cfg.data.height) == (28, 16, 256)
    need = needed_memory(cfg, Mesh(), "cuda")
    assert 1.4e9 < need.states.weights < 2e9 and need.states.optimizer < 0.4e9
    assert need.peak < 12e9
    whole = needed_memory(dataclasses.replace(cfg, lora=LoraConfig()), Mesh(), "cuda")
    assert whole.peak > 2 * need.peak
    assert isinstance(cfg.data, DataConfig)
