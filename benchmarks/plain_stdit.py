"""STDiT written down as plainly as its description, to measure against: what the original runs without extensions.

The same parameters under the same names and the same results as `opensora_repro.models.stdit`, but each step by itself:
attention makes its whole matrix of weights and reads it back, modulation is a product and a sum, patches come from a
3-D convolution. Where the original takes one operation of torch or spares itself work, this does as well: GELU is
torch's, queries are scaled instead of the matrix, and captions are read without their padding.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.layers import spatial_positions, temporal_positions


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [..., N, d], k and v [..., M, d] -> [..., N, d]; the [..., N, M] matrix exists in memory."""
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return weights.softmax(dim=-1) @ v


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # [N, L, D]
        q, k, v = rearrange(self.qkv(x), "n l (three h d) -> three n h l d", three=3, h=self.heads)
        return self.proj(rearrange(softmax_attention(q, k, v), "n h l d -> n l (h d)"))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, captions: list[Tensor]) -> Tensor:  # [B, N, D], B times [L, D] -> [B, N, D]
        queries = rearrange(self.q_linear(x), "b n (h d) -> b h n d", h=self.heads)
        pairs = rearrange(self.kv_linear(torch.cat(captions)), "l (two h d) -> two h l d", two=2, h=self.heads)
        each = zip(queries, pairs.split([len(caption) for caption in captions], dim=2), strict=True)
        out = torch.stack([softmax_attention(q, k, v).transpose(0, 1) for q, (k, v) in each])
        return self.proj(rearrange(out, "b n h d -> b n (h d)"))


class FeedForward(nn.Module):
    def __init__(self, dim_in: int, hidden: int, dim_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, hidden)
        self.fc2 = nn.Linear(hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, cfg: STDiTConfig) -> None:
        super().__init__()
        dim = cfg.hidden_size
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = SelfAttention(dim, cfg.num_heads)
        self.attn_temp = SelfAttention(dim, cfg.num_heads)
        self.cross_attn = CrossAttention(dim, cfg.num_heads)
        self.mlp = FeedForward(dim, int(dim * cfg.mlp_ratio), dim)

    def forward(
        self, x: Tensor, captions: list[Tensor], t6: Tensor, frames: int, tpos: Tensor | None
    ) -> Tensor:  # x [B, T S, D], t6 [B, 6, D]
        table = self.scale_shift_table[None] + t6
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)  # each [B, 1, D]
        y = self.norm(x) * (1 + scale1) + shift1
        y = self.attn(rearrange(y, "b (t s) d -> (b t) s d", t=frames))
        x = x + gate1 * rearrange(y, "(b t) s d -> b (t s) d", t=frames)
        y = rearrange(x, "b (t s) d -> (b s) t d", t=frames)
        y = self.attn_temp(y if tpos is None else y + tpos)
        x = x + gate1 * rearrange(y, "(b s) t d -> b (t s) d", b=x.shape[0])
        x = x + self.cross_attn(x, captions)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Named(nn.Module):
    """A bare module to hang parameters on under published names, of which each holds some."""

    proj: nn.Conv3d
    mlp: nn.Sequential
    y_proj: FeedForward
    linear: nn.Linear
    scale_shift_table: nn.Parameter


class PlainSTDiT(nn.Module):
    """Video model for one fixed latent size [C, T, H, W], whole patches only."""

    def __init__(self, cfg: STDiTConfig, size: tuple[int, int, int, int]) -> None:
        super().__init__()
        _, self.frames, height, width = size
        dim, patch = cfg.hidden_size, cfg.patch_size
        self.cfg, self.rows, self.columns = cfg, height // patch[1], width // patch[2]
        self.x_embedder, self.t_embedder, self.y_embedder, self.final_layer = Named(), Named(), Named(), Named()
        self.x_embedder.proj = nn.Conv3d(cfg.in_channels, dim, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder.y_proj = FeedForward(cfg.caption_channels, dim, dim)
        self.y_embedder.register_buffer("y_embedding", torch.zeros(cfg.model_max_length, cfg.caption_channels))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.final_layer.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.final_layer.linear = nn.Linear(dim, math.prod(patch) * cfg.out_channels)
        self.positions = spatial_positions(dim, self.rows, self.columns, scale=cfg.space_scale).float()
        self.times = temporal_positions(dim, self.frames // patch[0], scale=cfg.time_scale).float()

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        angles = timestep.float()[:, None] * torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
        t = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        t6 = rearrange(self.t_block(t), "b (six d) -> b six d", six=6)
        y = self.y_embedder.y_proj(text)
        captions = list(y) if mask is None else [tokens[read] for tokens, read in zip(y, mask.bool(), strict=True)]
        x = rearrange(self.x_embedder.proj(latents), "b d t h w -> b t (h w) d") + self.positions.to(latents)
        x = rearrange(x, "b t s d -> b (t s) d")
        times = self.times.to(latents)
        for i, block in enumerate(self.blocks):
            x = block(x, captions, t6, self.frames // self.cfg.patch_size[0], times if i == 0 else None)
        shift, scale = (self.final_layer.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        x = self.final_layer.linear(self.norm(x) * (1 + scale) + shift)
        p, q, r = self.cfg.patch_size
        return rearrange(x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", h=self.rows, w=self.columns, p=p, q=q, r=r)
