"""Caches between the steps of a sampling: what is left out, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.sides import random_weights
from opensora_repro.config import Config, ConfigError, DiffusionConfig
from opensora_repro.diffusion.frame_masks import GivenFrames
from opensora_repro.diffusion.samplers import EVERYWHERE, LatentSampler, num_calls
from opensora_repro.models.captioned import CaptionedModel
from opensora_repro.models.config import DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2
from opensora_repro.models.stdit3 import STDiT3
from opensora_repro.sampling.caches import Broadcast, Caches, StepCache
from opensora_repro.sampling.speedups import Speedups

SIZES: dict[str, Any] = {"num_heads": 2, "depth": 2, "caption_channels": 8, "model_max_length": 6, "pred_sigma": False}
MODELS = {
    "stdit": lambda: STDiT(STDiTConfig(hidden_size=32, **SIZES)),
    "stdit2": lambda: STDiT2(STDiT2Config(hidden_size=48, **SIZES)),
    "stdit3": lambda: STDiT3(STDiT3Config(hidden_size=32, **SIZES)),
}
TOLD = {"stdit": [], "stdit2": ["fps", "height", "width", "num_frames", "ar"], "stdit3": ["fps", "height", "width"]}
IDENTITY = {"polynomial": (1.0, 0.0), "span": (0.0, 10.0)}
STEPS = 8


def build(name: str) -> CaptionedModel:
    torch.manual_seed(0)
    model: CaptionedModel = random_weights(MODELS[name]()).eval()
    return model


def sample(
    model: CaptionedModel,
    caches: Caches | None,
    rows: tuple[int, ...] = (0, 1),
    *,
    sampler: str = "euler",
    interval: tuple[float, float] = EVERYWHERE,
    prepared: bool = True,
    given: GivenFrames | None = None,
) -> Tensor:
    name = type(model).__name__.lower()
    text = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))[list(rows)]
    mask = (torch.arange(6)[None] < torch.tensor([[6], [2], [4]]))[list(rows)]
    with nullcontext() if caches is None else caches(model, num_calls(sampler, STEPS)):
        return LatentSampler(
            DiffusionConfig(objective="flow"),
            sampler,
            steps=STEPS,
            guidance=3.0,
            guidance_interval=interval,
            prepare_text=model.prepare_text if prepared else None,
        )(
            model,
            text,
            mask,
            model.null_condition(),
            shape=(4, 3, 4, 4),
            generators=[torch.Generator().manual_seed(row) for row in rows],
            conditions={key: torch.full((len(rows),), 8.0) for key in TOLD[name]},
            given=given,
        )


def count(model: CaptionedModel) -> Counter[str]:
    """Runs of each kind of layer, by what really multiplies: projections of attention, and the MLP."""
    runs: Counter[str] = Counter()

    def counted(kind: str) -> Any:
        return lambda *_: runs.update([kind])

    for block in model.in_order():
        for layer in (block.attn, block.attn_temp):
            if layer is not None:
                layer.qkv.register_forward_hook(counted("temporal" if layer.over == "time" else "spatial"))
        block.mlp.register_forward_hook(counted("mlp"))
        block.cross_attn.q_linear.register_forward_hook(counted("cross"))
    return runs


@pytest.mark.parametrize("name", MODELS)
def test_caches_that_keep_nothing_change_nothing(name: str) -> None:
    model = build(name)
    plain = sample(model, None)
    assert torch.equal(sample(model, Caches(Broadcast(1, 1, 1, EVERYWHERE))), plain)
    assert torch.equal(sample(model, Caches(None, StepCache(0.0, **IDENTITY))), plain)
    assert torch.equal(sample(model, Caches(Broadcast(1, 1, 1), StepCache(0.0, **IDENTITY))), plain)
    assert not torch.equal(sample(model, Caches(Broadcast(2, 2, 2))), plain)
    assert torch.equal(sample(model, None), plain)  # nothing is left behind
    assert all("forward" not in vars(m) and "run_blocks" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_computed_once_for_the_calls_that_it_serves(name: str) -> None:
    """8 calls, outputs are taken again in 1 to 6: spatial is computed in 0, 2, 4, 6, 7 ..."""
    model = build(name)
    runs = count(model)
    # Without prepared text, which is folded on a CPU, all layers run as layers
    found = sample(model, Caches(Broadcast(2, 3, 6, (0.125, 0.875))), prepared=False)
    pairs = 2 * SIZES["depth"] if name == "stdit3" else SIZES["depth"]
    depth = SIZES["depth"]
    assert runs == {"spatial": depth * 5, "temporal": depth * 4, "cross": pairs * 3, "mlp": pairs * STEPS}
    plain = sample(model, None, prepared=False)
    assert 1e-6 < (found - plain).abs().max() / plain.abs().max() < 0.5
    torch.testing.assert_close(sample(model, Caches(Broadcast(2, 3, 6, (0.125, 0.875)))), found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_skipped_while_little_changes(name: str) -> None:
    model = build(name)
    runs = count(model)
    sample(model, Caches(None, StepCache(1e9, **IDENTITY)))
    blocks = len(model.in_order())
    assert runs["mlp"] == 2 * blocks  # the first call, and the last
    runs.clear()
    plain = sample(model, None)
    errors = []
    for threshold in (0.05, 0.3, 1e9):
        runs.clear()
        found = sample(model, Caches(None, StepCache(threshold, **IDENTITY)))
        errors.append(((found - plain).square().mean().sqrt().item(), runs["mlp"] // blocks))
    assert errors[0][1] > errors[-1][1] == 2, errors
    assert errors[0][0] < errors[-1][0], errors


def test_each_sample_skips_by_itself() -> None:
    model = build("stdit3")
    caches = Caches(Broadcast(2, 2, 2), StepCache(0.25, **IDENTITY))
    together = sample(model, caches, (0, 1, 2))
    alone = torch.cat([sample(model, caches, (row,)) for row in (0, 1, 2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["ab2", "heun"])
def test_caches_with_guidance_that_comes_and_goes_and_frames_that_join(sampler: str) -> None:
    """Outputs of another batch, or under another frame mask, are not taken."""
    model = build("stdit3")
    given = GivenFrames(torch.randn(2, 4, 3, 4, 4), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.4, 0.4]]))
    args: dict[str, Any] = {"sampler": sampler, "interval": (0.3, 0.9), "given": given}
    plain = sample(model, None, **args)
    one = Caches(Broadcast(1, 1, 1), StepCache(0.0, **IDENTITY))
    assert torch.equal(sample(model, one, **args), plain)
    found = sample(model, Caches(Broadcast(4, 4, 4), StepCache(0.1, **IDENTITY)), **args)
    assert torch.equal(found[0, :, 0], given.latents[0, :, 0])
    assert 0 < (found - plain).abs().mean() < 0.5 * plain.abs().mean()


def test_a_mask_that_changes_is_seen() -> None:
    model = build("stdit")
    runs = count(model)
    latents, text, mask = torch.randn(1, 4, 3, 4, 4), torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    masks = [torch.tensor([[True, True, False]])] * 2 + [torch.ones(1, 3, dtype=torch.bool)] * 2
    with torch.no_grad(), Caches(Broadcast(9, 9, 9, EVERYWHERE))(model, 4):
        for frame_mask in masks:
            model(latents, torch.full((1,), 500.0), text, mask, frame_mask=frame_mask)
    assert runs["spatial"] == runs["temporal"] == runs["cross"] == 2 * SIZES["depth"]


def test_what_does_not_go_together_and_what_is_kept_in_memory() -> None:
    step_cache, model = Speedups(step_cache=StepCache(0.1, **IDENTITY)), STDiT3Config(hidden_size=32, **SIZES)
    cfg = Config(model=model)
    with pytest.raises(ConfigError, match="--step-cache with --sp-size 2: each process would judge by its own frames"):
        step_cache.check(cfg, model, sp_size=2)
    with pytest.raises(ConfigError, match="--broadcast: DiT and Latte have no such cache"):
        Speedups(broadcast=Broadcast()).check(cfg, DiTConfig(hidden_size=32, depth=1, num_heads=2))
    tokens = 16 * 16 * 16 * 2 * 32  # of 16 frames of 256 pixels, both halves, 32 channels
    assert step_cache.memory(cfg, model, batch_size=3) == 3 * 2 * 4 * tokens
    half = 2 if cfg.train.dtype == "bf16" else 4
    for served, layers in ((Broadcast(2, 1, 1), 2), (Broadcast(1, 1, 2), 4), (Broadcast(2, 2, 2), 8)):
        assert Speedups(broadcast=served).memory(cfg, model, batch_size=1) == layers * half * tokens


def test_the_foretold_change_is_the_polynomial_of_what_it_was_fitted_to() -> None:
    cache = StepCache(0.1, (2.0, 0.0, -1.0), (0.0, 3.0))
    found = cache.foretold(torch.tensor([0.5, 1.0, 2.0, 9.0]))
    assert found.tolist() == [0.0, 1.0, 7.0, 17.0]  # below 0 is none, beyond what was seen the last
