"""STDiT2, the network of Open-Sora 1.1: STDiT told sizes, rates and frame counts, with rotary positions over time.

Outputs and state-dict keys are those of the published model, but for given frames in the final layer, which there are
normed a second time. Rotary positions, timesteps and sizes stay float32 in half precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.models.captioned import Block, BlockInputs, CaptionedModel, PreparedText, check_rotary
from opensora_repro.models.config import SIZES, STDiT2Config
from opensora_repro.models.layers import (
    Attention,
    CaptionEmbedder,
    FinalLayer,
    Float32Linear,
    PatchEmbed3D,
    Rotary,
    SizeEmbedder,
    TimestepEmbedder,
    by_vector,
    draw_patch_kernel,
    generated_frames,
    of_frames,
    scaled_normal,
)

# Branches that add nothing at first, so that each can join a pretrained model without disturbing it.
ZERO_INITIALISED = ("cross_attn.proj", "attn_temp.proj", "final_layer.linear")
STD_002 = ("t_embedder.", "t_block.", "t_block_temp.", "y_embedder.")


class STDiT2Block(Block):
    """Spatial attention -> temporal attention with a modulation of its own -> cross-attention -> MLP."""

    def __init__(self, cfg: STDiT2Config) -> None:
        dim, heads, norm = cfg.hidden_size, cfg.num_heads, cfg.qk_norm
        attn = Attention(dim, heads, qk_norm=norm)
        attn_temp = Attention(dim, heads, over="time", qk_norm=norm, rotary_first=cfg.qk_norm_legacy)
        super().__init__(cfg, attn, attn_temp)
        self.scale_shift_table_temporal = nn.Parameter(scaled_normal(3, dim))

    def attend(self, x: Tensor, normed: Tensor, vectors: Sequence[Tensor], temporal: Tensor | None) -> Tensor:
        assert self.attn_temp is not None
        gate, (shift_temp, scale_temp, gate_temp) = vectors[2], vectors[6:]
        x, normed = ops.residual_norm_modulate(x, gate, self.attn(normed), shift_temp, scale_temp)
        return ops.gate_residual(x, gate_temp, self.attn_temp(normed, temporal))

    def vectors(self, modulation: Tensor) -> tuple[Tensor, ...]:
        table = torch.cat([self.scale_shift_table, self.scale_shift_table_temporal])
        return (table[:, None, None, None] + modulation).unbind(0)


class STDiT2(CaptionedModel):
    """Text-conditional diffusion transformer on latents [B, C, T, H, W]; an image is a video of one frame.

    Any latent size and frame count may be given at call time.
    """

    def __init__(self, cfg: STDiT2Config) -> None:
        check_rotary(cfg)
        if cfg.hidden_size % 3:
            raise ValueError(f"model.hidden_size={cfg.hidden_size} must be a multiple of 3 (height, width and ratio)")
        super().__init__(cfg)
        dim = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim, Float32Linear)
        self.t_block = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
        self.t_block_temp = nn.Sequential(nn.SiLU(), Float32Linear(dim, 3 * dim))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, dim, cfg.model_max_length)
        self.rope = Rotary(dim // cfg.num_heads)
        self.blocks = nn.ModuleList(STDiT2Block(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(dim, math.prod(cfg.patch_size), cfg.out_channels)
        self.csize_embedder = SizeEmbedder(dim // 3)
        self.ar_embedder = SizeEmbedder(dim // 3)
        self.fl_embedder = SizeEmbedder(dim)
        self.fps_embedder = SizeEmbedder(dim)
        if not self.x_embedder.proj.weight.is_meta:
            self.initialize_weights()
        if cfg.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | PreparedText,
        mask: Tensor | None = None,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        num_frames: Tensor,
        ar: Tensor,
        frame_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Predict float32 [B, C_out, T, H, W].

        latents: [B, C, T, H, W]. timestep: [B], int or float, 0..1000. text: [B, L, Ct] or [B, 1, L, Ct]. mask: which
        caption tokens exist, [B, L], or fewer rows that are repeated; None: all. A mask in host memory spares the work
        on padding, wherever the latents are.
        fps: frames a second of the source, whatever is left out; height, width: pixels; num_frames: frames of pixels;
        ar: width / height, as training told it. [B] each; of fewer rows all are repeated. The first picture's size is
        everyone's as far as positions go.
        frame_mask: [B, T] bool, which frames are generated; the others are given and read at timestep 0. None: all
        are. See `generated_frames`.
        drop_text, prepared text and first_frame: as `STDiT.forward` takes them.
        """
        told = {"fps": fps, "height": height, "width": width, "num_frames": num_frames, "ar": ar}
        inputs = self.inputs(latents, timestep, frame_mask=frame_mask, first_frame=first_frame, **told)
        return self.predict(latents, inputs, *self.read_text(text, mask, drop_text, len(latents)))

    def inputs(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        num_frames: Tensor,
        ar: Tensor,
        frame_mask: Tensor | None = None,
        first_frame: int = 0,
    ) -> BlockInputs:
        self.check_inputs(latents, timestep, first_frame)
        samples = len(latents)
        generated = generated_frames(frame_mask, latents, self.cfg.patch_size[0])
        times = [timestep] if generated is None else [timestep, torch.zeros_like(timestep)]
        embedded = [self.t_embedder(time) for time in times]  # [B, D] each
        sides = self.csize_embedder(torch.stack([height, width], dim=1), samples)  # [B, 2 * D / 3]
        size = torch.cat([sides, self.ar_embedder(ar, samples)], dim=1)  # [B, D]
        length = self.fl_embedder(num_frames, samples) + self.fps_embedder(fps, samples)  # [B, D]

        spatial = of_frames([self.t_block(t + size) for t in embedded], generated)
        temporal = of_frames([self.t_block_temp(t + length) for t in embedded], generated)
        modulation = by_vector(torch.cat([spatial, temporal], dim=-1), 9)
        # As published: of the final layer's frames the given ones alone are told their size.
        final = of_frames([embedded[0], *(t + size for t in embedded[1:])], generated)
        x, rotary = self.embed_places(latents, height, width, first_frame)  # [B, T', S, D]
        return BlockInputs(x, modulation, final, rotary)

    def in_order(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # a ModuleList does not tell what it holds

    def initial_std(self, name: str) -> float | None:
        return 0.0 if name.endswith(ZERO_INITIALISED) else 0.02 if name.startswith(STD_002) else None

    def initialize_weights(self, only: str = "", generator: torch.Generator | None = None) -> None:
        super().initialize_weights(only, generator)
        if not only:
            draw_patch_kernel(self.x_embedder, generator)


def stdit2_s_2(**changes: Any) -> STDiT2:
    """STDiT2-S/2 (39,422,016 parameters); `changes` are STDiT2Config fields."""
    return _sized("S", changes)


def stdit2_b_2(**changes: Any) -> STDiT2:
    """STDiT2-B/2 (153,519,168 parameters); `changes` are STDiT2Config fields."""
    return _sized("B", changes)


def stdit2_xl_2(**changes: Any) -> STDiT2:
    """STDiT2-XL/2 (767,452,100 parameters); `changes` are STDiT2Config fields."""
    return _sized("XL", changes)


def _sized(size: str, changes: dict[str, Any]) -> STDiT2:
    hidden_size, depth, num_heads = SIZES[size]
    cfg = STDiT2Config(hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    return STDiT2(replace(cfg, **changes))
