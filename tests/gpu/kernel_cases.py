"""The fused kernels beside their eager twins: what to call on which tensors, and how far apart the two are.

The same cases are run in Triton's interpreter by the tests, and on a GPU by `make gpu` and benchmarks.kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EPS = 1e-6
# Types of the residual stream, of what branches add to it, and of autocast: float32 training, bf16 training as it is
# done here, and a model whose weights are all of one short type.
TYPES = {
    "fp32": ("float32", "float32", ""),
    "bf16 autocast": ("float32", "bfloat16", "bfloat16"),
    "bf16": ("bfloat16", "bfloat16", ""),
    "fp16": ("float16", "float16", ""),
}
# Root mean square of the difference over that of float64's values: rounding to the type, once. Triton's interpreter
# cuts bfloat16 off instead of rounding it, which doubles the error.
TOLERANCE = {"fp32": 2e-6, "bf16 autocast": 4e-3, "bf16": 4e-3, "fp16": 5e-4}


@dataclass(frozen=True)
class Sizes:
    """Tokens [B, T, S, D] of H heads; the MLP is F wide."""

    B: int
    T: int
    S: int
    D: int
    H: int
    F: int


@dataclass(frozen=True)
class Case:
    """`call(ops or eager, *inputs)`; `kept` names the large tensors a backward pass reads besides gradients."""

    call: Callable[..., Any]
    inputs: list[Any]  # tensors or None
    kept: Callable[[Sequence[Any], Sequence[Any]], list[Any]]  # of the inputs and outputs
    autocast: str = ""
    roundings: int = 1  # to the type, one after the other
    passed: int = 0  # how many of the first inputs get the output's own gradient, which nobody writes

    def run(self, kernels: ModuleType, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        import torch

        device = self.inputs[0].device.type
        dtype = getattr(torch, self.autocast or "float32")
        with torch.autocast(device, dtype) if self.autocast else contextlib.nullcontext():
            found = self.call(kernels, *inputs)
        return found if isinstance(found, tuple) else (found,)


def cases(sizes: Sizes, types: str, device: torch.device) -> dict[str, Case]:
    """One case a kernel and way of calling it, with random tensors, laid out in memory as the model's are."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    stream, branch, autocast = TYPES[types]
    vector = "float32" if autocast else stream

    def make(dtype: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(getattr(torch, dtype)).requires_grad_()

    B, T, S, D, H, F = sizes.B, sizes.T, sizes.S, sizes.D, sizes.H, sizes.F
    x, y = make(stream, B, T, S, D), make(branch, B, T, S, D)
    # As temporal attention leaves it, and a part of the frames, as sequence parallelism takes it.
    by_place = make(branch, B, S, T, D).detach().transpose(1, 2).requires_grad_()
    some = make(stream, B, T + 1, S, D).detach()[:, :T].requires_grad_()
    # Modulation vectors come as one tensor [6, B, 1, 1, D], or [B, 6 * D].
    shift, scale, gate = (make(vector, B, 6, 1, 1, D).detach()[:, i].requires_grad_() for i in range(3))

    # Of frames, where some are given
    of_frames = [make(vector, B, 3, T, 1, D).detach()[:, i].requires_grad_() for i in range(3)]

    def norm(k: Any, *tensors: Any) -> Any:
        return k.norm_modulate(*tensors, EPS)

    def residual(k: Any, *tensors: Any) -> Any:
        return k.residual_norm_modulate(*tensors, EPS)

    def gated(k: Any, *tensors: Any) -> Any:
        return k.gate_residual(*tensors)

    def gelu(k: Any, *tensors: Any) -> Any:
        return k.bias_gelu(*tensors)

    def attend(k: Any, qkv: Tensor) -> Any:
        return k.time_attention(qkv, H)

    return {
        "norm, modulate": Case(norm, [x, shift, scale], _first, autocast),
        "norm, modulate; part of the frames": Case(norm, [some, shift, scale], _first, autocast),
        "gate, residual": Case(gated, [x, gate, y], _third, passed=1),
        "gate, residual; by place": Case(gated, [some, gate, by_place], _third, passed=1),
        "residual, norm, modulate": Case(residual, [x, None, y, shift, scale], _sum, autocast),
        "gate, residual, norm, modulate": Case(residual, [x, gate, by_place, shift, scale], _sum_and_third, autocast),
        "norm, modulate; by frame": Case(norm, [some, *of_frames[:2]], _first, autocast),
        "gate, residual; by frame": Case(gated, [some, of_frames[2], by_place], _third),
        "residual, norm, modulate; by frame": Case(residual, [x, None, y, *of_frames[:2]], _sum, autocast),
        "gate, residual, norm, modulate; by frame": Case(
            residual, [x, of_frames[2], by_place, *of_frames[:2]], _sum_and_third, autocast
        ),
        "bias, GELU": Case(gelu, [make(branch, B * T * S, F), make(vector, F)], _first),
        # Of the weights, then of what they are multiplied with
        "attention over time": Case(attend, [make(branch, B, T, S, 3 * D)], _first, roundings=2),
        "GELU": Case(gelu, [make(branch, B, T * S, F), None], _first),
    }


# What a backward pass reads besides gradients and vectors


def _first(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    return [inputs[0]]


def _third(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    return [inputs[2]]


def _sum(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    return [outputs[0]]


def _sum_and_third(inputs: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    return [outputs[0], inputs[2]]


def errors(case: Case, types: str) -> dict[str, float]:
    """Each output's and each gradient's error against float64, as a share of the tolerance: above 1 is a fault."""
    import torch

    from opensora_repro.kernels import eager, ops

    generator = torch.Generator(case.inputs[0].device).manual_seed(1)
    found = case.run(ops, case.inputs)
    # Gradients arrive laid out as the next operation likes, here by place and not by frame.
    grads = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in found]
    grads = [g.transpose(1, 2).contiguous().transpose(1, 2) if g.ndim == 4 else g for g in grads]
    given = [value for value in case.inputs if value is not None]
    found += torch.autograd.grad(found, given, grads)

    wide: list[Any] = [None if v is None else v.detach().double().requires_grad_() for v in case.inputs]
    expected = case.call(eager, *wide)
    expected = expected if isinstance(expected, tuple) else (expected,)
    wide = [value for value in wide if value is not None]
    expected += torch.autograd.grad(expected, wide, [grad.double() for grad in grads])
    shapes = [tuple(a.shape) == tuple(b.shape) for a, b in zip(found, expected, strict=True)]
    assert all(shapes), [(a.shape, b.shape) for a, b in zip(found, expected, strict=True)]
    names = [f"output {i}" for i in range(len(grads))] + [f"gradient {i}" for i in range(len(given))]
    pairs, allowed = zip(names, found, expected, strict=True), case.roundings * TOLERANCE[types]
    return {name: rms(a.double() - b) / max(rms(b), 1e-12) / allowed for name, a, b in pairs}


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def adamw_errors(shapes: Sequence[Sequence[int]], device: torch.device, *, num_steps: int = 4) -> dict[str, float]:
    """Largest differences, over the largest value, of everything that AdamW steps leave, from torch's in float64.

    The gradients are bfloat16, one parameter has none in the second step, the first lies at an odd address. Every step
    is followed by one that must be skipped.
    """
    import torch

    from opensora_repro.kernels import ops

    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(tuple(shape), generator=generator) for shape in shapes]
    wide = [torch.nn.Parameter(value.double()) for value in masters]
    optimizer = torch.optim.AdamW(wide, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    shadows = [value.double() for value in masters]
    params = [_at_odd_address(value.to(device)) if i == 0 else value.to(device) for i, value in enumerate(masters)]
    means, squares = ([torch.zeros_like(value) for value in params] for _ in range(2))
    scale, one = torch.full((), 1 / 0.7, device=device), torch.ones((), device=device)
    averages = [value.clone() for value in params]
    steps = [torch.zeros((), device=device) for _ in params]
    for number in range(num_steps):
        grads = [torch.randn(tuple(shape), generator=generator).bfloat16() for shape in shapes]
        chosen = [i for i in range(len(params)) if i or number != 1]
        for i, parameter in enumerate(wide):
            parameter.grad = grads[i].double() * 0.7 if i in chosen else None
            steps[i] += i in chosen
        optimizer.step()
        lists: list[Sequence[Any]] = [
            params, [grad.to(device) for grad in grads], means, squares, steps, averages,
        ]  # fmt: skip
        *given, own_averages = ([values[i] for i in chosen] for values in lists)
        options: dict[str, Any] = {
            "lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "averages": own_averages,
            "average_weight": 0.3,
        }  # fmt: skip
        ops.adamw(*given, **options, grad_scale=scale, found_inf=1 - one)
        broken = [torch.full_like(grad, torch.nan) for grad in given[1]]
        ops.adamw(given[0], broken, *given[2:], **options, grad_scale=scale * torch.nan, found_inf=one)
        for i in chosen:
            shadows[i].lerp_(wide[i].detach(), 0.3)
    state = [optimizer.state[parameter] for parameter in wide]
    return {
        "weights": _worst(params, wide),
        "first moments": _worst(means, [each["exp_avg"] for each in state]),
        "second moments": _worst(squares, [each["exp_avg_sq"] for each in state]),
        "averages": _worst(averages, shadows),
    }


def _at_odd_address(value: Tensor) -> Tensor:
    """The same values, four bytes off what wide loads need."""
    import torch

    room = torch.empty(value.numel() + 1, dtype=value.dtype, device=value.device)
    return room[1:].view(value.shape).copy_(value)


def _worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a.double().cpu() - b.detach().cpu()).abs().max() / b.detach().abs().max()) for a, b in pairs)


@contextlib.contextmanager
def using(kernels: str, device: torch.device) -> Iterator[None]:
    """Compute with these kernels for the block, backward passes included."""
    from opensora_repro.kernels import ops

    before = ops.chosen()
    ops.choose(kernels, device.type)
    try:
        yield
    finally:
        ops.choose(before, device.type)
