"""tanh-approximated GELU of x + bias.

tanh(u) = 2 * sigmoid(2 * u) - 1 makes it z * s with z = x + bias and s = sigmoid(2 * u(z)), u(z) = sqrt(2 / pi) * (z +
0.044715 * z**3); its derivative is s + 2 * z * s * (1 - s) * u'(z).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora_repro.kernels.fused.rows import cut, partial_sums, power_of_two

WIDEST = 1024  # channels of a tile


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """[..., D] in the dtype of x; bias is [D]."""
    return _BiasGelu.apply(x, bias)  # type: ignore[no-any-return]


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        bias = None if bias is None else bias.contiguous()
        out = torch.empty_like(x)
        rows, channels, block, blocks = _sizes(x)
        tiles = cut(rows, block, blocks, long=False)
        if x.numel():
            _forward[(tiles.parts, blocks)](
                x, bias, out, rows, channels,
                BIASED=bias is not None, ROWS=tiles.rows, BLOCK=block, num_warps=tiles.num_warps,
            )  # fmt: skip
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        dout, dx = dout.contiguous(), torch.empty_like(x)
        rows, channels, block, blocks = _sizes(x)
        tiles = cut(rows, block, blocks, long=bias is not None)
        sums = None if bias is None else partial_sums(1, 1, tiles, channels, x)
        if x.numel():
            _backward[(tiles.parts, blocks)](
                x, bias, dout, dx, sums, rows, channels,
                BIASED=bias is not None, STEPS=tiles.steps, ROWS=tiles.rows, BLOCK=block, num_warps=tiles.num_warps,
            )  # fmt: skip
        return dx, None if sums is None else sums[0, 0].sum(dim=0).to(bias.dtype)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, channels, channels of a tile, tiles side by side."""
    channels = x.shape[-1]
    block = min(WIDEST, power_of_two(channels))
    return x.numel() // max(channels, 1), channels, block, -(-channels // block)


@triton.jit
def _forward(
    x, bias, out, rows, channels, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    at = row[:, None] * channels + column[None, :]
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 * sqrt(2 / pi)
    tl.store(out + at, (z * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, bias, dout, dx, sums, rows, channels,
    BIASED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < channels
    dbias = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & in_row[None, :]
        at = row[:, None] * channels + column[None, :]
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if BIASED:
            z += tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        slope = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        dz = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32) * slope
        dbias += tl.sum(dz, axis=0)
        tl.store(dx + at, dz.to(dx.dtype.element_ty), mask=inside)
    if BIASED:
        tl.store(sums + part * channels + column, dbias, mask=in_row)
