"""PixArt and STDiT: one class, temporal attention off or on.

PixArt is from "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis"
(arXiv:2310.00426); STDiT is Open-Sora 1.0's video model, PixArt with a temporal attention in every block. Outputs and
state-dict keys are those of the published models, PixArt-1024-MS with its size conditioning among them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.models.config import STDiTConfig
from opensora_repro.models.cross_attention import ALL, BlockText, CrossAttention, WholeCaptions, lay_out, varlen_kernel
from opensora_repro.models.layers import (
    Attention,
    CaptionEmbedder,
    FinalLayer,
    Mlp,
    PatchEmbed3D,
    TimestepEmbedder,
    check_latents,
    check_sizes,
    computing_dtype,
    spatial_table,
    temporal_table,
    unpatchify,
)
from opensora_repro.models.recompute import HostStack, run_block

# Published files carry these tables; here they follow from the size of the call and from space_scale, time_scale.
POSITION_TABLES = ("pos_embed", "pos_embed_temporal")
# Branches that add nothing at first, so that each can join a pretrained model without disturbing it.
ZERO_INITIALISED = ("cross_attn.proj", "attn_temp.proj", "final_layer.linear")
STD_002 = ("t_embedder.", "t_block.", "y_embedder.", "csize_embedder.", "ar_embedder.")
PIXELS_A_LATENT = 8  # of the Stable Diffusion autoencoders, which PixArt-1024-MS was trained with


class STDiTBlock(nn.Module):
    """Spatial attention -> temporal attention -> cross-attention -> MLP, on tokens [B, T, S, D]."""

    def __init__(self, cfg: STDiTConfig) -> None:
        super().__init__()
        self.hidden_size = dim = cfg.hidden_size
        self.attn = Attention(dim, cfg.num_heads, over="space" if cfg.temporal_attention else "space_time")
        self.attn_temp = Attention(dim, cfg.num_heads, over="time") if cfg.temporal_attention else None
        self.cross_attn = CrossAttention(dim, cfg.num_heads)
        self.mlp = Mlp(dim, int(dim * cfg.mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: BlockText,
        modulation: Tensor,
        captions: WholeCaptions,
        temporal: Tensor | None,
        normed: Tensor | None = None,
        following: STDiTBlock | None = None,
    ) -> Any:
        """`modulation` is [6, B, 1, 1, D]; `temporal` [T, 1, D] joins the temporal branch's input (first block).

        Where several captions read the same tokens, `x` may hold these once, and the modulation a row a caption.
        Returns the tokens. Where the `following` block is given, its first norm is fused with this one's last residual:
        the result is then (tokens, what that block takes as `normed`).
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.vectors(modulation)  # [B, 1, 1, D] each
        repeats = len(gate_mlp) // len(x)
        if repeats > 1:
            shift_msa, scale_msa, gate_msa = (vector[: len(x)] for vector in (shift_msa, scale_msa, gate_msa))

        if normed is None:
            normed = ops.norm_modulate(x, shift_msa, scale_msa)
        x = ops.gate_residual(x, gate_msa, self.attn(normed))  # [B, T, S, D] everywhere
        if self.attn_temp is not None:  # reads the raw residual stream, shares the spatial branch's gate
            x = ops.gate_residual(x, gate_msa, self.attn_temp(x if temporal is None else x + temporal))
        if repeats > 1:  # from here on each caption has tokens of its own
            x = x.repeat(repeats, 1, 1, 1)
        y = self.cross_attn(x, text, captions)
        x, normed = ops.residual_norm_modulate(x, None, y, shift_mlp, scale_mlp)  # x + y, and its modulated norm
        y = self.mlp(normed)

        if following is None:
            return ops.gate_residual(x, gate_mlp, y)
        shift, scale, *_ = following.vectors(modulation)
        return ops.residual_norm_modulate(x, gate_mlp, y, shift, scale)

    def vectors(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each [B, 1, 1, D]."""
        return (self.scale_shift_table[:, None, None, None] + modulation).unbind(0)


@dataclass(frozen=True)
class PreparedText:
    """What every block makes of the captions, which is the same at all steps of sampling; from `STDiT.prepare_text`."""

    blocks: Sequence[BlockText]
    captions: WholeCaptions
    num_samples: int


class STDiT(nn.Module):
    """Text-conditional diffusion transformer on latents [B, C, T, H, W]; an image is a video of one frame.

    With `temporal_attention=False` it is PixArt: every block attends over all tokens of the sample at once.
    Any latent size and frame count may be given at call time. `activation_checkpointing` ("none", "selective", "full")
    trades time for memory, see recompute.py; with `offload_activations` what it keeps of a block's input waits in host
    memory.
    """

    def __init__(self, cfg: STDiTConfig) -> None:
        super().__init__()
        _check(cfg)
        self.cfg = cfg
        self.activation_checkpointing = "none"
        self.offload_activations = False
        self._compiled_block: Callable[..., Tensor] | None = None
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
        first_frame: index of the first latent frame where the latents are a part of a longer video, a multiple of
        patch_size[0]; it moves the temporal positions.
        """
        check_latents(latents, timestep, self.cfg.in_channels)
        if first_frame < 0 or first_frame % self.cfg.patch_size[0]:
            raise ValueError(
                f"first_frame={first_frame} must be a multiple of patch_size[0]={self.cfg.patch_size[0]}, 0 or more"
            )
        t = self.embed_condition(latents, timestep, image_size, aspect_ratio)  # [B, D]
        texts, captions, repeats = self._read_text(text, mask, drop_text, len(latents))
        modulation = rearrange(self.t_block(t), "b (six d) -> six b 1 1 d", six=6)
        if repeats > 1:
            t, modulation = t.repeat(repeats, 1), modulation.repeat(1, repeats, 1, 1, 1)
        # Contiguous, or one sample's strides would differ from several samples', for which blocks are compiled again.
        modulation = modulation.contiguous()

        x, temporal = self.embed(latents, first_frame)  # [B, T', S, D]
        x = self._run_blocks(x, texts, modulation, captions, temporal)
        x = self.final_layer(x, t)  # [B, T', S, pT * pH * pW * C_out]
        return unpatchify(x, self.cfg.patch_size, latents.shape[2:])

    def prepare_text(self, text: Tensor, mask: Tensor | None = None, *, null: Tensor | None = None) -> PreparedText:
        """What `forward` takes in place of text [B, L, Ct] and mask [B, L], to compute it once for many calls.

        With `null` [L, Ct] B more samples follow, the null caption under each mask. It holds for these weights and
        this autocast alone, and keeps no gradients where there are none to keep: call it under no_grad to sample.
        """
        self.check_text(text, mask, len(text))
        samples, rows = len(text), None
        if null is not None:
            rows = [*range(samples), *[samples] * samples]
            text = torch.cat([text, null[None, : text.shape[1]].to(text)])
            samples *= 2
            # Without a mask: the same, for the samples must still be told apart from the captions
            mask = torch.ones(samples, text.shape[1], dtype=torch.bool) if mask is None else mask
        y = self.y_embedder(text)
        captions = ALL if mask is None else self._lay_out(mask, samples, y.device, rows)
        attentions: list[Any] = [block.cross_attn for block in self.blocks]
        return PreparedText([attention.prepare(y, captions) for attention in attentions], captions, samples)

    def _read_text(
        self, text: Tensor | PreparedText, mask: Tensor | None, drop_text: Tensor | None, num_latents: int
    ) -> tuple[Sequence[BlockText], WholeCaptions, int]:
        """What each block reads, how it lies, and how many captions there are to a latent."""
        if isinstance(text, PreparedText):
            if mask is not None or drop_text is not None:
                raise ValueError("prepared text has its mask already, and no caption of it can be dropped")
            if text.num_samples % num_latents:
                raise ValueError(f"{num_latents} latents cannot be repeated over {text.num_samples} prepared captions")
            return text.blocks, text.captions, text.num_samples // num_latents
        self.check_text(text, mask, num_latents)
        y = self.y_embedder(text, drop_text)  # [B, L, D]
        if mask is None:
            return [y] * len(self.blocks), ALL, 1
        captions = self._lay_out(mask, len(text), y.device)
        return [captions.take(y)] * len(self.blocks), captions, 1

    def _lay_out(
        self, mask: Tensor, num_samples: int, device: torch.device, rows: Sequence[int] | None = None
    ) -> WholeCaptions:
        dtype = computing_dtype(self.x_embedder.proj.weight, device)
        varlen = varlen_kernel(device, dtype, self.cfg.hidden_size // self.cfg.num_heads)
        return lay_out(mask, num_samples, device, varlen=varlen, rows=rows)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Let torch.compile make one program of a block, which serves all blocks; it does so at the first call.

        For training alone: without gradients blocks run as they are, or validation and sampling would need programs of
        their own. Numbers of samples, frames, places and caption tokens are variables of the program; only where one
        of them is 1, all captions have one length, or one is empty, it is compiled again. The compiler fuses torch's
        own operations, not the kernels of `train.kernels`.
        """
        self._compiled_block = torch.compile(run_block, backend=backend)

    def _run_blocks(
        self,
        x: Tensor,
        texts: Sequence[BlockText],
        modulation: Tensor,
        captions: WholeCaptions,
        temporal: Tensor | None,
    ) -> Tensor:
        keep = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        compiled = self._compiled_block if torch.is_grad_enabled() else None
        plain = compiled is None and keep == "none"
        run: Callable[..., Any] = nn.Module.__call__ if plain else partial(compiled or run_block, keep)
        # With a block's last residual and the next one's first norm in one kernel, two tensors pass from block to
        # block. Recomputing would keep both.
        pairs = plain and ops.fused(x)
        later = None  # what joins the temporal branch's input after the first block
        if compiled is not None:
            if temporal is not None:
                # A block that adds nothing would be compiled by itself, and so would one that is given a view. Zeros
                # that are added while tokens are copied cost nothing.
                later = torch.zeros_like(temporal)
                temporal = temporal + later
            _mark_sizes(x, texts[0], modulation, captions, temporal, later)
        host = HostStack(x.device) if keep != "none" and self.offload_activations else None
        normed = None
        for block, following, text in zip(self.blocks, [*self.blocks[1:], None], texts, strict=True):
            rest = (text, modulation, captions, temporal)
            with contextlib.nullcontext() if host is None else host.holding(x):
                if pairs and following is not None:
                    x, normed = run(block, x, *rest, normed, following)
                else:
                    x = run(block, x, *rest, normed)
            temporal = later
        return x

    def null_condition(self) -> Tensor:
        """Return the null caption [L, Ct], what the model sees where a caption was dropped."""
        return self.y_embedder.y_embedding

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

    def check_text(self, text: Tensor, mask: Tensor | None, batch: int) -> None:
        cfg = self.cfg
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != cfg.caption_channels:
            raise ValueError(f"expected text [{batch}, L, {cfg.caption_channels}], got {list(text.shape)}")
        if text.shape[1] > cfg.model_max_length:
            raise ValueError(f"captions of {text.shape[1]} tokens exceed model.model_max_length={cfg.model_max_length}")
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != text.shape[1]):
            raise ValueError(f"expected a caption mask [B, {text.shape[1]}], got {list(mask.shape)}")

    def initialize_weights(self, only: str = "", generator: torch.Generator | None = None) -> None:
        """Draw initial weights as Open-Sora 1.0 does; `only` in the modules that have it in their names."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear) or only not in name:
                continue
            nn.init.zeros_(module.bias)
            if name.endswith(ZERO_INITIALISED):
                nn.init.zeros_(module.weight)
            elif name.startswith(STD_002):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(module.weight, generator=generator)
        if not only:
            kernel = self.x_embedder.proj.weight.flatten(1)  # a view: fills the kernel itself
            nn.init.xavier_uniform_(kernel, generator=generator)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as usual, but pass over the position tables that published files carry."""
        weights = {key: value for key, value in state_dict.items() if key not in POSITION_TABLES}
        return super().load_state_dict(weights, strict=strict, assign=assign)


def _mark_sizes(
    x: Tensor, text: BlockText, modulation: Tensor, captions: WholeCaptions, *temporal: Tensor | None
) -> None:
    """Tell the compiler which axes of a block's inputs change from batch to batch, before it sees them change."""
    from torch._dynamo import maybe_mark_dynamic

    axes: list[tuple[Any, list[int]]] = [(x, [0, 1, 2]), (modulation, [1]), *((table, [0]) for table in temporal)]
    if isinstance(text, Tensor):
        axes.append((text, [0, 1] if text.ndim == 3 else [0]))  # [B, L, D], or [N, D] end to end
    for tensor, changing in [*axes, *captions.changing_axes()]:
        if tensor is not None:
            maybe_mark_dynamic(tensor, changing)


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
