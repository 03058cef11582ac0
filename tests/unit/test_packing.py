"""Clips of different shapes in one row: predictions and gradients are those of the same clips, each batch by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.sides import random_weights
from opensora_repro.models import packing
from opensora_repro.models.config import DiTConfig, STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.dit import DiT
from opensora_repro.models.packing import PackedDiT
from tests import video_models
from tests.unit.test_cross_attention import plain_varlen

SMALL: dict[str, Any] = {"hidden_size": 48, "depth": 3, "num_heads": 4, "caption_channels": 16}
TEXT = {**SMALL, "model_max_length": 7}
MODELS: dict[str, Any] = {
    "STDiT": STDiTConfig(**TEXT),
    "STDiT of tubelets": STDiTConfig(**TEXT, patch_size=(2, 2, 2), time_scale=0.5),
    "PixArt": STDiTConfig(**TEXT, temporal_attention=False, no_temporal_pos_emb=False),
    "PixArt told the size": STDiTConfig(**TEXT, temporal_attention=False, size_conditioning=True, base_size=4),
    "STDiT2": STDiT2Config(**TEXT),
    "STDiT3": STDiT3Config(**TEXT),
    "STDiT3 of tubelets": STDiT3Config(**TEXT, patch_size=(2, 2, 2)),
    "DiT": DiTConfig(**SMALL, num_classes=5, no_temporal_pos_emb=False),
    "Latte": DiTConfig(**SMALL, condition="text", factorised=True),
}
WIDE = [(2, 4, 4, 6), (1, 1, 8, 4), (3, 5, 5, 4), (1, 3, 4, 6)]  # clips, frames, rows and columns of latents
SQUARE = [(2, 4, 4, 4), (1, 1, 8, 8), (3, 5, 5, 5), (1, 3, 4, 4)]  # which alone DiT takes
LENGTHS = [7, 1, 0, 4, 3, 7, 2]  # of the captions


def make_model(cfg: Any, packed: bool = True) -> Any:
    torch.manual_seed(0)
    if isinstance(cfg, DiTConfig):
        return random_weights((PackedDiT if packed else DiT)(cfg))
    return random_weights(video_models.build(cfg, packed))


def make_inputs(cfg: Any) -> tuple[list[Tensor], list[list[Tensor]], list[dict[str, Tensor]]]:
    """Batches of latents, what `forward` takes of each beside them, by position and by name."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = SQUARE if isinstance(cfg, DiTConfig) else WIDE
    latents = [normal(clips, 4, *size).requires_grad_() for clips, *size in sizes]
    clips = [len(batch) for batch in latents]
    given = [1000 * torch.rand(7, generator=generator)]
    named = {}
    if not isinstance(cfg, DiTConfig):
        mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
        given += [normal(7, 7, 16), mask.roll(1, 1)]  # not only prefixes
        named["drop_text"] = torch.arange(7) == 3
        named |= video_models.conditions(cfg, 7)
        if isinstance(cfg, STDiTConfig) and cfg.size_conditioning:
            named |= {"image_size": 64 + 900 * normal(7, 2).abs(), "aspect_ratio": normal(7).exp()}
    else:
        given.append(torch.arange(7) % 6 if cfg.condition == "label" else normal(7, 1, 16))
    by_batch = [list(values) for values in zip(*(value.split(clips) for value in given), strict=True)]
    parts = {name: value.split(clips) for name, value in named.items()}
    return latents, by_batch, [{name: values[i] for name, values in parts.items()} for i in range(len(clips))]


def work(model: Any, cfg: Any, packed: bool) -> dict[str, Tensor]:
    """Predictions, and gradients of weights and latents."""
    model.zero_grad()
    latents, given, named = make_inputs(cfg)
    if packed:
        whole = {name: torch.cat([of[name] for of in named]) for name in named[0]}
        outputs = model(latents, *map(torch.cat, zip(*given, strict=True)), **whole)
    else:
        outputs = [model(x, *rest, **named) for x, rest, named in zip(latents, given, named, strict=True)]
    torch.stack([out.square().mean() for out in outputs]).sum().backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"latents {i}": x.grad for i, x in enumerate(latents) if x.grad is not None}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        assert (found[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max().item()), name


@pytest.mark.parametrize("kernel", ["a batch's own", "end to end"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_clips_are_the_same_clips(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`end to end`: with the twin of the GPU's kernel, which gives the sequences' ends as that reads them."""
    cfg = MODELS[name]
    model = make_model(cfg)
    expected = work(model, cfg, packed=False)
    if kernel == "end to end":
        monkeypatch.setattr(packing, "varlen_kernel", lambda *_: plain_varlen)
    require_same(work(model, cfg, packed=True), expected)


@pytest.mark.parametrize("kernel", ["a batch's own", "end to end"])
@pytest.mark.parametrize("name", ["STDiT", "STDiT2", "STDiT3"])
def test_given_frames_in_a_row(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask a batch, of one batch none."""
    cfg = MODELS[name]
    model = make_model(cfg)
    if kernel == "end to end":
        monkeypatch.setattr(packing, "varlen_kernel", lambda *_: plain_varlen)
    latents, given, named = make_inputs(cfg)
    masks = [None if i == 1 else video_models.some_frames(*x.shape[:3:2]) for i, x in enumerate(latents)]
    whole = {key: torch.cat([of[key] for of in named]) for key in named[0]}
    with torch.no_grad():
        found = model(latents, *map(torch.cat, zip(*given, strict=True)), frame_mask=masks, **whole)
        for i, x in enumerate(latents):
            expected = model(x, *given[i], frame_mask=masks[i], **named[i])
            torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("keep", "offload"), [("selective", False), ("full", False), ("full", True)])
def test_checkpointed_rows_are_the_same_rows(keep: str, offload: bool) -> None:
    cfg = MODELS["STDiT"]
    model = make_model(cfg)
    expected = work(model, cfg, packed=False)
    model.activation_checkpointing, model.offload_activations = keep, offload
    require_same(work(model, cfg, packed=True), expected)


def test_a_clip_is_untouched_by_what_shares_its_row() -> None:
    """Not even by what is not a number."""
    cfg = MODELS["STDiT"]
    model = make_model(cfg)
    latents, given, _ = make_inputs(cfg)
    rest = list(map(torch.cat, zip(*given, strict=True)))
    with torch.no_grad():
        expected = model(latents, *rest)
        latents[1] = torch.full_like(latents[1], torch.nan)
        found = model(latents, *rest)
    assert found[1].isnan().all()
    assert all(torch.equal(found[i], expected[i]) for i in (0, 2, 3))


def test_a_packed_model_takes_lists_and_single_batches() -> None:
    cfg = MODELS["STDiT"]
    packed, plain = make_model(cfg), make_model(cfg, packed=False)
    assert packed.state_dict().keys() == plain.state_dict().keys()
    latents, given, _ = make_inputs(cfg)
    with torch.no_grad():
        alone = plain(latents[0], *given[0])
        assert torch.equal(packed(latents[0], *given[0]), alone)
        (found,) = packed(latents[:1], *given[0])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="mask of 7 rows, one a clip, got 1"):
            text = torch.cat([values[1] for values in given])
            packed(latents, torch.zeros(7), text, given[0][2][:1])
