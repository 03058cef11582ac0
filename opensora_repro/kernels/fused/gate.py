"""The gated residual x + gate * y. Its gradients: dx = dout, dy = gate * dout, dgate = sum(y * dout) over tokens."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora_repro.kernels.fused.rows import adjacent, cut, of_each_sample, partial_sums, power_of_two


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """[B, T, S, D] in the dtype torch would promote to; gate is [B, 1, 1, D]."""
    return _GateResidual.apply(x, gate, y)  # type: ignore[no-any-return]


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        x, gate, y = adjacent(x), adjacent(gate), adjacent(y)
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), gate.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        samples, frames, places, channels = x.shape
        tiles = cut(frames * places, power_of_two(channels), samples, long=False)
        if x.numel():
            _forward[(tiles.parts, samples)](
                x, gate, y, out, frames * places, places, channels,
                *x.stride()[:3], *y.stride()[:3], gate.stride(0),
                ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.num_warps,
            )  # fmt: skip
        ctx.save_for_backward(gate, y)
        ctx.x_dtype = x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        gate, y = ctx.saved_tensors
        dout = adjacent(dout)
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        samples, frames, places, channels = y.shape
        tiles = cut(frames * places, power_of_two(channels), samples, long=True)
        sums = partial_sums(1, samples, tiles, channels, y)
        if y.numel():
            _backward[(tiles.parts, samples)](
                gate, y, dout, dy, sums, frames * places, places, channels,
                *y.stride()[:3], *dout.stride()[:3], gate.stride(0),
                STEPS=tiles.steps, ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.num_warps,
            )  # fmt: skip
        return dout.to(ctx.x_dtype), of_each_sample(sums[0], gate.dtype), dy


@triton.jit
def _forward(
    x, gate, y, total, tokens, places, channels, x_b, x_t, x_s, y_b, y_t, y_s, gate_b,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < channels
    inside = (token < tokens)[:, None] & in_row[None, :]
    frame, place = token // places, token % places
    v = tl.load(x + (sample * x_b + frame * x_t + place * x_s)[:, None] + column[None, :], mask=inside, other=0.0)
    at = (sample * y_b + frame * y_t + place * y_s)[:, None] + column[None, :]
    branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + sample * gate_b + column, mask=in_row, other=0.0).to(tl.float32)
    result = v.to(tl.float32) + branch * factor[None, :]
    out = (sample * tokens + token)[:, None] * channels + column[None, :]
    tl.store(total + out, result.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate, y, dtotal, dy, sums, tokens, places, channels, y_b, y_t, y_s, d_b, d_t, d_s, gate_b,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    in_row = column < channels
    factor = tl.load(gate + sample * gate_b + column, mask=in_row, other=0.0).to(tl.float32)
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        token = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & in_row[None, :]
        frame, place = token // places, token % places
        at = (sample * y_b + frame * y_t + place * y_s)[:, None] + column[None, :]
        branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        at = (sample * d_b + frame * d_t + place * d_s)[:, None] + column[None, :]
        d = tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        dgate += tl.sum(branch * d, axis=0)
        out = (sample * tokens + token)[:, None] * channels + column[None, :]
        tl.store(dy + out, (d * factor[None, :]).to(dy.dtype.element_ty), mask=inside)
    row = (sample * tl.num_programs(0) + part) * channels + column
    tl.store(sums + row, dgate, mask=in_row)
