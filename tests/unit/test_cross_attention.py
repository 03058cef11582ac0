"""Captions of different length: however they lie in memory, each path gives what plain attention behind a mask does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.cross_attention import (
    CrossAttention,
    FoldedText,
    KeysValues,
    PackedCaptions,
    PaddedCaptions,
    WholeCaptions,
    lay_out,
    varlen_kernel,
)
from opensora_repro.models.stdit import STDiT

CPU = torch.device("cpu")
DIM, HEADS, LENGTH = 48, 4, 10
HOLES = [[0, 1, 1, 0, 0, 1, 0, 0, 0, 1], [0] * 9 + [1]]


def prefix(*lengths: int) -> Tensor:
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


MASKS = {
    "of one length": prefix(4, 4),
    "whole": prefix(10, 10),
    "of different length": prefix(3, 8),
    "one row for all": prefix(6),
    "with holes": torch.tensor(HOLES).bool(),
    "one empty": prefix(0, 7),
    "one empty, one token": prefix(0, 1),
    "all empty": prefix(0, 0),
}


def plain_varlen(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, max_q: int, max_k: int) -> Tensor:
    """The twin of the GPU's kernel: sample by sample, softmax written down."""
    parts = []
    for i in range(len(q_ends) - 1):
        a, b, c = (x[ends[i] : ends[i + 1]] for x, ends in ((q, q_ends), (k, k_ends), (v, k_ends)))
        assert 0 < len(b) <= max_k and len(a) <= max_q
        weights = torch.einsum("qhd,khd->hqk", a, b) / math.sqrt(q.shape[-1])
        parts.append(torch.einsum("hqk,khd->qhd", weights.softmax(-1), c))
    return torch.cat(parts)


