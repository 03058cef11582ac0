"""The communication of Open-Sora 1.0's own sequence parallelism, re-enacted: an all-to-all around every attention.

Read off the public v1.0 sources (opensora/models/stdit/stdit.py, opensora/models/layers/blocks.py,
opensora/acceleration/communications.py) and a public port of them. Tokens are one sequence of N = T * S a sample. After
the patch embedding each of p ranks keeps N / p of them; before the last layer they are gathered again. Every attention
is split by heads, so each all-to-all swaps sequence and heads. Numbers in an exchange, for D channels and batch B:

    per block       spatial attention     3 * B * N * D / p  in (q, k, v fused),  B * N * D / p  out
                    temporal attention    the same again
                    cross-attention           B * N * D / p  in (q),              B * N * D / p  out
                    caption keys, values  each rank keeps its heads; their gradients are gathered, two all-gathers
    the whole       after the blocks, an all-gather of tokens B * N * D / p; backward, one of their gradients before

Six all-to-alls a block against our two, 10 * B * N * D / p against 4. Backward reverses each; checkpointing runs a
block's forward exchanges once more. An all-to-all of n numbers sends n * (p - 1) / p, an all-gather n * (p - 1).

The layers between the exchanges are only as real as the exchanges need: what is counted is what autograd then issues.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_repro.parallel.sequence import even_shares, swap

TOKENS = 1  # axis of [B, N, ...]


def gather(x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, axis)


def own_part(x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), axis)[dist.get_rank(group)]


class _Keep(torch.autograd.Function):
    """Keep this rank's part; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.axis = group, axis
        return own_part(x, group, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gather(grad, ctx.group, ctx.axis), None, None


class _Gather(torch.autograd.Function):
    """Gather all parts; of the gradient, this rank's part is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:  # type: ignore[override]
        ctx.group, ctx.axis = group, axis
        return gather(x, group, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return own_part(grad, ctx.group, ctx.axis), None, None


class EverywhereBlock(nn.Module):
    """Three attentions' exchanges on tokens [B, N / p, D]; a sum stands for each attention itself."""

    def __init__(self, dim: int, heads: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.heads = heads
        self.group = group
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in ("space", "time"))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in ("space", "time", "caption"))
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """`text` [M, D]: the captions of the batch end to end, without padding."""
        for qkv, proj in zip(self.qkv, self.proj, strict=False):
            heads = self._to_heads(rearrange(qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.heads))
            x = x + proj(self._to_tokens(heads.sum(2)))
        q = self._to_heads(rearrange(self.q_linear(x), "b n (h d) -> b n h d", h=self.heads))
        k, v = rearrange(self.kv_linear(text), "m (two h d) -> two m h d", two=2, h=self.heads).unbind(0)
        k, v = _Keep.apply(k, self.group, 1), _Keep.apply(v, self.group, 1)
        return x + self.proj[-1](self._to_tokens(q + (k * v).mean(0))).tanh()

    def _to_heads(self, x: Tensor) -> Tensor:
        """[B, N / p, ..., H, d] -> [B, N, ..., H / p, d]"""
        size = dist.get_world_size(self.group)
        split = (x.ndim - 2, even_shares(self.heads, size))
        return swap(x, self.group, split=split, join=(TOKENS, [x.shape[TOKENS]] * size))

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[B, N, H / p, d] -> [B, N / p, D]"""
        size = dist.get_world_size(self.group)
        split = (TOKENS, even_shares(x.shape[TOKENS], size))
        return swap(x, self.group, split=split, join=(2, even_shares(self.heads, size))).flatten(2)


class EverywhereModel(nn.Module):
    """The exchanges of a whole model on tokens [B, N, D]."""

    def __init__(self, dim: int, depth: int, heads: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.gradient_checkpointing = False
        self.embed = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(EverywhereBlock(dim, heads, group) for _ in range(depth))
        self.last = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = _Keep.apply(self.embed(x), self.group, TOKENS)
        for block in self.blocks:
            x = checkpoint(block, x, text, use_reentrant=False) if self.gradient_checkpointing else block(x, text)
        return self.last(_Gather.apply(x, self.group, TOKENS))
