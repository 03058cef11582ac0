"""Layers of the models: patch embedding, attention, embedders, position tables, modulation by frame.

Tokens are four-dimensional everywhere, [B, T, S, D]: samples, latent frames, places in a frame (row by row), channels.
Module and parameter names follow the published state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.kernels import eager, ops
from opensora_repro.kernels.ops import to_device

TIMESTEP_CHANNELS = 256  # width of the timestep's sinusoid
BASE = 10000.0  # of all sinusoids' frequencies
RMS_NORM_EPS = 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Position tables: pure functions of a size, never weights, so any latent size works at call time.


def _sincos(positions: Tensor, dim: int) -> Tensor:
    """Return float64 [N, dim]: the sines, then the cosines, of positions [N] at dim / 2 frequencies."""
    steps = torch.arange(dim // 2, dtype=torch.float64, device=positions.device)
    frequencies = BASE ** -(steps / (dim / 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def spatial_positions(
    dim: int, rows: int, cols: int, *, scale: float | Tensor = 1.0, base_size: int | None = None
) -> Tensor:
    """Return float64 [rows * cols, dim], row by row; the column's sinusoid first, then the row's.

    A position is index / scale; with `base_size` the axes are also stretched to `base_size` steps each, as PixArt does.
    Where the scale is a tensor, []: on its device, which nobody waits for.
    """
    device = scale.device if isinstance(scale, Tensor) else "cpu"
    # Positions are rounded to float32 before the angle, as in the published tables.
    row = torch.arange(rows, dtype=torch.float32, device=device) / scale
    col = torch.arange(cols, dtype=torch.float32, device=device) / scale
    if base_size is not None:
        row, col = row * (base_size / rows), col * (base_size / cols)
    by_row = _sincos(row, dim // 2)[:, None].expand(rows, cols, dim // 2)
    by_col = _sincos(col, dim // 2)[None, :].expand(rows, cols, dim // 2)
    return rearrange(torch.cat([by_col, by_row], dim=-1), "h w d -> (h w) d")


def temporal_positions(dim: int, frames: int, *, scale: float = 1.0) -> Tensor:
    """Return float64 [frames, dim] for positions index / scale."""
    return _sincos(torch.arange(frames, dtype=torch.float64, device="cpu") / scale, dim)


@lru_cache(maxsize=64)
def spatial_table(
    dim: int, rows: int, cols: int, scale: float, base_size: int | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return `spatial_positions` as [S, D] on a device, computed once per size."""
    with torch.inference_mode(False):  # a table first needed while sampling must also serve training
        return spatial_positions(dim, rows, cols, scale=scale, base_size=base_size).float().to(device, dtype)


