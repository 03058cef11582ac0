"""PixArt and STDiT: one class, temporal attention off or on.

PixArt is from "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis"
(arXiv:2310.00426); STDiT is Open-Sora 1.0's video model, PixArt with a temporal attention in every block. Outputs and
state-dict keys are those of the published models, PixArt-1024-MS with its size conditioning among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.models.captioned import Block, BlockInputs, CaptionedModel, PreparedText
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.layers import (
    Attention,
    CaptionEmbedder,
    FinalLayer,
    PatchEmbed3D,
    TimestepEmbedder,
    by_vector,
    check_sizes,
    draw_patch_kernel,
    generated_frames,
    of_frames,
    spatial_table,
    temporal_table,
)

# Published files carry these tables; here they follow from the size of the call and from space_scale, time_scale.
POSITION_TABLES = ("pos_embed", "pos_embed_temporal")
# Branches that add nothing at first, so that each can join a pretrained model without disturbing it.
ZERO_INITIALISED = ("cross_attn.proj", "attn_temp.proj", "final_layer.linear")
STD_002 = ("t_embedder.", "t_block.", "y_embedder.", "csize_embedder.", "ar_embedder.")
PIXELS_A_LATENT = 8  # of the Stable Diffusion autoencoders, which PixArt-1024-MS was trained with


class STDiTBlock(Block):
    """Spatial attention -> temporal attention -> cross-attention -> MLP, on tokens [B, T, S, D].

    `temporal` [T, 1, D] joins the temporal branch's input (first block).
    """

    def __init__(self, cfg: STDiTConfig) -> None:
        dim, heads = cfg.hidden_size, cfg.num_heads
        attn = Attention(dim, heads, over="space" if cfg.temporal_attention else "space_time")
        super().__init__(cfg, attn, Attention(dim, heads, over="time") if cfg.temporal_attention else None)

    def attend(self, x: Tensor, normed: Tensor, vectors: Sequence[Tensor], temporal: Tensor | None) -> Tensor:
        gate = vectors[2]
        x = ops.gate_residual(x, gate, self.attn(normed))
        if self.attn_temp is not None:  # reads the raw residual stream, shares the spatial branch's gate
            x = ops.gate_residual(x, gate, self.attn_temp(x if temporal is None else x + temporal))
        return x


class STDiT(CaptionedModel):
    """Text-conditional diffusion transformer on latents [B, C, T, H, W]; an image is a video of one frame.

    With `temporal_attention=False` it is PixArt: every block attends over all tokens of the sample at once.
    Any latent size and frame count may be given at call time.
    """

    temporal_everywhere = False

    def __init__(self, cfg: STDiTConfig) -> None:
        _check(cfg)
        super().__init__(cfg)
        dim = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, dim, cfg.model_max_length)
        if cfg.size_conditioning:
            self.csize_embedder = TimestepEmbedder(dim // 3)
            self.ar_embedder = TimestepEmbedder(dim // 3)
        self.blocks = nn.ModuleList(STDiTBlock(cfg) for _ in range(cfg.depth))
        self.final_layer = FinalLayer(dim, math.prod(cfg.patch_size), cfg.out_channels)
        if not self.x_embedder.proj.weight.is_meta:
            self.initialize_weights()

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | PreparedText,
        mask: Tensor | None = None,
        *,
        drop_text: Tensor | None = None,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        frame_mask: Tensor | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Predict float32 [B, C_out, T, H, W].

        latents: [B, C, T, H, W]. timestep: [B], int or float, 0..1000. text: [B, L, Ct]. mask: which caption tokens
        exist, [B, L], or fewer rows that are repeated; None: all. A mask in host memory spares the work on padding,
        wherever the latents are. drop_text: [B] bool; true rows see the null caption under their own mask.
        Instead of text and mask, `prepare_text`'s result; with n * B captions the latents are those of each B of them,
        and the output has n * B rows.
        With size conditioning also image_size: [B, 2], height and width in pixels, and
        aspect_ratio: [B] or [B, 1], height / width; None: those of the latents.
        frame_mask: [B, T] bool, which frames are generated; the others are given and read at timestep 0. None: all
        are. See `generated_frames`.
        first_frame: index of the first latent frame where the latents are a part of a longer video, a multiple of
        patch_size[0]; it moves the temporal positions.
        """
        given = {"image_size": image_size, "aspect_ratio": aspect_ratio, "frame_mask": frame_mask}
        inputs = self.inputs(latents, timestep, first_frame=first_frame, **given)
        return self.predict(latents, inputs, *self.read_text(text, mask, drop_text, len(latents)))

    def inputs(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        image_size: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        frame_mask: Tensor | None = None,
        first_frame: int = 0,
    ) -> BlockInputs:
        self.check_inputs(latents, timestep, first_frame)
        generated = generated_frames(frame_mask, latents, self.cfg.patch_size[0])
        times = [timestep] if generated is None else [timestep, torch.zeros_like(timestep)]
        conditions = [self.embed_condition(latents, time, image_size, aspect_ratio) for time in times]  # [B, D] each
        modulation = of_frames(map(self.t_block, conditions), generated)
        x, temporal = self.embed(latents, first_frame)  # [B, T', S, D]
        return BlockInputs(x, by_vector(modulation, 6), of_frames(conditions, generated), temporal)

    def in_order(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # a ModuleList does not tell what it holds

    def embed_condition(
        self, latents: Tensor, timestep: Tensor, image_size: Tensor | None, aspect_ratio: Tensor | None
    ) -> Tensor:
        """Return [B, D] of the timesteps and, with size conditioning, of the sizes."""
        t = self.t_embedder(timestep)
        if self.cfg.size_conditioning:
            return t + self._embed_size(latents, image_size, aspect_ratio)
        if image_size is not None or aspect_ratio is not None:
            raise ValueError("image_size and aspect_ratio need model.size_conditioning=true")
        return t

    def _embed_size(self, latents: Tensor, image_size: Tensor | None, aspect_ratio: Tensor | None) -> Tensor:
        """Return [B, D]: two thirds for height and width, one for their ratio."""
        batch, (height, width) = len(latents), latents.shape[3:]
        if image_size is None:
            pixels = (PIXELS_A_LATENT * height, PIXELS_A_LATENT * width)
            image_size = torch.stack([torch.full((batch,), side, device=latents.device) for side in pixels], dim=1)
        if aspect_ratio is None:
            aspect_ratio = torch.full((batch,), height / width, device=latents.device)
        if image_size.shape != (batch, 2):
            raise ValueError(f"expected image_size [{batch}, 2], got {list(image_size.shape)}")
        if aspect_ratio.shape not in ((batch,), (batch, 1)):
            raise ValueError(f"expected aspect_ratio [{batch}], got {list(aspect_ratio.shape)}")
        size = rearrange(self.csize_embedder(image_size.flatten()), "(b two) d -> b (two d)", two=2)
        return torch.cat([size, self.ar_embedder(aspect_ratio.flatten())], dim=1)

    def embed(self, latents: Tensor, first_frame: int = 0) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, T, H, W] -> tokens [B, T', S, D] with their places, and the table for the temporal branch."""
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        rows = -(-latents.shape[3] // self.cfg.patch_size[1])
        return self.add_positions(x, rows, first_frame // self.cfg.patch_size[0])

    def add_positions(self, x: Tensor, rows: int, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Add the spatial table to tokens [B, T, S, D]; return them and the table for the temporal branch.

        `first` is the index of the first token frame.
        """
        cfg = self.cfg
        dtype = self.x_embedder.proj.weight.dtype
        frames, places, dim = x.shape[1:]
        # PixArt stretches the longer side's positions back to a square; STDiT does not.
        base_size = None if cfg.temporal_attention else cfg.stretched_to(places)
        x = x + spatial_table(dim, rows, places // rows, cfg.space_scale, base_size, x.device, dtype)
        if not cfg.temporal_attention and cfg.no_temporal_pos_emb:
            return x, None
        temporal = temporal_table(dim, first + frames, cfg.time_scale, x.device, dtype)[first:]
        return (x, temporal) if cfg.temporal_attention else (x + temporal, None)

    def initial_std(self, name: str) -> float | None:
        return 0.0 if name.endswith(ZERO_INITIALISED) else 0.02 if name.startswith(STD_002) else None

    def initialize_weights(self, only: str = "", generator: torch.Generator | None = None) -> None:
        """Draw initial weights as Open-Sora 1.0 does; `only` in the modules that have it in their names."""
        super().initialize_weights(only, generator)
        if not only:
            draw_patch_kernel(self.x_embedder, generator)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as usual, but pass over the position tables that published files carry."""
        weights = {key: value for key, value in state_dict.items() if key not in POSITION_TABLES}
        return super().load_state_dict(weights, strict=strict, assign=assign)


def _check(cfg: STDiTConfig) -> None:
    check_sizes(cfg.hidden_size, cfg.num_heads, cfg.patch_size)
    if cfg.space_scale <= 0 or cfg.time_scale <= 0:
        raise ValueError("model.space_scale and model.time_scale must be positive")
    if cfg.base_size < 0:
        raise ValueError(f"model.base_size={cfg.base_size} must be 0 or more")
    if cfg.temporal_attention and (cfg.size_conditioning or cfg.base_size):
        raise ValueError("model.size_conditioning and model.base_size need model.temporal_attention=false (PixArt)")
    if cfg.size_conditioning and cfg.hidden_size % 3:
        raise ValueError(f"model.hidden_size={cfg.hidden_size} must be a multiple of 3 with model.size_conditioning")


def pixart_xl_2(**changes: Any) -> STDiT:
    """PixArt-XL/2 (610,856,096 parameters); `changes` are STDiTConfig fields."""
    return STDiT(replace(STDiTConfig(temporal_attention=False), **changes))


def pixart_ms_xl_2(**changes: Any) -> STDiT:
    """PixArt-XL/2-1024-MS (611,349,152 parameters); `changes` are STDiTConfig fields."""
    cfg = STDiTConfig(temporal_attention=False, space_scale=2.0, size_conditioning=True, base_size=64)
    return STDiT(replace(cfg, **changes))


def stdit_xl_2(**changes: Any) -> STDiT:
    """STDiT-XL/2 (759,620,768 parameters); `changes` are STDiTConfig fields."""
    return STDiT(replace(STDiTConfig(), **changes))
