"""Packing: batches of different shapes go through a model as one row of tokens, without padding.

After "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution" (arXiv:2307.06304). Linear layers
see the row [N, D]; attention is block-diagonal, a frame, a place or a clip a block; each clip keeps its own timestep,
positions and caption. So a clip's prediction is what it is alone, whatever shares its row.

The layers are the models' own, and the order of operations that of their blocks. A batch of one shape is a part of the
row that is still [B, T, S, D] as a view, so norms and gates, which differ from clip to clip, go by batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from opensora_repro.kernels import eager, ops
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.cross_attention import (
    CrossAttention,
    PackedCaptions,
    Varlen,
    end_to_end,
    positions_under,
    varlen_kernel,
)
from opensora_repro.models.dit import DiT
from opensora_repro.models.layers import Attention, check_latents, computing_dtype, unpatchify
from opensora_repro.models.recompute import HostStack, run_block
from opensora_repro.models.stdit import STDiT


class Row:
    """How batches of tokens [B, T, S, D] lie in a row [N, D]: end to end, each in its own order."""

    def __init__(self, batches: Sequence[Tensor], varlen: Varlen | None) -> None:
        """`varlen`: attention of sequences end to end; None: each batch's by itself."""
        self.grids = [(len(x), x.shape[1], x.shape[2]) for x in batches]  # clips, frames of tokens, places
        self.sizes = [math.prod(grid) for grid in self.grids]
        self.samples = [clips for clips, _, _ in self.grids]
        self.clips = [frames * places for clips, frames, places in self.grids for _ in range(clips)]  # tokens of each
        self.varlen = varlen
        if varlen is not None:
            self._lay_sequences(batches[0].device)

    def _lay_sequences(self, device: torch.device) -> None:
        """Where sequences begin and end, int32 [sequences + 1], and the longest one's length, by what they go over.

        A place's tokens lie frames apart: `by_place` lists the row's tokens place by place, `by_frame` leads back.
        """
        spans = {
            "space": [(clips * frames, places) for clips, frames, places in self.grids],
            "time": [(clips * places, frames) for clips, frames, places in self.grids],
            "space_time": [(clips, frames * places) for clips, frames, places in self.grids],
        }
        self.ends = {
            over: (to_device(_ends(found), device), max(length for _, length in found)) for over, found in spans.items()
        }
        first, by_place = 0, []
        for size, grid in zip(self.sizes, self.grids, strict=True):
            by_place.append(first + torch.arange(size).view(grid).transpose(1, 2).flatten())
            first += size
        order = torch.cat(by_place)
        self.by_place, self.by_frame = to_device(order, device), to_device(order.argsort(), device)

    def join(self, batches: Iterable[Tensor]) -> Tensor:
        """Batches [B, T, S, D] -> the row [N, D]; of one batch a view."""
        flat = [x.flatten(0, 2) for x in batches]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def split(self, row: Tensor) -> list[Tensor]:
        """The row [N, D] -> batches [B, T, S, D], views."""
        return [x.unflatten(0, grid) for x, grid in zip(row.split(self.sizes), self.grids, strict=True)]

    def share(self, vectors: Tensor) -> Sequence[Tensor]:
        """One vector a clip, [clips, ...] -> each batch's, [B, ...]."""
        return vectors.split(self.samples)

    def attend(self, layer: Attention, x: Tensor) -> Tensor:
        """The layer's self-attention on the row [N, D]."""
        heads, over = layer.num_heads, layer.over
        if self.varlen is None:
            qkv = self.split(layer.qkv(x))
            return layer.proj(self.join(_attention_of_batch(part, heads, over) for part in qkv))
        if over == "time":  # once here, before the projection triples the channels
            x = x.index_select(0, self.by_place)
        q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(1)  # [N, H, d] each
        ends, longest = self.ends[over]
        out = layer.proj(self.varlen(q, k, v, ends, ends, longest, longest).flatten(1))
        return out.index_select(0, self.by_frame) if over == "time" else out

    def read(self, layer: CrossAttention, x: Tensor, text: Tensor, captions: PackedCaptions) -> Tensor:
        """The layer's cross-attention of the row [N, D] to embedded caption tokens [N', D], each clip to its own."""
        q = layer.q_linear(x).unflatten(-1, (layer.num_heads, -1))  # [N, H, d]
        k, v = layer.split(layer.kv_linear(text), captions)
        if self.varlen is None:
            assert captions.tokens is not None
            counts = [len(tokens) or 1 for tokens in captions.tokens]
            clips = zip(q.split(self.clips), k.split(counts), v.split(counts), strict=True)
            out = torch.cat([_attention_of_clip(*clip) for clip in clips])
        else:
            ends, longest = self.ends["space_time"]
            out = self.varlen(q, k, v, ends, captions.ends, longest, captions.width)
        return layer.proj(out.flatten(1))