@lru_cache(maxsize=64)
def temporal_table(dim: int, frames: int, scale: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `temporal_positions` as [T, 1, D] on a device, computed once per length."""
    with torch.inference_mode(False):
        table = temporal_positions(dim, frames, scale=scale).float().to(device, dtype)
        return rearrange(table, "t d -> t 1 d")


@lru_cache(maxsize=64)
def rotary_table(dim: int, frames: int, device: torch.device) -> Tensor:
    """Return float32 [frames, 1, dim]: the cosines, then the sines, of each frame's angles for heads of `dim` channels.

    After "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv:2104.09864).
    """
    with torch.inference_mode(False):
        angles = torch.arange(frames, dtype=torch.float64, device="cpu")[:, None] * rotary_frequencies(dim).double()
        table = torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)
        return rearrange(table, "t d -> t 1 d")


def rotary_frequencies(dim: int) -> Tensor:
    """Return float32 [dim / 2], radians a frame."""
    return BASE ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


@lru_cache(maxsize=16)
def _timestep_frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        steps = torch.arange(half, dtype=torch.float32, device="cpu")
        return torch.exp(-math.log(max_period) * steps / half).to(device)


def timestep_sinusoid(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Return float32 [B, dim], cosines then sines, of timesteps [B]; an odd `dim` ends with a zero column."""
    angles = timestep.float()[:, None] * _timestep_frequencies(dim // 2, max_period, timestep.device)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(table, (0, dim % 2)) if dim % 2 else table


# ---------------------------------------------------------------------------------------------------------------------
# Embedders


class PatchEmbed3D(nn.Module):
    """Latents [B, C, T, H, W] -> tokens [B, T', S, D]; sizes are zero-padded at the end to whole patches."""

    def __init__(self, patch_size: tuple[int, int, int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        p, q, r = self.patch_size
        t, h, w = latents.shape[2:]
        if t % p or h % q or w % r:
            latents = F.pad(latents, (0, -w % r, 0, -h % q, 0, -t % p))
        patches = rearrange(latents, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        # A convolution whose stride is its kernel is one matrix product, and faster as such.
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def draw_patch_kernel(embedder: PatchEmbed3D, generator: torch.Generator | None) -> None:
    """Xavier-uniform, as a matrix over patches."""
    kernel = embedder.proj.weight.flatten(1)  # a view: fills the kernel itself
    nn.init.xavier_uniform_(kernel, generator=generator)


class TimestepEmbedder(nn.Module):
    """Timesteps, or other numbers, [B] -> [B, D].

    The sinusoid is float32 whatever the weights are: in bf16, 999 would become 1000.
    """

    def __init__(self, hidden_size: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.mlp = nn.Sequential(linear(TIMESTEP_CHANNELS, hidden_size), nn.SiLU(), linear(hidden_size, hidden_size))

    def forward(self, timestep: Tensor) -> Tensor:
        sinusoid = timestep_sinusoid(timestep, TIMESTEP_CHANNELS)
        exact = isinstance(self.mlp[0], Float32Linear)
        return self.mlp(sinusoid if exact else sinusoid.to(self.weight.dtype))

    @property
    def weight(self) -> Tensor:
        """The first layer's: where it is, and of which dtype. A parameter, or where it is not trained perhaps none."""
        first: Any = self.mlp[0]
        weight: Tensor = first.weight
        return weight


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, under autocast as well and with weights in half precision.

    For conditions: their layers are small, and what they are rounded by is in every token of all blocks.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class SizeEmbedder(TimestepEmbedder):
    """Numbers [B, n] or [B] -> [B, n * D], those of a sample side by side."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, Float32Linear)

    def forward(self, sizes: Tensor, samples: int | None = None) -> Tensor:
        """Fewer rows than `samples` are repeated, all one after the other. Numbers may lie in host memory."""
        sizes = to_device(sizes if sizes.ndim == 2 else sizes[:, None], self.weight.device)
        embedded = rearrange(super().forward(sizes.flatten()), "(b n) d -> b (n d)", n=sizes.shape[1])
        return embedded if samples is None else tiled(embedded, samples, "sizes")


def scaled_normal(rows: int, columns: int) -> Tensor:
    """Draw [rows, columns] of variance 1 / columns.

    Nothing on the meta device, where PyTorch would import its compiler to draw, and take longer than to read weights.
    """
    empty = torch.empty(rows, columns)
    return empty if empty.is_meta else empty.normal_().div_(columns**0.5)


class CaptionEmbedder(nn.Module):
    """Text embeddings [B, L, Ct] -> [B, L, D]; holds the null caption, a buffer that is saved but never trained."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, hidden_size: int, model_max_length: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)
        self.register_buffer("y_embedding", scaled_normal(model_max_length, caption_channels))

    def forward(self, text: Tensor, drop_text: Tensor | None = None) -> Tensor:
        """Embed captions; rows where `drop_text` [B] is true become the null caption."""
        text = text.to(self.y_embedding.dtype)
        if drop_text is not None:
            text = torch.where(drop_text[:, None, None], self.y_embedding[: text.shape[1]], text)
        return self.y_proj(text)


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between: [..., D_in] -> [..., D_out]."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(self.fc1):
            return self.fc2(ops.linear_gelu(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(ops.bias_gelu(self.fc1(x), None))


def computing_dtype(weight: Tensor, device: torch.device) -> torch.dtype:
    """What a linear layer with this weight gives there: autocast's dtype where that is on, else the weight's."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def is_plain(layer: nn.Linear) -> bool:
    """Whether the layer is no more than its weight and bias: parallelism may have replaced it or wrapped these."""
    return type(layer) is nn.Linear and type(layer.bias) is nn.Parameter


# ---------------------------------------------------------------------------------------------------------------------
# Attention


class RMSNorm(nn.Module):
    """x / root mean square of its channels, times a weight, [..., D] -> float32 [..., D] (arXiv:1910.07467)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), RMS_NORM_EPS)


class Rotary(nn.Module):
    """Holds the frequencies that published files have; never trained.

    They are not read, for in a bf16 model they would be rounded: `rotary_table` has the same ones.
    """

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(head_size // 2), requires_grad=False)
        if not self.freqs.is_meta:
            self.initialize()

    def initialize(self) -> None:
        self.freqs.data.copy_(rotary_frequencies(2 * len(self.freqs)))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channels of [..., d] by angles, of which `table` [..., d] has the cosines, then the sines."""
    cos, sin = table.chunk(2, dim=-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Self-attention on [B, T, S, D] within a frame ("space"), a place ("time") or a whole video ("space_time").

    With `qk_norm` each head's queries and keys are normed. Attention over time may be given a `rotary_table`, by which
    they are turned after the norm, or with `rotary_first` before it. All of it in float32, rounded once.
    """

    attend = staticmethod(ops.time_attention)  # of frames of other processes, too, see parallel/sequence.py

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        over: str = "space",
        *,
        qk_norm: bool = False,
        rotary_first: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.over = over
        self.rotary_first = rotary_first
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads) if qk_norm else None
        self.k_norm = RMSNorm(hidden_size // num_heads) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """`rotary` [T, 1, d] is for attention over time alone."""
        samples, over = len(x), self.over
        if over == "time" and ops.attends_in_place(x):
            return self.proj(self.attend(self.turned(self.qkv(x), rotary), self.num_heads))
        if over == "time":  # one copy here, before the projection triples the channels; then places are frames of time
            x, over = rearrange(x, "b t s d -> (b s) 1 t d"), "space"
        # Views: attention takes any strides, so a copy in its own layout, which the fused split makes, costs more.
        q, k, v = eager.split_heads(self.qkv(x), self.num_heads, over)  # [N, H, L, d]
        q, k = self.turn(q, k, rotary[:, 0] if rotary is not None and self.over == "time" else None)
        out = eager.attention(q, k, v)
        out = self.proj(eager.merge_heads(out, x.shape[1], x.shape[2], over))
        return rearrange(out, "(b s) 1 t d -> b t s d", b=samples) if self.over == "time" else out

    def turned(self, qkv: Tensor, rotary: Tensor | None) -> Tensor:
        """[B, T, S, 3 * H * d] for attention over time, queries and keys normed and turned by `rotary` [T, 1, d]."""
        if self.q_norm is None and rotary is None:
            return qkv
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k))  # [B, T, S, H, d]
        q, k = self.turn(q, k, None if rotary is None else rotary[:, None])
        return torch.cat([q.flatten(-2), k.flatten(-2), v], dim=-1)

    def turn(self, q: Tensor, k: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [..., d], normed and turned by angles that can be broadcast over them."""
        return _turn(q, self.q_norm, table, self.rotary_first), _turn(k, self.k_norm, table, self.rotary_first)


def _turn(x: Tensor, norm: RMSNorm | None, table: Tensor | None, rotary_first: bool) -> Tensor:
    dtype = x.dtype
    if table is not None and rotary_first:
        x = rotate(x, table)
    if norm is not None:
        x = norm(x)
    if table is not None and not rotary_first:
        x = rotate(x, table)
    return x.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Frames that are given, and read at timestep 0, beside those that are generated


def tiled(rows: Tensor, samples: int, what: str) -> Tensor:
    """[n, ...] -> [samples, ...], all rows one after the other as often as it takes."""
    if len(rows) == 0 or samples % len(rows):
        raise ValueError(f"{what} of {len(rows)} rows cannot be repeated over {samples} samples")
    return rows if len(rows) == samples else rows.repeat(samples // len(rows), *[1] * (rows.ndim - 1))


def generated_frames(frame_mask: Tensor | None, latents: Tensor, patch_frames: int) -> Tensor | None:
    """Which frames of tokens are generated, bool [B, T'], of a mask of latents' frames [B, T] or of tokens' [B, T'].

    Fewer rows are repeated. A token is given where all its frames are. None: all are generated, which costs nothing;
    so a mask is taken that lies in host memory and is true everywhere. Into a GPU's nobody looks.
    """
    if frame_mask is None:
        return None
    frames = latents.shape[2]
    tokens = -(-frames // patch_frames)
    if frame_mask.ndim != 2 or frame_mask.shape[1] not in (frames, tokens):
        raise ValueError(f"expected a frame mask [{len(latents)}, {frames}], got {list(frame_mask.shape)}")
    mask = tiled(frame_mask.bool(), len(latents), "a frame mask")
    if mask.shape[1] != tokens:
        mask = F.pad(mask, (0, tokens * patch_frames - frames)).unflatten(1, (tokens, patch_frames)).any(dim=2)
    if mask.device.type == "cpu" and mask.all():
        return None
    return to_device(mask, latents.device)


def of_frames(vectors: Iterable[Tensor], generated: Tensor | None) -> Tensor:
    """Vectors [B, C] of generated frames, and where some are given these frames' -> [B, T', C], else [B, C]."""
    now, *given = vectors
    return now if generated is None else torch.where(generated[..., None], now[:, None], given[0][:, None])


def by_vector(modulation: Tensor, count: int) -> Tensor:
    """[B, count * D], or of frames [B, T, count * D] -> [count, B, 1 or T, 1, D], as blocks take it."""
    modulation = modulation[:, None] if modulation.ndim == 2 else modulation
    return rearrange(modulation, "b t (n d) -> n b t 1 d", n=count)


# ---------------------------------------------------------------------------------------------------------------------
# The final layer


class FinalLayer(nn.Module):
    """Tokens [B, T, S, D] -> patches [B, T, S, pT * pH * pW * C_out].

    The timestep embeddings are [B, D], or of frames [B, T, D].
    """

    def __init__(self, hidden_size: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_volume * out_channels)
        self.scale_shift_table = nn.Parameter(scaled_normal(2, hidden_size))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None] if t.ndim == 2 else t[:, :, None]  # [B, 1 or T, 1, D]
        shift, scale = (self.scale_shift_table[:, None, None, None] + t).unbind(0)
        return self.linear(ops.norm_modulate(x, shift, scale))


def unpatchify(x: Tensor, patch_size: tuple[int, int, int], size: Sequence[int]) -> Tensor:
    """Patches [B, T', S, pT * pH * pW * C] with channels fastest -> float32 [B, C, T, H, W], `size` the last three."""
    p, q, r = patch_size
    frames, height, width = size
    x = rearrange(x, "b t (h w) (p q r c) -> b c (t p) (h q) (w r)", h=-(-height // q), p=p, q=q, r=r)
    return x[:, :, :frames, :height, :width].float()


def count_tokens(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Tokens of a latent [C, T, H, W] under patches (t, h, w); odd sizes are padded up."""
    return math.prod(math.ceil(size / patch) for size, patch in zip(shape[1:], patch_size, strict=True))


def count_frames(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Of these tokens, how many lie one after the other in time."""
    return math.ceil(shape[1] / patch_size[0])


# ---------------------------------------------------------------------------------------------------------------------
# Users' mistakes


def check_sizes(hidden_size: int, num_heads: int, patch_size: tuple[int, ...]) -> None:
    if hidden_size % num_heads:
        raise ValueError(f"model.num_heads={num_heads} does not divide model.hidden_size={hidden_size}")
    if hidden_size % 4:
        raise ValueError(f"model.hidden_size={hidden_size} must be a multiple of 4 (sine and cosine of two axes)")
    if len(patch_size) != 3 or min(patch_size) < 1:
        raise ValueError(f"model.patch_size={patch_size} must be three positive numbers: frames, rows, columns")


def check_latents(latents: Tensor, timestep: Tensor, in_channels: int) -> None:
    if latents.ndim != 5 or latents.shape[1] != in_channels:
        raise ValueError(f"expected latents [B, {in_channels}, T, H, W], got {list(latents.shape)}")
    if timestep.shape != (len(latents),):
        raise ValueError(f"expected one timestep a sample, [{len(latents)}], got {list(timestep.shape)}")
