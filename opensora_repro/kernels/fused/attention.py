"""Attention over time of short videos: the frames of each place among themselves.

Attention kernels made for long sequences pad each to 128 tokens and, on the way back, add queries' gradients up in
float32 memory of that size: eight times the tokens of 16 frames. Here a program has all frames of one place and head.
It reads them where the projection left them and writes the gradients there, so that nothing is copied or padded in
memory, and computes the softmax again on the way back, so that nothing is kept but what the projection gave. Channels
come in pieces: what a program holds at once does not grow with the heads. Programs lie along one axis, which CUDA lets
be 2**31 long; along the others it ends at 65,535.

They are operations of torch's library, with which torch.compile and selective checkpointing deal as with its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opensora_repro.kernels.fused.rows import TYPES, adjacent, power_of_two

PIECE = 32  # channels at once
LEAST_FRAMES = 16  # a tensor core's matrices are no smaller; one warp computes so many rows


@torch.library.custom_op(
    "opensora_repro::short_attention", mutates_args=(), schema="(Tensor qkv, int num_heads) -> Tensor"
)
def short_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """As eager.time_attention."""
    qkv = adjacent(qkv)
    samples, frames, places, channels = qkv.shape
    out = qkv.new_empty(samples, frames, places, channels // 3)
    if out.numel():
        grid, sizes, options = _launch(qkv, num_heads)
        _forward[grid](qkv, out, *sizes, *qkv.stride()[:3], *out.stride()[:3], **options)
    return out


@torch.library.custom_op(
    "opensora_repro::short_attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor qkv, int num_heads) -> Tensor",
)
def _short_attention_backward(dout: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    dout, qkv = adjacent(dout), adjacent(qkv)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel():
        grid, sizes, options = _launch(qkv, num_heads)
        strides = (*qkv.stride()[:3], *dout.stride()[:3], *dqkv.stride()[:3])
        _backward[grid](qkv, dout, dqkv, *sizes, *strides, **options)
    return dqkv


@short_attention.register_fake
def _(qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@_short_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return _short_attention_backward(dout, qkv, ctx.num_heads), None


short_attention.register_autograd(_gradients, setup_context=_keep)


def _launch(qkv: Tensor, num_heads: int) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Programs, sizes and the kernels' constants."""
    samples, frames, places, channels = qkv.shape
    size = channels // (3 * num_heads)
    block = max(LEAST_FRAMES, power_of_two(frames))
    options = {
        "HEADS": num_heads, "SIZE": size, "FRAMES": block, "PIECES": -(-size // PIECE), "PIECE": PIECE,
        # Triton's interpreter multiplies with NumPy, which has no bfloat16.
        "TYPE": TYPES[qkv.dtype] if isinstance(_forward, triton.JITFunction) else tl.float32,
        "num_warps": block // LEAST_FRAMES,
    }  # fmt: skip
    return (samples * places * num_heads,), (frames, places, size**-0.5), options


@triton.jit
def _rows(places, s_b, s_t, s_s, HEADS: tl.constexpr, SIZE: tl.constexpr, FRAMES: tl.constexpr):
    """Where the frames of this program's place and head begin in a tensor of such strides."""
    program = tl.program_id(0).to(tl.int64)  # heads of a place, which lie side by side, go together
    head, place, sample = program % HEADS, program // HEADS % places, program // HEADS // places
    return sample * s_b + place * s_s + head * SIZE + tl.arange(0, FRAMES).to(tl.int64) * s_t


@triton.jit
def _product(a, b, TYPE: tl.constexpr):
    """In float32; of float32 without TensorFloat-32, as torch's own."""
    return tl.dot(a.to(TYPE), b.to(TYPE), input_precision="ieee")


@triton.jit
def _softmax(scores, frames, scale, FRAMES: tl.constexpr):
    """Over the frames that there are."""
    scores = tl.where((tl.arange(0, FRAMES) < frames)[None, :], scores * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _forward(
    qkv, out, frames, places, scale, q_b, q_t, q_s, o_b, o_t, o_s,
    HEADS: tl.constexpr, SIZE: tl.constexpr, FRAMES: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    row = _rows(places, q_b, q_t, q_s, HEADS, SIZE, FRAMES)
    to = _rows(places, o_b, o_t, o_s, HEADS, SIZE, FRAMES)
    there = (tl.arange(0, FRAMES) < frames)[:, None]
    scores = tl.zeros([FRAMES, FRAMES], dtype=tl.float32)
    for piece in range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        inside = there & (channel < SIZE)[None, :]
        at = row[:, None] + channel[None, :]
        q = tl.load(qkv + at, mask=inside, other=0.0)
        k = tl.load(qkv + HEADS * SIZE + at, mask=inside, other=0.0)
        scores += _product(q, tl.trans(k), TYPE)
    weights = _softmax(scores, frames, scale, FRAMES).to(out.dtype.element_ty)
    for piece in range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        inside = there & (channel < SIZE)[None, :]
        v = tl.load(qkv + 2 * HEADS * SIZE + row[:, None] + channel[None, :], mask=inside, other=0.0)
        found = _product(weights, v, TYPE)
        tl.store(out + to[:, None] + channel[None, :], found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    qkv, dout, dqkv, frames, places, scale, q_b, q_t, q_s, o_b, o_t, o_s, d_b, d_t, d_s,
    HEADS: tl.constexpr, SIZE: tl.constexpr, FRAMES: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """With weights P, dP = dO V^T and dS = P * (dP - sum(P * dP)): dQ = dS K, dK = dS^T Q, dV = P^T dO."""
    row = _rows(places, q_b, q_t, q_s, HEADS, SIZE, FRAMES)
    out_row = _rows(places, o_b, o_t, o_s, HEADS, SIZE, FRAMES)
    to = _rows(places, d_b, d_t, d_s, HEADS, SIZE, FRAMES)
    there = (tl.arange(0, FRAMES) < frames)[:, None]
    scores = tl.zeros([FRAMES, FRAMES], dtype=tl.float32)
    dweights = tl.zeros([FRAMES, FRAMES], dtype=tl.float32)
    for piece in range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        inside = there & (channel < SIZE)[None, :]
        at = row[:, None] + channel[None, :]
        q = tl.load(qkv + at, mask=inside, other=0.0)
        k = tl.load(qkv + HEADS * SIZE + at, mask=inside, other=0.0)
        v = tl.load(qkv + 2 * HEADS * SIZE + at, mask=inside, other=0.0)
        do = tl.load(dout + out_row[:, None] + channel[None, :], mask=inside, other=0.0).to(v.dtype)
        scores += _product(q, tl.trans(k), TYPE)
        dweights += _product(do, tl.trans(v), TYPE)
    weights = _softmax(scores, frames, scale, FRAMES)
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=1)[:, None]) * scale
    weights, dscores = weights.to(dqkv.dtype.element_ty), dscores.to(dqkv.dtype.element_ty)
    for piece in range(PIECES):
        channel = piece * PIECE + tl.arange(0, PIECE)
        inside = there & (channel < SIZE)[None, :]
        at = row[:, None] + channel[None, :]
        q = tl.load(qkv + at, mask=inside, other=0.0)
        k = tl.load(qkv + HEADS * SIZE + at, mask=inside, other=0.0)
        do = tl.load(dout + out_row[:, None] + channel[None, :], mask=inside, other=0.0).to(q.dtype)
        dq = _product(dscores, k, TYPE)
        dk = _product(tl.trans(dscores), q, TYPE)
        dv = _product(tl.trans(weights), do, TYPE)
        target = dqkv + to[:, None] + channel[None, :]
        tl.store(target, dq.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(target + HEADS * SIZE, dk.to(dqkv.dtype.element_ty), mask=inside)
        tl.store(target + 2 * HEADS * SIZE, dv.to(dqkv.dtype.element_ty), mask=inside)