def _ends(spans: Sequence[tuple[int, int]]) -> Tensor:
    """So many sequences of such a length, batch after batch."""
    lengths = torch.cat([torch.full((count,), length) for count, length in spans])
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def _attention_of_batch(qkv: Tensor, num_heads: int, over: str) -> Tensor:
    """[B, T, S, 3 * H * d] -> [B, T, S, H * d]."""
    out = eager.attention(*eager.split_heads(qkv, num_heads, over))
    return eager.merge_heads(out, qkv.shape[1], qkv.shape[2], over)


def _attention_of_clip(*qkv: Tensor) -> Tensor:
    """Queries [n, H, d], keys and values [L, H, d] -> [n, H, d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in qkv)
    return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# PixArt and STDiT


class PackedSTDiT(STDiT):
    """An STDiT that also takes a list of batches of different shapes; it packs them and returns a list."""

    def forward(self, latents: Any, *inputs: Any, **conditions: Any) -> Any:
        if isinstance(latents, Tensor):
            return super().forward(latents, *inputs, **conditions)
        return self.forward_packed(latents, *inputs, **conditions)

    def forward_packed(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        *,
        drop_text: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
    ) -> list[Tensor]:
        """Predict float32 [B, C_out, T, H, W] for each batch of latents [B, C, T, H, W], all in one row.

        The rest is as `STDiT.forward` takes it, a row for each clip, in the order of the batches. A mask in a GPU's
        memory is waited for. Outputs and gradients are those of a `forward` of each batch.
        """
        self.check_text(text, mask, len(timestep))
        if mask is not None and len(mask) != len(text):
            raise ValueError(f"expected a caption mask of {len(text)} rows, one a clip, got {len(mask)}")
        counts = [len(batch) for batch in latents]
        sizes = [[None] * len(counts) if x is None else x.split(counts) for x in (image_size, aspect_ratio)]
        conditions, embedded, tables = [], [], []
        for batch, *of_batch in zip(latents, timestep.split(counts), *sizes, strict=True):
            check_latents(batch, of_batch[0], self.cfg.in_channels)
            conditions.append(self.embed_condition(batch, *of_batch))
            tokens, table = self.embed(batch)
            embedded.append(tokens)
            tables.append(table)
        row, t = Row(embedded, _varlen_of(self, text.device)), torch.cat(conditions)  # [clips, D]
        modulation = rearrange(self.t_block(t), "b (six d) -> six b 1 1 d", six=6)
        read = positions_under(mask) if mask is not None else [list(range(text.shape[1]))] * len(text)
        captions = end_to_end(read, text.shape[1], text.device)
        y = captions.take(self.y_embedder(text, drop_text))  # [N', D]

        x, temporal = row.join(embedded), tables
        keep = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        host = HostStack(x.device) if keep != "none" and self.offload_activations else None
        for block in self.blocks:
            with contextlib.nullcontext() if host is None else host.holding(x):
                x = run_block(keep, _Packed(block, row), x, y, modulation, captions, temporal)
            temporal = [None] * len(latents)
        return _predictions(self, row, x, t, latents)


class _Packed:
    """A block as `run_block` takes it."""

    def __init__(self, block: Any, row: Row) -> None:
        self.block, self.row, self.hidden_size = block, row, block.hidden_size

    def __call__(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        captions: PackedCaptions,
        temporal: Sequence[Tensor | None],
    ) -> Tensor:
        """x [N, D]; `temporal` [T, 1, D] of each batch joins the temporal branch's input."""
        row, block = self.row, self.block
        vectors = map(row.share, block.vectors(modulation))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors

        parts = row.split(x)  # [B, T, S, D] each
        y = row.split(row.attend(block.attn, row.join(map(ops.norm_modulate, parts, shift_msa, scale_msa))))
        parts = list(map(ops.gate_residual, parts, gate_msa, y))
        if block.attn_temp is not None:
            y = row.split(row.attend(block.attn_temp, row.join(_add(parts, temporal))))
            parts = list(map(ops.gate_residual, parts, gate_msa, y))
        y = row.split(row.read(block.cross_attn, row.join(parts), text, captions))
        both = list(map(ops.residual_norm_modulate, parts, [None] * len(parts), y, shift_mlp, scale_mlp))
        y = row.split(block.mlp(row.join(normed for _, normed in both)))
        return row.join(map(ops.gate_residual, (x for x, _ in both), gate_mlp, y))