def reference(attention: CrossAttention, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Every token of every caption, an additive mask, and zeros for a caption without any token."""
    mask = mask.repeat(len(x) // len(mask), 1)
    q = attention.q_linear(x).flatten(1, 2).unflatten(-1, (HEADS, -1))
    k, v = attention.kv_linear(text).unflatten(-1, (2, HEADS, -1)).unbind(2)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = (weights + torch.where(mask, 0.0, -1e9)[:, None, None]).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v) * mask.any(1)[:, None, None, None]
    return attention.proj(out.flatten(2)).view_as(x)


def make_attention() -> CrossAttention:
    torch.manual_seed(0)
    attention = CrossAttention(DIM, HEADS)
    for layer in (attention.q_linear, attention.kv_linear, attention.proj):
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.normal_(layer.bias)
    return attention


@pytest.mark.parametrize("how", ["masked", "end to end", "nothing known"])
@pytest.mark.parametrize("name", MASKS)
def test_every_layout_is_plain_attention(name: str, how: str) -> None:
    attention, mask = make_attention().double(), MASKS[name]
    results: list[list[Tensor]] = []
    for plain in (True, False):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 3, 4, DIM, dtype=torch.float64, generator=generator).requires_grad_()
        text = torch.randn(2, LENGTH, DIM, dtype=torch.float64, generator=generator).requires_grad_()
        if plain:
            out = reference(attention, x, text, mask)
        else:
            varlen = plain_varlen if how == "end to end" else None
            captions = lay_out(mask, 2, CPU, varlen=varlen, known=how != "nothing known")
            out = attention(x, captions.take(text), captions)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, text, *attention.parameters()])])
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_nothing_is_computed_on_padding() -> None:
    text = torch.randn(2, LENGTH, DIM)
    same = lay_out(prefix(4, 4), 2, CPU)
    assert type(same) is WholeCaptions and same.take(text).shape == (2, 4, DIM)
    trimmed = lay_out(prefix(3, 8), 2, CPU)
    assert isinstance(trimmed, PaddedCaptions) and trimmed.take(text).shape == (2, 8, DIM)
    packed = lay_out(prefix(3, 8), 2, CPU, varlen=plain_varlen)
    assert isinstance(packed, PackedCaptions) and torch.equal(packed.take(text), torch.cat([text[0, :3], text[1, :8]]))
    assert packed.ends.tolist() == [0, 3, 11] and packed.ends.dtype == torch.int32


def test_there_is_no_kernel_for_sequences_end_to_end_on_a_cpu() -> None:
    assert varlen_kernel(CPU, torch.bfloat16, 64) is None


# ---------------------------------------------------------------------------------------------------------------------
# Text that is prepared once


@pytest.mark.parametrize("kind", [FoldedText, KeysValues])
@pytest.mark.parametrize("name", MASKS)
def test_prepared_text_is_the_text(name: str, kind: type) -> None:
    attention, mask = make_attention(), MASKS[name]
    if kind is KeysValues:
        attention.proj = Wrapped(attention.proj)
    x, text = torch.randn(2, 3, 4, DIM), torch.randn(2, LENGTH, DIM)
    captions = lay_out(mask, 2, CPU)
    with torch.no_grad():
        prepared = attention.prepare(text, captions)
        assert isinstance(prepared[0] if isinstance(prepared, list) else prepared, kind)
        out = attention(x, prepared, captions)
        torch.testing.assert_close(out, reference(attention, x, text, mask), rtol=1e-4, atol=1e-4)


class Wrapped(nn.Linear):
    """As parallelism leaves a layer: what it computes is its own business."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = DIM, DIM, layer.weight, layer.bias


def test_long_captions_are_not_folded() -> None:
    attention = CrossAttention(16, 4)  # four channels a head
    text = torch.randn(2, LENGTH, 16)
    for lengths, kind in (((1, 7), list), ((2, 7), KeysValues)):
        assert isinstance(attention.prepare(text, lay_out(prefix(*lengths), 2, CPU)), kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(attention.prepare(text, lay_out(prefix(1, 1), 2, CPU)), KeysValues)


CONFIG = STDiTConfig(hidden_size=DIM, depth=2, num_heads=HEADS, caption_channels=16, model_max_length=LENGTH)
MODELS: dict[str, dict[str, Any]] = {
    "video": {},
    "image": {"temporal_attention": False},
    "image with its size": {"temporal_attention": False, "size_conditioning": True},
    "short heads": {"num_heads": 12},
}


def make_model(**changes: Any) -> STDiT:
    torch.manual_seed(0)
    model = STDiT(replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mask", [None, "of one length", "of different length", "with holes", "one empty"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_both_halves_of_guidance_share_their_latents(name: str, mask: str | None, autocast: bool) -> None:
    """Prepared text with one set of latents for both halves is the doubled batch, first under its text, then null."""
    model, latents = make_model(**MODELS[name]), torch.randn(2, 4, 3, 6, 8)
    timestep, text = torch.tensor([20.0, 930.5]), torch.randn(2, LENGTH, 16)
    given = None if mask is None else MASKS[mask]
    null = model.null_condition()
    both = torch.cat([text, null.expand(2, -1, -1)])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(latents.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both, given)
        shared = model(latents, timestep, model.prepare_text(text, given, null=null))
        alone = model(latents, timestep, model.prepare_text(text, given))
    tolerance = 1.5e-2 if autocast else 1e-5
    assert rms(shared - expected) < tolerance * rms(expected)
    assert rms(alone - expected[:2]) < tolerance * rms(expected)
    assert rms(expected[:2] - expected[2:]) > 3 * tolerance * rms(expected)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def test_prepared_text_is_checked() -> None:
    model, latents, timestep = make_model(), torch.randn(2, 4, 3, 6, 8), torch.ones(2)
    text = model.prepare_text(torch.randn(3, LENGTH, 16))
    with pytest.raises(ValueError, match="2 latents cannot be repeated over 3 prepared captions"):
        model(latents, timestep, text)
    for wrong in ({"mask": prefix(3, 4)}, {"drop_text": torch.tensor([True, False])}):
        with pytest.raises(ValueError, match="prepared text has its mask already"):
            model(latents, timestep, text, **wrong)
    with pytest.raises(ValueError, match=r"expected a caption mask \[B, 10\], got \[2, 9\]"):
        model.prepare_text(torch.randn(2, LENGTH, 16), torch.ones(2, 9))
