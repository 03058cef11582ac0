"""The kernels' twins in plain torch: what each computes, readable, and the reference that they are tested against.

Tokens are [B, T, S, D]; shift, scale and gate are one vector a sample, [B, 1, 1, D], or a frame, [B, T, 1, D].
Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Which tokens see each other, as the way queries, keys and values leave [B, T, S, D] and come back.
_SPLIT = {
    "space": "b t s (h d) -> (b t) h s d",
    "time": "b t s (h d) -> (b s) h t d",
    "space_time": "b t s (h d) -> b h (t s) d",
}
PROGRAMS = 65_535  # along an axis of CUDA's grid but the first, on which attention kernels lay sequences and heads out
_MERGE = {
    "space": "(b t) h s d -> b t s (h d)",
    "time": "(b s) h t d -> b t s (h d)",
    "space_time": "b h (t s) d -> b t s (h d)",
}


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then x * (1 + scale) + shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """Return x + gate * y."""
    return torch.addcmul(x, gate, y)


def residual_norm_modulate(
    x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x + gate * y, and that normalised and modulated; no gate is a gate of ones."""
    x = residual(x, gate, y)
    return x, norm_modulate(x, shift, scale, eps)


def residual(x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    return x + y if gate is None else gate_residual(x, gate, y)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """tanh-approximated GELU of x + bias; x [..., D], bias [D]."""
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate="tanh")


def split_heads(qkv: Tensor, num_heads: int, over: str) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, S, 3 * H * d] -> queries, keys and values, each [N, H, L, d].

    `over`: tokens see those of their frame ("space": N = B * T, L = S), of their place ("time": N = B * S, L = T) or of
    the whole video ("space_time": N = B, L = T * S).
    """
    # In chunks: their gradients are put side by side in one pass, those of an unbound axis take two.
    q, k, v = (rearrange(part, _SPLIT[over], h=num_heads) for part in qkv.chunk(3, dim=-1))
    return q, k, v


def merge_heads(out: Tensor, frames: int, places: int, over: str) -> Tensor:
    """[N, H, L, d] -> [B, T, S, H * d], the way back of `split_heads`."""
    sizes = {"t": frames, "s": places}
    known = {"space": ("t",), "time": ("s",), "space_time": ("t", "s")}[over]
    return rearrange(out, _MERGE[over], **{axis: sizes[axis] for axis in known})


def attention(q: Tensor, k: Tensor, v: Tensor, *, at_once: int | None = None) -> Tensor:
    """Attention of [N, H, L, d], `at_once` sequences at a time; None: on CUDA as many as have `PROGRAMS` heads."""
    if at_once is None:
        at_once = max(PROGRAMS // q.shape[1], 1) if q.device.type == "cuda" else len(q)
    if len(q) <= at_once:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(*(x.split(at_once) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def time_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Frames of each place among themselves: [B, T, S, 3 * H * d] -> [B, T, S, H * d]."""
    q, k, v = split_heads(qkv, num_heads, "time")
    # There may be no place at all, which not every attention kernel takes.
    out = attention(q, k, v) if q.numel() else q
    return rearrange(out, _MERGE["time"], b=len(qkv), s=qkv.shape[2])


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    averages: Sequence[Tensor] = (),
    average_weight: float = 0.0,
) -> None:
    """AdamW's step in place, on float32 masters of any shape.

    `steps`: the number of each parameter's step, from 1, float32 []. `grad_scale` divides the gradients, which stay as
    they are; where `found_inf` is 1, all does. `averages` move towards the new weights by `average_weight`.
    """
    if found_inf is not None and found_inf.item():  # the twin waits for the answer, the kernel does not
        return
    for i, (param, grad, mean, square) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        scaled = grad.to(param.dtype) if grad_scale is None else grad.to(param.dtype) / grad_scale
        step = steps[i].item()
        mean.lerp_(scaled, 1 - betas[0])
        square.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        denominator = (square / (1 - betas[1] ** step)).sqrt_().add_(eps)
        param.mul_(1 - lr * weight_decay).addcdiv_(mean, denominator, value=-lr / (1 - betas[0] ** step))
        if averages:
            averages[i].lerp_(param, average_weight)
