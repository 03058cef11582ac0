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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from opensora_repro.kernels import eager, ops
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.captioned import Block, BlockInputs, CaptionedModel
from opensora_repro.models.cross_attention import (
    CrossAttention,
    PackedCaptions,
    Varlen,
    end_to_end,
    positions_under,
    varlen_kernel,
)
from opensora_repro.models.dit import DiT
from opensora_repro.models.layers import Attention, computing_dtype, unpatchify
from opensora_repro.models.recompute import HostStack, run_block
from opensora_repro.models.stdit import STDiT
from opensora_repro.models.stdit2 import STDiT2, STDiT2Block
from opensora_repro.models.stdit3 import STDiT3


class Row:
    """How batches of tokens [B, T, S, D] lie in a row [N, D]: end to end, each in its own order."""

    def __init__(
        self, batches: Sequence[Tensor], varlen: Varlen | None, rotary: Sequence[Tensor | None] | None = None
    ) -> None:
        """`varlen`: attention of sequences end to end; None: each batch's by itself. `rotary`: each one's table."""
        self.grids = [(len(x), x.shape[1], x.shape[2]) for x in batches]  # clips, frames of tokens, places
        self.sizes = [math.prod(grid) for grid in self.grids]
        self.samples = [clips for clips, _, _ in self.grids]
        self.clips = [frames * places for clips, frames, places in self.grids for _ in range(clips)]  # tokens of each
        self.varlen = varlen
        self.rotary = [None] * len(batches) if rotary is None else rotary
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
        tables = [
            None if table is None else table.repeat(clips * places, 1, 1)
            for table, (clips, _, places) in zip(self.rotary, self.grids, strict=True)
        ]
        # Of the row's tokens place by place, [N, 1, d]
        self.rotary_row = None if tables[0] is None else torch.cat([table for table in tables if table is not None])

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
            tables = self.rotary if over == "time" else [None] * len(self.grids)
            qkv = map(layer.turned, self.split(layer.qkv(x)), tables)
            return layer.proj(self.join(_attention_of_batch(part, heads, over) for part in qkv))
        if over == "time":  # once here, before the projection triples the channels
            x = x.index_select(0, self.by_place)
        q, k, v = layer.qkv(x).unflatten(-1, (3, heads, -1)).unbind(1)  # [N, H, d] each
        q, k = layer.turn(q, k, self.rotary_row if over == "time" else None)
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
# PixArt and the STDiTs


class PackedModel(CaptionedModel):
    """One that also takes a list of batches of different shapes; it packs them and returns a list."""

    inputs: Callable[..., BlockInputs]

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
        frame_mask: Sequence[Tensor | None] | None = None,
        **conditions: Tensor | None,
    ) -> list[Tensor]:
        """Predict float32 [B, C_out, T, H, W] for each batch of latents [B, C, T, H, W], all in one row.

        The rest is as the model's `forward` takes it, a row for each clip, in the order of the batches; of masks over
        frames one a batch. A caption mask in a GPU's memory is waited for. Outputs and gradients are those of a
        `forward` of each batch.
        """
        text, mask = self.unpack_text(text, mask)
        self.check_text(text, mask, len(timestep))
        if mask is not None and len(mask) != len(text):
            raise ValueError(f"expected a caption mask of {len(text)} rows, one a clip, got {len(mask)}")
        counts = [len(batch) for batch in latents]
        given: list[dict[str, Any]] = [{"frame_mask": mask} for mask in frame_mask or [None] * len(counts)]
        for name, values in conditions.items():
            if values is not None:
                for of_batch, part in zip(given, values.split(counts), strict=True):
                    of_batch[name] = part
        batches = zip(latents, timestep.split(counts), given, strict=True)
        inputs = [self.inputs(batch, times, **of_batch) for batch, times, of_batch in batches]
        tokens, vectors, final, temporal = zip(*inputs, strict=True)
        row = Row(tokens, _varlen_of(self, text.device), temporal if self.temporal_everywhere else None)
        of_samples = all(each.shape[2] == 1 for each in vectors)  # then all in one piece
        modulation = torch.cat(vectors, dim=1) if of_samples else vectors
        read = positions_under(mask) if mask is not None else [list(range(text.shape[1]))] * len(text)
        captions = end_to_end(read, text.shape[1], text.device)
        y = captions.take(self.embed_text(text, drop_text))  # [N', D]

        x = row.join(tokens)
        later = temporal if self.temporal_everywhere else (None,) * len(latents)
        keep = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        host = HostStack(x.device) if keep != "none" and self.offload_activations else None
        with self.as_precise_as(x):
            for block in self.in_order():
                with contextlib.nullcontext() if host is None else host.holding(x):
                    x = run_block(keep, _Packed(block, row), x, y, modulation, captions, temporal)
                temporal = later
            return _predictions(self, row, x, final, latents)


