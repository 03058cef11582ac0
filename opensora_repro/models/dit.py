"""DiT and Latte: one class, attention over all tokens or by turns within frames and over time.

DiT is from "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), Latte from "Latte: Latent Diffusion
Transformer for Video Generation" (arXiv:2401.03048). Outputs and state-dict keys are those of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.models.config import DiTConfig
from opensora_repro.models.layers import (
    Attention,
    CaptionEmbedder,
    Mlp,
    PatchEmbed3D,
    TimestepEmbedder,
    check_latents,
    check_sizes,
    spatial_table,
    temporal_table,
    unpatchify,
)

# Published files carry these tables (DiT's, Open-Sora's, Latte's); here they follow from the size of the call.
POSITION_TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal", "temp_embed")
# Every block is the identity at first, and the prediction zero.
ZERO_INITIALISED = ("adaLN_modulation.1", "final_layer.linear")


class LabelEmbedder(nn.Module):
    """Class numbers [B] -> [B, 1, D]; the number after the last class means no class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return rearrange(self.embedding_table(labels), "b d -> b 1 d")


class DiTBlock(nn.Module):
    """Self-attention -> MLP on tokens [B, T, S, D], each shifted, scaled and gated by the condition [B, D]."""

    def __init__(self, cfg: DiTConfig, over: str) -> None:
        super().__init__()
        dim = cfg.hidden_size
        self.attn = Attention(dim, cfg.num_heads, over=over)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.vectors(condition)
        y = self.attn(ops.norm_modulate(x, shift_msa, scale_msa))
        x, normed = ops.residual_norm_modulate(x, gate_msa, y, shift_mlp, scale_mlp)
        return ops.gate_residual(x, gate_mlp, self.mlp(normed))

    def vectors(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each [B, 1, 1, D]."""
        return rearrange(self.adaLN_modulation(condition), "b (six d) -> six b 1 1 d", six=6).unbind(0)


class DiTFinalLayer(nn.Module):
    """Tokens [B, T, S, D] and the condition [B, D] -> patches [B, T, S, pT * pH * pW * C_out]."""

    def __init__(self, hidden_size: int, patch_volume: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_volume * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = rearrange(self.adaLN_modulation(condition), "b (two d) -> two b 1 1 d", two=2).unbind(0)
        return self.linear(ops.norm_modulate(x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer on square latents [B, C, T, H, H], conditional on a class or on one pooled text token.

    With `factorised=True` it is Latte: even blocks attend within frames, odd blocks over time.
    Any latent size and frame count may be given at call time.
    """

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        _check(cfg)
        self.cfg = cfg
        dim = cfg.hidden_size
        self.x_embedder = PatchEmbed3D(cfg.patch_size, cfg.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = (
            LabelEmbedder(cfg.num_classes, dim)
            if cfg.condition == "label"
            else CaptionEmbedder(cfg.caption_channels, dim, cfg.model_max_length)
        )
        axes = ("space", "time") if cfg.factorised else ("space_time", "space_time")
        # DiT knows the frames' order, if at all, from the start; Latte from its first block over time on.
        self.temporal_from = 1 if cfg.factorised else 0
        self.blocks = nn.ModuleList(DiTBlock(cfg, over=axes[i % 2]) for i in range(cfg.depth))
        self.final_layer = DiTFinalLayer(dim, math.prod(cfg.patch_size), cfg.out_channels)
        if not self.x_embedder.proj.weight.is_meta:
            self.initialize_weights()

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor, mask: None = None) -> Tensor:
        """Predict float32 [B, C_out, T, H, W].

        latents: [B, C, T, H, W], H = W. timestep: [B], int or float, 0..1000. condition: class numbers [B] (int64;
        `num_classes` means none) or text [B, 1, Ct]. mask: None, for neither has tokens to mask; it is here because
        samplers call every model alike.
        """
        self.check_inputs(latents, timestep, condition, mask)
        y = self.y_embedder(condition)  # [B, 1, D]
        c = self.t_embedder(timestep) + rearrange(y, "b 1 d -> b d")

        x, time = self.embed(latents)  # [B, T', S, D]
        for i, block in enumerate(self.blocks):
            if time is not None and i == self.temporal_from:
                x = x + time
            x = block(x, c)

        x = self.final_layer(x, c)  # [B, T', S, pT * pH * pW * C_out]
        return unpatchify(x, self.cfg.patch_size, latents.shape[2:])

    def null_condition(self) -> Tensor:
        """Return what stands for no condition: the class number after the last, [], or the null text, [1, Ct]."""
        if isinstance(self.y_embedder, LabelEmbedder):
            return torch.tensor(self.cfg.num_classes)
        return self.y_embedder.y_embedding

    def embed(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents [B, C, T, H, H] -> tokens [B, T', S, D] with their places, and the table of their frames [T', 1, D].

        The table joins the input of block `temporal_from`.
        """
        dtype = self.x_embedder.proj.weight.dtype
        x = self.x_embedder(latents.to(dtype))
        frames, places, dim = x.shape[1:]
        rows = -(-latents.shape[3] // self.cfg.patch_size[1])
        x = x + spatial_table(dim, rows, places // rows, 1.0, None, x.device, dtype)
        if not self.cfg.factorised and self.cfg.no_temporal_pos_emb:
            return x, None
        return x, temporal_table(dim, frames, 1.0, x.device, dtype)

    def check_inputs(self, latents: Tensor, timestep: Tensor, condition: Tensor, mask: None) -> None:
        cfg = self.cfg
        check_latents(latents, timestep, cfg.in_channels)
        batch, (height, width) = latents.shape[0], latents.shape[3:]
        if height != width:
            raise ValueError(f"expected square latents, got {height}x{width}")
        if mask is not None:
            raise ValueError(f"a {cfg.condition} condition has no tokens to mask; expected mask=None")
        if cfg.condition == "text":
            if condition.shape != (batch, 1, cfg.caption_channels):
                raise ValueError(f"expected text [{batch}, 1, {cfg.caption_channels}], got {list(condition.shape)}")
            return
        if condition.shape != (batch,) or condition.dtype != torch.int64:
            raise ValueError(f"expected int64 labels [{batch}], got {condition.dtype} {list(condition.shape)}")
        # Looking at labels on a GPU would wait for it; there the embedding's own assertion stops the process.
        if condition.device.type == "cpu" and ((condition < 0) | (condition > cfg.num_classes)).any():
            raise ValueError(f"expected labels from 0 to {cfg.num_classes} (none), got {condition.tolist()}")

    def initialize_weights(self) -> None:
        """Draw initial weights as Open-Sora 1.0 does; it leaves the classes' embeddings at torch's N(0, 1)."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.endswith(ZERO_INITIALISED):
                nn.init.zeros_(module.weight)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view: fills the kernel itself
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as usual, but pass over the position tables that published files carry."""
        weights = {key: value for key, value in state_dict.items() if key not in POSITION_TABLES}
        return super().load_state_dict(weights, strict=strict, assign=assign)


def _check(cfg: DiTConfig) -> None:
    check_sizes(cfg.hidden_size, cfg.num_heads, cfg.patch_size)
    if cfg.condition not in ("label", "text"):
        raise ValueError(f'model.condition="{cfg.condition}": expected "label" or "text"')
    if cfg.patch_size[1] != cfg.patch_size[2]:
        raise ValueError(f"model.patch_size={cfg.patch_size}: rows and columns must be alike, as latents are square")


def dit_xl_2(**changes: Any) -> DiT:
    """DiT-XL/2 (674,834,720 parameters for 1000 classes); `changes` are DiTConfig fields."""
    return DiT(replace(DiTConfig(), **changes))


def latte_xl_2(**changes: Any) -> DiT:
    """Latte-XL/2 (673,799,072 parameters for the 101 classes of UCF101); `changes` are DiTConfig fields."""
    return DiT(replace(DiTConfig(factorised=True), **changes))
