"""On a CPU: norm and modulation of many tokens against their twins, and when it is computed so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.sides import random_weights
from opensora_repro.kernels import eager, ops
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.stdit import STDiT

EPS = 1e-6


@pytest.fixture
def choose() -> Iterator[Callable[[str, str], str]]:
    before = ops.chosen()
    yield ops.choose
    ops.choose(before, "cpu")


def tensors(samples: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (samples, 3, 5, 12), "gate": (samples, 1, 1, 12), "y": (samples, 3, 5, 12)}
    sizes |= dict.fromkeys(("shift", "scale"), (samples, 1, 1, 12))
    made = {name: torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def results(module: Any, given: dict[str, Tensor], gated: bool) -> list[Tensor]:
    """Outputs and gradients of both operations."""
    x, y, shift, scale = (given[name] for name in ("x", "y", "shift", "scale"))
    outputs = [
        module.norm_modulate(x, shift, scale, EPS),
        *module.residual_norm_modulate(x, given["gate"] if gated else None, y, shift, scale, EPS),
    ]
    inputs = [value for name, value in given.items() if gated or name != "gate"]
    return [*outputs, *torch.autograd.grad([output.square().sum() for output in outputs], inputs)]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
def test_it_computes_what_its_twin_does(
    choose: Any, monkeypatch: pytest.MonkeyPatch, samples: int, gated: bool
) -> None:
    monkeypatch.setattr(ops, "LARGE", 1)
    choose("auto", "cpu")
    expected = results(eager, tensors(samples, torch.float64), gated)
    torch.testing.assert_close(results(ops, tensors(samples, torch.float64), gated), expected, rtol=1e-12, atol=1e-12)
    for found, reference in zip(results(ops, tensors(samples, torch.float32), gated), expected, strict=True):
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)


def test_it_is_for_many_tokens_of_one_type_where_nobody_asks_for_the_twins(choose: Any) -> None:
    many, vector = torch.zeros(2, 64, 32, 64), torch.zeros(2, 1, 1, 64)
    assert many[0].numel() == ops.LARGE
    choose("auto", "cpu")
    assert ops.pays(many, vector, vector)
    assert not ops.pays(many[:, 1:], vector, vector)
    assert not ops.pays(many.to("meta"), vector, vector)
    assert not ops.pays(many, vector, vector.bfloat16())
    choose("eager", "cpu")
    assert not ops.pays(many, vector, vector)


def test_one_vector_may_serve_all_samples(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LARGE", 1)
    choose("auto", "cpu")
    given = tensors(3, torch.float64)
    one = {name: given[name][:1] for name in ("shift", "scale")}
    found = ops.norm_modulate(given["x"], **one, eps=EPS)
    torch.testing.assert_close(found, eager.norm_modulate(given["x"], **one, eps=EPS))


@pytest.mark.parametrize("keep", ["none", "selective", "full"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_learns_the_same(choose: Any, monkeypatch: pytest.MonkeyPatch, keep: str, bf16: bool) -> None:
    monkeypatch.setattr(ops, "LARGE", 1)
    torch.manual_seed(0)
    model = random_weights(STDiT(STDiTConfig(hidden_size=32, depth=2, num_heads=2, caption_channels=8)))
    model.activation_checkpointing = keep
    dtype = torch.float32 if bf16 else torch.float64  # of which autocast makes bf16
    model, latents, text = model.to(dtype), torch.randn(2, 4, 3, 4, 6, dtype=dtype), torch.randn(2, 5, 8, dtype=dtype)
    passed, found = [], {}
    own = ops.norm_by_sample
    monkeypatch.setattr(ops, "norm_by_sample", lambda *given: (passed.append(1), own(*given))[1])
    for kernels in ("eager", "auto"):
        choose(kernels, "cpu")
        model.zero_grad(set_to_none=True)
        passed.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(latents, torch.tensor([3.0, 700.0]), text)
        output.square().mean().backward()
        assert bool(passed) == (kernels == "auto")
        found[kernels] = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for value, expected in zip(found["auto"], found["eager"], strict=True):
        assert (value - expected).norm() <= (2e-2 if bf16 else 1e-10) * expected.norm()
