"""The planner's counts of parameters, tokens and FLOPs against the models themselves, and against published cases."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opensora_repro.config import Config, DataConfig, TextConfig, VaeConfig
from opensora_repro.models import layers
from opensora_repro.models.captioned import conditions_of
from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.stdit import STDiT
from opensora_repro.planning.encoders import PUBLISHED_T5, T5_SIZES, frozen_sizes
from opensora_repro.planning.flops import forward_products
from opensora_repro.planning.parameters import TIMESTEP_CHANNELS, count_parameters, cut_parameters, trained_parameters
from opensora_repro.planning.sizes import Grid, latent_shape, token_grid
from opensora_repro.weights.families import family_of
from tests.tiny_models import make_tiny_text, make_tiny_vae

TINY = STDiTConfig(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6)
STDITS: dict[str, dict[str, Any]] = {
    "video": {},
    "image": {"temporal_attention": False},
    "image with its size": {"temporal_attention": False, "size_conditioning": True, "base_size": 4},
    "many places": {"hidden_size": 36, "num_heads": 3},
    "patches over time, narrow MLP, no variance": {"patch_size": (2, 4, 2), "mlp_ratio": 1.5, "pred_sigma": False},
}
DITS: dict[str, dict[str, Any]] = {
    "labels": {},
    "text": {"condition": "text", "caption_channels": 20},
    "Latte": {"factorised": True, "depth": 3},
}


def attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Two matrix products."""
    *batch, length, channels = query
    return 4 * math.prod(batch) * length * key[-2] * channels


def attention_backward_flops(_: torch.Size, query: torch.Size, key: torch.Size, *__: Any, **___: Any) -> int:
    """Four: flash attention makes a fifth, which counts as computed again."""
    return 2 * attention_flops(query, key)


