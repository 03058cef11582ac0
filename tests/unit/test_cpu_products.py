"""On a CPU: a linear layer as a convolution against torch's own, and when it is computed so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.sides import random_weights
from opensora_repro.kernels import choice, cpu_products
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.layers import Linear, Mlp
from opensora_repro.models.stdit import STDiT

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.convolution.default, aten.convolution_backward.default)


@pytest.fixture(autouse=True)
def on_such_a_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)
    before = choice.chosen()
    yield
    choice.choose(before, "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "ROWS", 16)
    monkeypatch.setattr(cpu_products, "CHANNELS", 8)


class Counting(TorchDispatchMode):
    """Counts matrix products by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in PRODUCTS:
            self.products[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def results(linear: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of all tensors."""
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    out = linear(*given, *[None] * (3 - len(given)))
    return [out.detach(), *torch.autograd.grad((out * torch.arange(out.shape[-1])).square().sum(), given)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 16, 64, 128), (3, 4, 80, 192), (16, 132), (2, 8, 131)])
@pytest.mark.parametrize("biased", [True, False])
def test_it_computes_what_torch_does(shape: tuple[int, ...], biased: bool, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, (144, shape[-1]), (144,)][: 3 if biased else 2]
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    expected = results(F.linear, tensors)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = results(cpu_products.linear, [tensor.float() for tensor in tensors])
    finally:
        torch.set_num_threads(before)
    for value, wanted in zip(found, expected, strict=True):
        assert value.shape == wanted.shape and value.is_contiguous()
        assert (value - wanted).norm() < 1e-6 * wanted.norm()


def test_tokens_may_lie_in_any_way() -> None:
    frames = torch.randn(2, 9, 16, 128)
    weight = torch.randn(160, 128)
    for x in (frames[:, :8], frames[:, ::2], frames.transpose(1, 2)):
        torch.testing.assert_close(cpu_products.linear(x, weight, None), F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_it_is_for_many_tokens_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(2, 8, 64, 128), torch.zeros(384, 128)
    assert x.numel() == cpu_products.ROWS * cpu_products.CHANNELS
    assert cpu_products.convolves(x, weight) and cpu_products.convolves(x, nn.Parameter(weight))
    assert not cpu_products.convolves(x[:, 1:], weight)  # too few
    assert not cpu_products.convolves(torch.zeros(1025, 128), weight)  # not so many images
    assert not cpu_products.convolves(x, weight[:32])
    assert not cpu_products.convolves(x[..., :64], weight[:, :64])
    assert not cpu_products.convolves(x.bfloat16(), weight.bfloat16())
    assert not cpu_products.convolves(x.double(), weight.double())
    assert not cpu_products.convolves(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_products.convolves(x, weight)

    class Gathered(nn.Parameter):
        """As ColossalAI's, whose values are there while the call runs that it is given to."""

    assert not cpu_products.convolves(x, Gathered(weight))
    choice.choose("eager", "cpu")
    assert not cpu_products.convolves(x, weight)
    choice.choose("auto", "cpu")
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: False)
    assert not cpu_products.convolves(x, weight)


@pytest.mark.usefixtures("small")
def test_layers_ask_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, many, few = Linear(16, 24), torch.randn(1, 2, 16, 16), torch.randn(1, 1, 8, 16)
    taken, own = [], cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda x, *rest: (taken.append(x), own(x, *rest))[1])
    for x in (many, few):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-6)
    assert len(taken) == 1 and taken[0] is many


@pytest.mark.usefixtures("small")
def test_gelu_is_fused_only_where_nobody_asks_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(24, 96, 24), torch.randn(2, 4, 8, 24)
    expected = mlp.fc2(F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh")).detach()
    fused, own = [], cpu_products.linear_gelu
    monkeypatch.setattr(cpu_products, "linear_gelu", lambda *given: (fused.append(1), own(*given))[1])
    learning = mlp(x)
    assert not fused and learning.requires_grad
    for asking in (torch.no_grad, torch.inference_mode):
        with asking():
            torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)
    assert len(fused) == 2
    torch.testing.assert_close(learning.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("keep", ["none", "selective", "full"])
def test_a_model_learns_the_same_with_as_many_products(keep: str) -> None:
    """With activation checkpointing too: the same products are kept, and the same are computed again."""
    torch.manual_seed(0)
    model = random_weights(STDiT(STDiTConfig(hidden_size=32, depth=2, num_heads=2, caption_channels=8)))
    model.activation_checkpointing = keep
    latents, text = torch.randn(2, 4, 4, 4, 8), torch.randn(2, 5, 8)
    found, counted = {}, {}
    for kernels in ("eager", "auto"):
        choice.choose(kernels, "cpu")
        model.zero_grad(set_to_none=True)
        with Counting() as counting:
            output = model(latents, torch.tensor([3.0, 700.0]), text)
            output.square().mean().backward()
        counted[kernels] = counting.products
        found[kernels] = [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for value, expected in zip(found["auto"], found["eager"], strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm()
    plain, ours = counted["eager"], counted["auto"]
    assert plain["convolution"] == 0 < ours["convolution"]
    assert ours["addmm"] + ours["convolution"] == plain["addmm"]
    assert ours["mm"] + 2 * ours["convolution_backward"] == plain["mm"]
    if keep == "none":
        assert ours["convolution"] == ours["convolution_backward"]


CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: 25\nprocessor\t: 1\nvendor_id\t: {}\n"


@pytest.mark.parametrize(
    ("told", "capability", "faster"),
    [
        (CPUINFO.format("AuthenticAMD", "AuthenticAMD"), "AVX512", True),
        (CPUINFO.format("AuthenticAMD", "AuthenticAMD"), "AVX2", False),
        (CPUINFO.format("GenuineIntel", "GenuineIntel"), "AVX512", False),
        ("CPU implementer\t: 0x41\n", "DEFAULT", False),
        (None, "AVX512", True),
    ],
)
def test_the_processor_tells(monkeypatch: pytest.MonkeyPatch, told: str | None, capability: str, faster: bool) -> None:
    def read(path: Path, **_: Any) -> str:
        if told is None:
            raise FileNotFoundError(path)
        return told

    monkeypatch.undo()  # the fixture's answer
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(cpu_products.platform, "processor", lambda: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    assert cpu_products.onednn_is_faster.__wrapped__() is faster
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert cpu_products.onednn_is_faster.__wrapped__() is False
