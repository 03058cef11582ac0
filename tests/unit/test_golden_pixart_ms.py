"""PixArt-1024-MS, told the picture's size: against the published code, and what it does when not told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora_repro.models import layers
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import POSITION_TABLES, STDiT, pixart_ms_xl_2
from tests.golden import load_case, model_config, relative_error

TINY = STDiTConfig(
    hidden_size=48,
    depth=1,
    num_heads=4,
    caption_channels=16,
    model_max_length=10,
    temporal_attention=False,
    size_conditioning=True,
)


def make_model(cfg: STDiTConfig = TINY) -> STDiT:
    """Return a model none of whose branches is silent."""
    torch.manual_seed(0)
    model = STDiT(cfg).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


def make_inputs(height: int = 6, width: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 1, height, width, generator=generator)
    return latents, torch.tensor([20.0, 700.5]), torch.randn(2, 10, 16, generator=generator)


def test_model_case(golden_dir: Path) -> None:
    case = load_case(golden_dir, "pixart_ms")
    model = STDiT(replace(model_config(case.info, temporal_attention=False), size_conditioning=True))
    model.load_state_dict(case.group("param"))
    x, y = case["in.x"].requires_grad_(), case["in.y"].requires_grad_()
    size = {"image_size": case["in.data_info.hw"], "aspect_ratio": case["in.data_info.ar"]}
    out = model(x, case["in.timestep"], y[:, 0], case["in.mask"], **size)
    tolerances = case.info["tolerances"]
    assert relative_error(out, case["out"]) <= tolerances["out_rel"]

    (out * case["gout"]).sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters()} | {"input.x": x.grad, "input.y": y.grad}
    assert set(case.group("grad")) == set(case.info["grads"])
    for key, expected in case.group("grad").items():
        assert relative_error(grads[key], expected) <= tolerances["grad_rel"], key


def test_published_keys(golden_dir: Path) -> None:
    with torch.device("meta"):
        model = pixart_ms_xl_2()
    shapes = load_case(golden_dir, "keys_pixartms_xl2_opensora_1x1024").info["shapes"]
    expected = {key: shape for key, shape in shapes.items() if key not in POSITION_TABLES}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected
    assert sum(value.numel() for value in model.parameters()) == 611_349_152
    assert (model.cfg.space_scale, model.cfg.base_size) == (2.0, 64)


@torch.no_grad()
def test_the_size_is_the_latents_unless_told() -> None:
    model, inputs = make_model(), make_inputs(height=6, width=10)
    expected = model(*inputs)
    size, ratio = torch.tensor([[48.0, 80.0]] * 2), torch.tensor([0.6, 0.6])
    assert torch.equal(model(*inputs, image_size=size, aspect_ratio=ratio), expected)
    assert torch.equal(model(*inputs, image_size=size.long(), aspect_ratio=ratio[:, None]), expected)
    for told in ({"image_size": size.flip(1)}, {"image_size": 2 * size}, {"aspect_ratio": 1 / ratio}):
        assert relative_error(model(*inputs, **told), expected) > 1e-3, told


@torch.no_grad()
def test_the_size_is_told_to_every_block_and_the_final_layer() -> None:
    """What the embedders add to the timestep's vector [B, D]: height, width, then their ratio, a third each."""
    model, inputs = make_model(), make_inputs()
    size, ratio = torch.tensor([[100.0, 200.0], [300.0, 400.0]]), torch.tensor([0.5, 0.75])
    embedded = model._embed_size(inputs[0], size, ratio)
    thirds = [model.csize_embedder(size[:, 0]), model.csize_embedder(size[:, 1]), model.ar_embedder(ratio)]
    torch.testing.assert_close(embedded, torch.cat(thirds, dim=1))
    seen = []
    for module, place in ((model.t_block, 0), (model.final_layer, 1)):
        module.register_forward_pre_hook(lambda _module, given, place=place: seen.append(given[place]))
    model(*inputs, image_size=size, aspect_ratio=ratio)
    for vector in seen:
        torch.testing.assert_close(vector, model.t_embedder(inputs[1]) + embedded)
    assert len(seen) == 2


@torch.no_grad()
def test_base_size_stretches_a_picture_that_is_not_square() -> None:
    """3 rows and 5 columns of places, stretched to 8 steps an axis at half the step."""
    model = make_model(replace(TINY, base_size=8, space_scale=2.0))
    frequencies = 10000.0 ** (-torch.arange(12).double() / 12)
    places = [(row / 2 * 8 / 3 * frequencies, col / 2 * 8 / 5 * frequencies) for row in range(3) for col in range(5)]
    expected = torch.stack([torch.cat([col.sin(), col.cos(), row.sin(), row.cos()]) for row, col in places])
    table, _ = model.add_positions(torch.zeros(1, 1, 15, 48), rows=3)
    torch.testing.assert_close(table[0, 0].double(), expected, atol=1e-6, rtol=0)
    square = layers.spatial_positions(48, 3, 5, scale=2.0, base_size=3)  # without: the root of 15 places
    table, _ = make_model(replace(TINY, space_scale=2.0)).add_positions(torch.zeros(1, 1, 15, 48), rows=3)
    torch.testing.assert_close(table[0, 0].double(), square, atol=1e-6, rtol=0)


def test_initial_weights_of_the_size_embedders() -> None:
    model = STDiT(replace(TINY, hidden_size=384))
    for embedder in (model.csize_embedder, model.ar_embedder):
        for index in (0, 2):
            assert embedder.mlp[index].weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not embedder.mlp[index].bias.any()


def test_without_size_conditioning_nothing_is_added() -> None:
    model = make_model(replace(TINY, size_conditioning=False))
    assert not [key for key in model.state_dict() if key.startswith(("csize", "ar_"))]
    with pytest.raises(ValueError, match=r"need model\.size_conditioning"):
        model(*make_inputs(), image_size=torch.ones(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_attention": True}, "need model.temporal_attention=false"),
        ({"temporal_attention": True, "size_conditioning": False, "base_size": 8}, "need model.temporal_attention=fal"),
        ({"hidden_size": 64}, "model.hidden_size=64 must be a multiple of 3"),
        ({"base_size": -1}, "model.base_size=-1 must be 0 or more"),
    ],
)
def test_wrong_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STDiT(replace(TINY, **change))


def test_wrong_sizes_are_named() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"expected image_size \[2, 2\], got \[2\]"):
        model(*make_inputs(), image_size=torch.ones(2))
    with pytest.raises(ValueError, match=r"expected aspect_ratio \[2\], got \[1\]"):
        model(*make_inputs(), aspect_ratio=torch.ones(1))