CPU_ATTENTION = {  # which torch has no formulas for
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count(work: Any) -> int:
    """What torch counts while `work` runs."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", STDITS)
def test_parameters_are_the_models(name: str) -> None:
    cfg = dataclasses.replace(TINY, **STDITS[name])
    assert count_parameters(cfg) == sum(parameter.numel() for parameter in STDiT(cfg).parameters())


def test_published_parameters() -> None:
    assert count_parameters(STDiTConfig()) == 759_620_768
    assert count_parameters(STDiTConfig(temporal_attention=False)) == 610_856_096
    assert TIMESTEP_CHANNELS == layers.TIMESTEP_CHANNELS


@pytest.mark.parametrize(("config", "name"), [(STDiT2Config, "keys_stdit2_xl2"), (STDiT3Config, "keys_stdit3_xl2")])
def test_published_parameters_of_1_1_and_1_2(config: Any, name: str, golden_1_2_dir: Path) -> None:
    keys = json.loads((golden_1_2_dir / f"{name}.json").read_text(encoding="utf-8"))
    assert count_parameters(config()) == keys["n_parameters"]
    assert trained_parameters(config()) == keys["n_trainable"]


def test_parameters_that_1_2_leaves_as_they_are(golden_1_2_dir: Path) -> None:
    diff = json.loads((golden_1_2_dir / "keys_diff_pixart_to_stdit3.json").read_text(encoding="utf-8"))
    told = diff["trainable_parameters"]
    for key in ("freeze_y_embedder", "only_train_temporal"):
        assert trained_parameters(STDiT3Config(**{key: True})) == told[key]
    assert count_parameters(STDiT3Config(hidden_size=1872, num_heads=26)) == told["stdit3_3b_parameters"]


def test_what_tensor_parallelism_cuts() -> None:
    """By the names that parallel/colossal.py gives its layers to."""
    columns = ("attn.qkv", "attn_temp.qkv", "cross_attn.q_linear", "cross_attn.kv_linear", "mlp.fc1")
    rows = ("attn.proj", "attn_temp.proj", "cross_attn.proj", "mlp.fc2")
    cut = {f".{name}.{kind}" for name in columns for kind in ("weight", "bias")} | {f".{name}.weight" for name in rows}
    named = STDiT(TINY).named_parameters()
    found = sum(p.numel() for name, p in named if name.startswith("blocks.") and name.endswith(tuple(cut)))
    assert cut_parameters(TINY) == found


@pytest.mark.parametrize("recompute", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", STDITS)
def test_stdit_flops_are_what_torch_counts(name: str, recompute: str) -> None:
    cfg = dataclasses.replace(TINY, **STDITS[name])
    model = STDiT(cfg)
    model.activation_checkpointing = recompute
    latents = torch.randn(2, 4, 3, 12, 8)  # attention over 24 places is costly at 36 channels, not at 48
    text, mask = torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)
    products = forward_products(cfg, token_grid(cfg, latents.shape[1:]))

    def forward() -> torch.Tensor:
        return model(latents, torch.tensor([5.0, 7.0]), text, mask)

    with torch.no_grad():
        assert count(forward) == 2 * products.forward_flops
    expected = products.training_flops + products.recomputed_flops(recompute)
    assert count(lambda: forward().sum().backward()) == 2 * expected


SUCCESSORS: dict[str, Any] = {
    "STDiT2": STDiT2Config(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6),
    "STDiT2 without q/k norm": STDiT2Config(
        hidden_size=36, depth=1, num_heads=3, caption_channels=12, model_max_length=6, qk_norm=False
    ),
    "STDiT3": STDiT3Config(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6),
    "STDiT3 of tubelets": STDiT3Config(
        hidden_size=36,
        depth=2,
        num_heads=3,
        caption_channels=12,
        model_max_length=6,
        patch_size=(2, 4, 2),
        mlp_ratio=2.0,
    ),
}
SUCCESSORS |= {
    f"{name}, {part}": dataclasses.replace(SUCCESSORS[name], **changes)
    for name, part, changes in (
        ("STDiT2", "frozen caption MLP", {"freeze_y_embedder": True}),
        ("STDiT3", "frozen caption MLP", {"freeze_y_embedder": True}),
        ("STDiT3", "temporal blocks alone", {"only_train_temporal": True}),
        ("STDiT3 of tubelets", "temporal blocks alone", {"only_train_temporal": True, "freeze_y_embedder": True}),
    )
}


@pytest.mark.parametrize("recompute", ACTIVATION_CHECKPOINTING)
@pytest.mark.parametrize("name", SUCCESSORS)
def test_flops_of_1_1_and_1_2_are_what_torch_counts(name: str, recompute: str) -> None:
    cfg = SUCCESSORS[name]
    model = family_of(cfg).network(cfg)
    assert count_parameters(cfg) == sum(parameter.numel() for parameter in model.parameters())
    model.activation_checkpointing = recompute
    latents, text, mask = torch.randn(2, 4, 3, 12, 8), torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)
    told = conditions_of(cfg, (3, 96, 64), torch.full((2,), 24.0), frame_interval=1)
    products = forward_products(cfg, token_grid(cfg, latents.shape[1:]))

    def forward() -> torch.Tensor:
        return model(latents, torch.tensor([5.0, 7.0]), text, mask, **told)

    with torch.no_grad():
        assert count(forward) == 2 * products.forward_flops
    expected = products.training_flops + products.recomputed_flops(recompute)
    assert count(lambda: forward().sum().backward()) == 2 * expected


@pytest.mark.parametrize("name", DITS)
def test_dit_flops_are_what_torch_counts(name: str) -> None:
    cfg = dataclasses.replace(DiTConfig(hidden_size=32, depth=2, num_heads=4, num_classes=7), **DITS[name])
    latents = torch.randn(2, 4, 3, 8, 8)
    condition = torch.tensor([1, 2]) if cfg.condition == "label" else torch.randn(2, 1, cfg.caption_channels)
    products = forward_products(cfg, token_grid(cfg, latents.shape[1:]))
    model = DiT(cfg)
    counted = count(lambda: model(latents, torch.tensor([5.0, 7.0]), condition).sum().backward())
    assert counted == 2 * products.training_flops


def test_frozen_models_are_counted_from_their_configs(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import T5EncoderModel

    vae_folder, text_folder = make_tiny_vae(tmp_path / "vae"), make_tiny_text(tmp_path / "text")
    cfg = Config(
        model=dataclasses.replace(TINY, model_max_length=9),
        data=DataConfig(num_frames=3, height=32, width=48),
        vae=VaeConfig(path=str(vae_folder)),
        text=TextConfig(path=str(text_folder)),
    )
    sizes = frozen_sizes(cfg)
    vae, text = AutoencoderKL.from_pretrained(vae_folder), T5EncoderModel.from_pretrained(text_folder)
    assert sizes.vae_parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert sizes.text_parameters == sum(parameter.numel() for parameter in text.parameters())
    with torch.no_grad():
        assert sizes.encode_flops == count(lambda: vae.encode(torch.zeros(3, 3, 32, 48)))
        assert sizes.decode_flops == count(lambda: vae.decode(torch.zeros(3, 4, 4, 6)))
        assert sizes.text_flops == count(lambda: text(input_ids=torch.zeros(1, 9, dtype=torch.int64)))


def test_the_published_frozen_models() -> None:
    from transformers import T5Config, T5EncoderModel

    sizes = frozen_sizes(Config())  # hub names: nothing is read
    assert sizes.vae_parameters == 83_653_863
    assert sizes.text_parameters == 4_762_310_656
    small = T5Config(**PUBLISHED_T5, **T5_SIZES["small"])
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in T5EncoderModel(small).parameters())
    assert frozen_sizes(Config(text=TextConfig(path="google/t5-v1_1-small"))).text_parameters == expected == 35_332_800


def test_a_config_that_is_no_models_falls_back_to_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps([1, 2]))
    assert frozen_sizes(Config(vae=VaeConfig(path=str(tmp_path)))).vae_parameters == 83_653_863


# Published cases


def test_dit_xl_2_at_512_pixels() -> None:
    """Peebles & Xie's table: 524.6 Gflops, one for a multiplication and its addition, where chips are rated in two.

    250 steps without guidance are 131 T of these.
    """
    gflops = forward_products(DiTConfig(), Grid(frames=1, places=(512 // 8 // 2) ** 2)).forward_flops / 2e9
    assert gflops == pytest.approx(524.6, abs=0.1)
    picture = 250 * gflops * 1e9
    assert picture == pytest.approx(131e12, rel=0.002)


def test_dit_xl_2_at_256_pixels() -> None:
    """The same table's 118.6."""
    assert forward_products(DiTConfig(), Grid(1, 256)).forward_flops / 2e9 == pytest.approx(118.6, abs=0.1)


def test_tokens_of_magvit_v2() -> None:
    """17 frames, 2.125 s at 8 frames/s, of 128x128: 5 x 16 x 16 tokens, a token a latent."""
    cfg = Config(
        model=dataclasses.replace(TINY, patch_size=(1, 1, 1)), data=DataConfig(num_frames=17, height=128, width=128)
    )
    shape = latent_shape(cfg, (4, 8, 8))  # MAGVIT-v2 (arXiv:2310.05737): the first frame has a latent frame of its own
    assert shape == (4, 5, 16, 16)
    assert token_grid(cfg.model, shape).tokens == 1280
    assert 17 / 8 == 2.125


@pytest.mark.parametrize(("frames", "size", "tokens"), [(16, 256, 4096), (16, 512, 16384), (64, 512, 65536)])
def test_tokens_of_the_published_recipes(frames: int, size: int, tokens: int) -> None:
    cfg = Config(data=DataConfig(num_frames=frames, height=size, width=size))
    assert token_grid(cfg.model, latent_shape(cfg)).tokens == tokens
