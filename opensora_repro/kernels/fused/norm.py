"""LayerNorm with modulation, alone or of a residual that is added in the same pass.

With v = x (+ gate * y), n = (v - mean) * rstd over D channels and out = n * (1 + scale) + shift, and g = dout * (1 +
scale), the gradients are

    dv = rstd * (g - mean(g) - n * mean(g * n)) (+ what comes to v by itself)
    dx = dv, dy = gate * dv
    dshift = sum(dout), dscale = sum(dout * n), dgate = sum(y * dv), over the sample's tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora_repro.kernels.fused.rows import adjacent, cut, of_each_sample, partial_sums, power_of_two


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[B, T, S, D] in `dtype`; shift and scale are [B, 1, 1, D]."""
    _, normed = _NormModulate.apply(x, None, None, shift, scale, eps, dtype)
    return normed  # type: ignore[no-any-return]


def residual_norm_modulate(
    x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + gate * y in the dtype torch would promote to, and its norm modulated, in `dtype`."""
    total, normed = _NormModulate.apply(x, gate, y, shift, scale, eps, dtype)
    return total, normed


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        y: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor]:
        x, shift, scale = adjacent(x), adjacent(shift), adjacent(scale)
        gate, y = None if gate is None else adjacent(gate), None if y is None else adjacent(y)
        total = x if y is None else torch.empty(x.shape, dtype=_total_dtype(x, gate, y), device=x.device)
        normed = torch.empty(x.shape, dtype=dtype, device=x.device)
        mean, rstd = torch.empty(2, len(x), x[0, ..., 0].numel(), dtype=torch.float32, device=x.device).unbind(0)
        samples, frames, places, channels = x.shape
        tiles = cut(frames * places, power_of_two(channels), samples, long=False)
        if x.numel():
            _forward[(tiles.parts, samples)](
                x, gate, y, shift, scale, total, normed, mean, rstd, frames * places, places, channels, eps,
                *x.stride()[:3], *_strides(y), 0 if gate is None else gate.stride(0), shift.stride(0), scale.stride(0),
                RESIDUAL=y is not None, GATED=gate is not None,
                ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.num_warps,
            )  # fmt: skip
        # Without a gate, whose gradient it makes, the branch itself is not needed.
        ctx.save_for_backward(total, gate, y if gate is not None else None, scale, mean, rstd)
        ctx.x_dtype, ctx.y_dtype, ctx.shift_dtype = x.dtype, None if y is None else y.dtype, shift.dtype
        ctx.set_materialize_grads(False)
        return None if y is None else total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, gate, y, scale, mean, rstd = ctx.saved_tensors
        samples, frames, places, channels = total.shape
        dnormed = torch.zeros_like(total) if dnormed is None else adjacent(dnormed)
        dtotal = None if dtotal is None else adjacent(dtotal)
        dx = torch.empty(total.shape, dtype=ctx.x_dtype, device=total.device)
        shared = gate is None and ctx.y_dtype == dx.dtype  # then the two are the same numbers
        dy = None if ctx.y_dtype is None else dx if shared else torch.empty_like(dx, dtype=ctx.y_dtype)
        tiles = cut(frames * places, power_of_two(channels), samples, long=True)
        sums = partial_sums(2 if gate is None else 3, samples, tiles, channels, total)
        if total.numel():
            written = None if shared else dy
            _backward[(tiles.parts, samples)](
                total, gate, y, scale, mean, rstd, dtotal, dnormed, dx, written, sums,
                frames * places, places, channels,
                *total.stride()[:3], *_strides(y), *_strides(dtotal), *dnormed.stride()[:3],
                0 if gate is None else gate.stride(0), scale.stride(0), sums.stride(0),
                PASSED=dtotal is not None, GATED=gate is not None, BRANCH=written is not None,
                STEPS=tiles.steps, ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.num_warps,
            )  # fmt: skip
        dgate = None if gate is None else of_each_sample(sums[2], gate.dtype)
        dshift, dscale = of_each_sample(sums[0], ctx.shift_dtype), of_each_sample(sums[1], scale.dtype)
        return dx, dgate, dy, dshift, dscale, None, None


def _total_dtype(x: Tensor, gate: Tensor | None, y: Tensor) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return dtype if gate is None else torch.promote_types(dtype, gate.dtype)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else tuple(x.stride()[:3])


@triton.jit
def _forward(
    x, gate, y, shift, scale, total, normed, mean, rstd,
    tokens, places, channels, eps,
    x_b, x_t, x_s, y_b, y_t, y_s, gate_b, shift_b, scale_b,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row = column < channels
    inside = (token < tokens)[:, None] & in_row[None, :]
    frame, place = token // places, token % places
    out = (sample * tokens + token)[:, None] * channels + column[None, :]

    v = tl.load(x + (sample * x_b + frame * x_t + place * x_s)[:, None] + column[None, :], mask=inside, other=0.0)
    v = v.to(tl.float32)
    if RESIDUAL:
        at = (sample * y_b + frame * y_t + place * y_s)[:, None] + column[None, :]
        branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            branch *= tl.load(gate + sample * gate_b + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        rounded = (v + branch).to(total.dtype.element_ty)
        tl.store(total + out, rounded, mask=inside)
        v = rounded.to(tl.float32)  # as the backward pass will read it
    m = tl.sum(v, axis=1) / channels
    centred = tl.where(inside, v - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    factor = 1.0 + tl.load(scale + sample * scale_b + column, mask=in_row, other=0.0).to(tl.float32)
    offset = tl.load(shift + sample * shift_b + column, mask=in_row, other=0.0).to(tl.float32)
    result = centred * r[:, None] * factor[None, :] + offset[None, :]
    tl.store(normed + out, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(mean + sample * tokens + token, m, mask=token < tokens)
    tl.store(rstd + sample * tokens + token, r, mask=token < tokens)


@triton.jit
def _backward(
    total, gate, y, scale, mean, rstd, dtotal, dnormed, dx, dy, sums,
    tokens, places, channels,
    v_b, v_t, v_s, y_b, y_t, y_s, dv_b, dv_t, dv_s, dn_b, dn_t, dn_s, gate_b, scale_b, sums_v,
    PASSED: tl.constexpr, GATED: tl.constexpr, BRANCH: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    in_row = column < channels
    factor = 1.0 + tl.load(scale + sample * scale_b + column, mask=in_row, other=0.0).to(tl.float32)
    dshift = tl.zeros([BLOCK], dtype=tl.float32)
    dscale = tl.zeros([BLOCK], dtype=tl.float32)
    dgate = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        token = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (token < tokens)[:, None] & in_row[None, :]
        frame, place = token // places, token % places
        out = (sample * tokens + token)[:, None] * channels + column[None, :]
        at = (sample * v_b + frame * v_t + place * v_s)[:, None] + column[None, :]
        v = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        at = (sample * dn_b + frame * dn_t + place * dn_s)[:, None] + column[None, :]
        dn = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + sample * tokens + token, mask=token < tokens, other=0.0)
        r = tl.load(rstd + sample * tokens + token, mask=token < tokens, other=0.0)
        n = (v - m[:, None]) * r[:, None]  # where a load was masked, dn is 0, and so is all that n is multiplied with
        dshift += tl.sum(dn, axis=0)
        dscale += tl.sum(dn * n, axis=0)
        g = dn * factor[None, :]
        along = tl.sum(g * n, axis=1) / channels
        dv = r[:, None] * (g - (tl.sum(g, axis=1) / channels)[:, None] - n * along[:, None])
        if PASSED:
            at = (sample * dv_b + frame * dv_t + place * dv_s)[:, None] + column[None, :]
            dv += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + out, dv.to(dx.dtype.element_ty), mask=inside)
        if GATED:
            at = (sample * y_b + frame * y_t + place * y_s)[:, None] + column[None, :]
            branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            dgate += tl.sum(branch * dv, axis=0)
            dv *= tl.load(gate + sample * gate_b + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
        if BRANCH:
            tl.store(dy + out, dv.to(dy.dtype.element_ty), mask=inside)
    row = (sample * tl.num_programs(0) + part) * channels + column
    tl.store(sums + row, dshift, mask=in_row)
    tl.store(sums + sums_v + row, dscale, mask=in_row)
    if GATED:
        tl.store(sums + 2 * sums_v + row, dgate, mask=in_row)