# ---------------------------------------------------------------------------------------------------------------------
# DiT and Latte


class PackedDiT(DiT):
    """A DiT, or Latte, that also takes a list of batches of different shapes; it packs them and returns a list."""

    def forward(self, latents: Any, *inputs: Any) -> Any:
        return (
            super().forward(latents, *inputs) if isinstance(latents, Tensor) else self.forward_packed(latents, *inputs)
        )

    def forward_packed(
        self, latents: Sequence[Tensor], timestep: Tensor, condition: Tensor, mask: None = None
    ) -> list[Tensor]:
        """As PackedSTDiT's; the rest is as `DiT.forward` takes it, a row for each clip."""
        counts = [len(batch) for batch in latents]
        for batch in zip(latents, timestep.split(counts), condition.split(counts), strict=True):
            self.check_inputs(*batch, mask)
        c = self.t_embedder(timestep) + rearrange(self.y_embedder(condition), "b 1 d -> b d")
        embedded, tables = zip(*(self.embed(batch) for batch in latents), strict=True)
        row = Row(embedded, _varlen_of(self, timestep.device))
        x, none = row.join(embedded), [None] * len(latents)
        for i, block in enumerate(self.blocks):
            x = _run_dit_block(block, row, x, c, tables if i == self.temporal_from else none)
        return _predictions(self, row, x, c, latents)


def _run_dit_block(block: Any, row: Row, x: Tensor, condition: Tensor, times: Sequence[Tensor | None]) -> Tensor:
    """x [N, D]; `times` [T, 1, D] of each batch joins it."""
    vectors = map(row.share, block.vectors(condition))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
    parts = _add(row.split(x), times)  # [B, T, S, D] each
    y = row.split(row.attend(block.attn, row.join(map(ops.norm_modulate, parts, shift_msa, scale_msa))))
    both = list(map(ops.residual_norm_modulate, parts, gate_msa, y, shift_mlp, scale_mlp))
    y = row.split(block.mlp(row.join(normed for _, normed in both)))
    return row.join(map(ops.gate_residual, (x for x, _ in both), gate_mlp, y))


# ---------------------------------------------------------------------------------------------------------------------
# Both


def _add(batches: Sequence[Tensor], tables: Sequence[Tensor | None]) -> list[Tensor]:
    return [x if table is None else x + table for x, table in zip(batches, tables, strict=True)]


def _predictions(model: STDiT | DiT, row: Row, x: Tensor, condition: Tensor, latents: Sequence[Tensor]) -> list[Tensor]:
    """The final layer, which is narrow, by batch."""
    patches = map(model.final_layer, row.split(x), row.share(condition))
    sizes = (batch.shape[2:] for batch in latents)
    return [unpatchify(out, model.cfg.patch_size, size) for out, size in zip(patches, sizes, strict=True)]


def _varlen_of(model: STDiT | DiT, device: torch.device) -> Varlen | None:
    dtype = computing_dtype(model.x_embedder.proj.weight, device)
    return varlen_kernel(device, dtype, model.cfg.hidden_size // model.cfg.num_heads)
