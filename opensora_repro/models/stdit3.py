"""STDiT3, the network of Open-Sora 1.2: pairs of a block within frames and a block over time.

Outputs and state-dict keys are those of the published model, but for given frames in the final layer, which there are
normed a second time. Rotary positions, timesteps and pixel sizes stay float32 in half precision.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from opensora_repro.models.captioned import Block, BlockInputs, CaptionedModel, PreparedText, check_rotary
from opensora_repro.models.config import SIZES, STDiT3Config
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
    generated_frames,
    of_frames,
)

# Of blocks over time: so each is the identity when it joins an image model
ZERO_INITIALISED = ("attn.proj", "cross_attn.proj", "mlp.fc2")


class STDiT3(CaptionedModel):
    """Text-conditional diffusion transformer on latents [B, C, T, H, W]; an image is a video of one frame.

    Any latent size and frame count may be given at call time.
    """

    def __init__(self, cfg: STDiT3Config) -> None:
        check_rotary(cfg)
        super().__init__(cfg)
        dim = cfg.hidden_size
        self.rope = Rotary(dim // cfg.num_heads)
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim, Float32Linear)
        self.fps_embedder = SizeEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(cfg.caption_channels, dim, cfg.model_max_length)
        self.spatial_blocks = nn.ModuleList(_block(cfg, "space") for _ in range(cfg.depth))
        self.temporal_blocks = nn.ModuleList(_block(cfg, "time") for _ in range(cfg.depth))
        self.final_layer = FinalLayer(dim, math.prod(cfg.patch_size), cfg.out_channels)
        if not self.x_embedder.proj.weight.is_meta:
            self.initialize_weights()
        if cfg.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)
        if cfg.only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)

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
        frame_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
        first_frame: int = 0,
    ) -> Tensor:
        """Predict float32 [B, C_out, T, H, W].

        latents: [B, C, T, H, W]. timestep: [B], int or float, 0..1000. text: [B, L, Ct] or [B, 1, L, Ct]. mask: which
        caption tokens exist, [B, L], or fewer rows that are repeated; None: all. A mask in host memory spares the work
        on padding, wherever the latents are. With `skip_y_embedder` text: [1, N, D], embedded captions end to end, and
        mask: their lengths, [B].
        fps: frames a second, [B], 120 for images; height, width: pixels, [B]. Of fewer rows all are repeated; the
        first picture's size is everyone's.
        frame_mask: [B, T] bool, which frames are generated; the others are given and read at timestep 0. None: all
        are. See `generated_frames`.
        drop_text, prepared text and first_frame: as `STDiT.forward` takes them.
        """
        inputs = self.inputs(
            latents, timestep, fps=fps, height=height, width=width, frame_mask=frame_mask, first_frame=first_frame
        )
        return self.predict(latents, inputs, *self.read_text(text, mask, drop_text, len(latents)))

    def inputs(
        self,
        latents: Tensor,
        timestep: Tensor,
        *,
        fps: Tensor,
        height: Tensor,
        width: Tensor,
        frame_mask: Tensor | None = None,
        first_frame: int = 0,
    ) -> BlockInputs:
        self.check_inputs(latents, timestep, first_frame)
        generated = generated_frames(frame_mask, latents, self.cfg.patch_size[0])
        times = [timestep] if generated is None else [timestep, torch.zeros_like(timestep)]
        rate = self.fps_embedder(fps, len(latents))
        conditions = [self.t_embedder(time) + rate for time in times]  # [B, D] each
        modulation = of_frames(map(self.t_block, conditions), generated)
        x, rotary = self.embed_places(latents, height, width, first_frame)  # [B, T', S, D]
        return BlockInputs(x, by_vector(modulation, 6), of_frames(conditions, generated), rotary)

    def in_order(self) -> list[Block]:
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return list(chain.from_iterable(pairs))  # type: ignore[arg-type]

    def unpack_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.cfg.skip_y_embedder or mask is None or mask.ndim != 1:
            return super().unpack_text(text, mask)
        lengths = mask.tolist()
        if text.ndim != 3 or len(text) != 1 or text.shape[1] != sum(lengths):
            raise ValueError(f"expected text [1, {sum(lengths)}, {self.text_channels}], got {list(text.shape)}")
        padded = nn.utils.rnn.pad_sequence(text[0].split(lengths), batch_first=True)
        return padded, torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]

    def embed_text(self, text: Tensor, drop_text: Tensor | None = None) -> Tensor:
        if not self.cfg.skip_y_embedder:
            return super().embed_text(text, drop_text)
        if drop_text is not None:
            raise ValueError("model.skip_y_embedder=true: captions that are embedded already cannot be dropped")
        return text.to(self.y_embedder.y_embedding.dtype)

    @property
    def text_channels(self) -> int:
        return self.cfg.hidden_size if self.cfg.skip_y_embedder else self.cfg.caption_channels

    def null_condition(self) -> Tensor:
        null = super().null_condition()
        return self.y_embedder(null[None])[0] if self.cfg.skip_y_embedder else null

    def initial_std(self, name: str) -> float | None:
        if name.startswith("temporal_blocks.") and name.endswith(ZERO_INITIALISED):
            return 0.0
        return {"fps_embedder.mlp.0": 0.02, "fps_embedder.mlp.2": 0.0}.get(name)


def _block(cfg: STDiT3Config, over: str) -> Block:
    return Block(cfg, Attention(cfg.hidden_size, cfg.num_heads, over=over, qk_norm=cfg.qk_norm))


def stdit3_s_2(**changes: Any) -> STDiT3:
    """STDiT3-S/2 (59,922,112 parameters); `changes` are STDiT3Config fields."""
    return _sized("S", changes)


def stdit3_b_2(**changes: Any) -> STDiT3:
    """STDiT3-B/2 (235,741,504 parameters); `changes` are STDiT3Config fields."""
    return _sized("B", changes)


def stdit3_l_2(**changes: Any) -> STDiT3:
    """STDiT3-L/2 (820,466,752 parameters); `changes` are STDiT3Config fields."""
    return _sized("L", changes)


def stdit3_xl_2(**changes: Any) -> STDiT3:
    """STDiT3-XL/2 (1,207,643,972 parameters); `changes` are STDiT3Config fields."""
    return _sized("XL", changes)


def _sized(size: str, changes: dict[str, Any]) -> STDiT3:
    hidden_size, depth, num_heads = SIZES[size]
    cfg = STDiT3Config(hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    return STDiT3(replace(cfg, **changes))


def stdit3_3b_2(**changes: Any) -> STDiT3:
    """STDiT3-3B/2 (3,182,211,572 parameters), of which no weights were published."""
    return STDiT3(replace(STDiT3Config(hidden_size=1872, num_heads=26), **changes))
