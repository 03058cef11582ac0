"""Queries, keys and values in the layout of attention, one contiguous tensor each, and the way back.

Both ways are one kernel, which moves heads of d channels between two tensors that are indexed alike, by sample, frame,
place, part (queries, keys or values) and head, at strides of their own. Strides are counted in heads: so the compiler
knows that a head begins at a multiple of its size, and moves several channels at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from opensora_repro.kernels.fused.rows import cut, power_of_two

WIDEST = 1024  # channels of a tile
Strides = tuple[int, ...]  # of samples, frames, places and heads, in heads


def split_heads(qkv: Tensor, num_heads: int, over: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _Split.apply(qkv, num_heads, over)
    return q, k, v


def merge_heads(out: Tensor, frames: int, places: int, over: str) -> Tensor:
    return _Merge.apply(out, frames, places, over)  # type: ignore[no-any-return]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, num_heads: int, over: str) -> tuple[Tensor, ...]:  # type: ignore[override]
        samples, frames, places, channels = qkv.shape
        size = channels // (3 * num_heads)
        qkv = _in_heads(qkv, size)
        shape = _attention_shape((samples, frames, places), num_heads, size, over)
        split = torch.empty(3, *shape, dtype=qkv.dtype, device=qkv.device)
        ctx.sizes, ctx.over = (samples, frames, places, num_heads, size), over
        parts = (num_heads, split.stride(0) // size)
        _move(qkv, split, ctx.sizes, 3, _token_strides(qkv, size), _strides(split[0], frames, places, over), parts)
        return split.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        samples, frames, places, num_heads, size = ctx.sizes
        width = num_heads * size
        dqkv = torch.empty(samples, frames, places, 3 * width, dtype=grads[0].dtype, device=grads[0].device)
        for part, grad in enumerate(grads):
            to, grad = dqkv[..., part * width : (part + 1) * width], _in_heads(grad, size)
            _move(grad, to, ctx.sizes, 1, _strides(grad, frames, places, ctx.over), _token_strides(to, size), (0, 0))
        return dqkv, None, None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, frames: int, places: int, over: str) -> Tensor:  # type: ignore[override]
        size = out.shape[3]
        out = _in_heads(out, size)
        samples = out.shape[0] * out.shape[2] // (frames * places)
        merged = torch.empty(samples, frames, places, out.shape[1] * size, dtype=out.dtype, device=out.device)
        ctx.sizes, ctx.over = (samples, frames, places, out.shape[1], size), over
        _move(out, merged, ctx.sizes, 1, _strides(out, frames, places, over), _token_strides(merged, size), (0, 0))
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        samples, frames, places, num_heads, size = ctx.sizes
        grad = _in_heads(grad, size)
        shape = _attention_shape((samples, frames, places), num_heads, size, ctx.over)
        dout = torch.empty(shape, dtype=grad.dtype, device=grad.device)
        to = _strides(dout, frames, places, ctx.over)
        _move(grad, dout, ctx.sizes, 1, _token_strides(grad, size), to, (0, 0))
        return dout, None, None, None


def _attention_shape(sizes: tuple[int, int, int], num_heads: int, size: int, over: str) -> tuple[int, ...]:
    samples, frames, places = sizes
    batch, length = {
        "space": (samples * frames, places),
        "time": (samples * places, frames),
        "space_time": (samples, frames * places),
    }[over]
    return batch, num_heads, length, size


def _in_heads(x: Tensor, size: int) -> Tensor:
    """`x` with a head's channels side by side and all strides multiples of their number, copied if need be."""
    return x if x.stride(-1) == 1 and not any(stride % size for stride in x.stride()[:-1]) else x.contiguous()


def _token_strides(x: Tensor, size: int) -> Strides:
    """Of a tensor [B, T, S, H * d], by sample, frame, place and head."""
    return (*(stride // size for stride in x.stride()[:3]), 1)


def _strides(x: Tensor, frames: int, places: int, over: str) -> Strides:
    """Of a tensor [N, H, L, d], by sample, frame, place and head."""
    batch, head, length = (stride // x.shape[3] for stride in x.stride()[:3])
    sample, frame, place = {
        "space": (frames * batch, batch, length),
        "time": (places * batch, length, batch),
        "space_time": (batch, places * length, length),
    }[over]
    return sample, frame, place, head


def _move(
    source: Tensor,
    target: Tensor,
    sizes: tuple[int, int, int, int, int],
    num_parts: int,
    source_strides: Strides,
    target_strides: Strides,
    part_strides: tuple[int, int],
) -> None:
    samples, frames, places, num_heads, size = sizes
    columns = num_parts * num_heads * size
    block = min(WIDEST, power_of_two(columns))
    blocks = -(-columns // block)
    tiles = cut(samples * frames * places, block, blocks, long=False)
    if target.numel():
        _copy[(tiles.parts, blocks)](
            source, target, samples * frames * places, frames, places, columns,
            *source_strides, part_strides[0], *target_strides, part_strides[1],
            HEADS=num_heads, SIZE=size, ROWS=tiles.rows, BLOCK=block, num_warps=tiles.num_warps,
        )  # fmt: skip


@triton.jit
def _copy(
    source, target, tokens, frames, places, columns,
    s_b, s_t, s_s, s_h, s_p, t_b, t_t, t_s, t_h, t_p,
    HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    place, frame, sample = token % places, (token // places) % frames, token // (places * frames)
    part, head, channel = (column // (HEADS * SIZE)).to(tl.int64), (column // SIZE) % HEADS, column % SIZE
    from_row, from_head = sample * s_b + frame * s_t + place * s_s, part * s_p + head * s_h
    to_row, to_head = sample * t_b + frame * t_t + place * t_s, part * t_p + head * t_h
    moved = tl.load(source + (from_row[:, None] + from_head[None, :]) * SIZE + channel[None, :], mask=inside)
    tl.store(target + (to_row[:, None] + to_head[None, :]) * SIZE + channel[None, :], moved, mask=inside)