class PackedSTDiT(PackedModel, STDiT):
    """An STDiT, or PixArt, that also takes lists."""


class PackedSTDiT2(PackedModel, STDiT2):
    """An STDiT2 that also takes lists."""


class PackedSTDiT3(PackedModel, STDiT3):
    """An STDiT3 that also takes lists."""


class _Packed:
    """A block as `run_block` takes it."""

    def __init__(self, block: Block, row: Row) -> None:
        self.block, self.row, self.hidden_size = block, row, block.hidden_size

    def __call__(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor | Sequence[Tensor],
        captions: PackedCaptions,
        temporal: Sequence[Tensor | None],
    ) -> Tensor:
        """x [N, D]; `modulation` of all clips, or of each batch; `temporal` [T, 1, .] of each batch."""
        row, block = self.row, self.block
        if isinstance(modulation, Tensor):
            vectors = [row.share(vector) for vector in block.vectors(modulation)]
        else:
            vectors = list(zip(*map(block.vectors, modulation), strict=True))
        shift_mlp, scale_mlp, gate_mlp = vectors[3:6]

        parts = self._attend(row.split(x), vectors, temporal)  # [B, T, S, D] each
        y = row.split(row.read(block.cross_attn, row.join(parts), text, captions))
        both = list(map(ops.residual_norm_modulate, parts, [None] * len(parts), y, shift_mlp, scale_mlp))
        y = row.split(block.mlp(row.join(normed for _, normed in both)))
        return row.join(map(ops.gate_residual, (x for x, _ in both), gate_mlp, y))

    def _attend(
        self, parts: list[Tensor], vectors: Sequence[Sequence[Tensor]], temporal: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """As the blocks' `attend` does it."""
        row, block = self.row, self.block
        shift, scale, gate, *_ = vectors
        y = row.split(row.attend(block.attn, row.join(map(ops.norm_modulate, parts, shift, scale))))
        if isinstance(block, STDiT2Block):
            assert block.attn_temp is not None
            shift, scale, gate_temp = vectors[6:]
            both = list(map(ops.residual_norm_modulate, parts, gate, y, shift, scale))
            y = row.split(row.attend(block.attn_temp, row.join(normed for _, normed in both)))
            return list(map(ops.gate_residual, (x for x, _ in both), gate_temp, y))
        parts = list(map(ops.gate_residual, parts, gate, y))
        if block.attn_temp is None:
            return parts
        y = row.split(row.attend(block.attn_temp, row.join(_add(parts, temporal))))
        return list(map(ops.gate_residual, parts, gate, y))


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
        return _predictions(self, row, x, row.share(c), latents)


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


def _predictions(
    model: CaptionedModel | DiT, row: Row, x: Tensor, conditions: Sequence[Tensor], latents: Sequence[Tensor]
) -> list[Tensor]:
    """The final layer, which is narrow, by batch."""
    patches = map(model.final_layer, row.split(x), conditions)
    sizes = (batch.shape[2:] for batch in latents)
    return [unpatchify(out, model.cfg.patch_size, size) for out, size in zip(patches, sizes, strict=True)]


def _varlen_of(model: CaptionedModel | DiT, device: torch.device) -> Varlen | None:
    dtype = computing_dtype(model.x_embedder.proj.weight, device)
    return varlen_kernel(device, dtype, model.cfg.hidden_size // model.cfg.num_heads)
