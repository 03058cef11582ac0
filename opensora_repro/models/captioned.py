"""What STDiT, STDiT2 and STDiT3 share: a block, and the model around its blocks, which read captions.

A model says what goes into its blocks (`inputs`); how they are run, compiled, checkpointed and given captions is here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora_repro.kernels import ops
from opensora_repro.kernels.ops import to_device
from opensora_repro.models.config import STDiT2Config, STDiT3Config, STDiTConfig
from opensora_repro.models.cross_attention import ALL, BlockText, CrossAttention, WholeCaptions, lay_out, varlen_kernel
from opensora_repro.models.layers import (
    Attention,
    CaptionEmbedder,
    FinalLayer,
    Mlp,
    PatchEmbed3D,
    check_latents,
    check_sizes,
    computing_dtype,
    rotary_table,
    spatial_positions,
    unpatchify,
)
from opensora_repro.models.recompute import HostStack, run_block

CaptionedConfig = STDiTConfig | STDiT2Config | STDiT3Config
IMAGE_FPS = 120.0  # what Open-Sora tells a model of a picture


class Block(nn.Module):
    """Self-attention -> attention over time, if any -> cross-attention -> MLP, on tokens [B, T, S, D]."""

    def __init__(self, cfg: CaptionedConfig, attn: Attention, attn_temp: Attention | None = None) -> None:
        super().__init__()
        self.hidden_size = dim = cfg.hidden_size
        self.attn = attn
        self.attn_temp = attn_temp
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
        following: Block | None = None,
    ) -> Any:
        """`modulation` is [n, B, 1 or T, 1, D], of samples or of their frames, n as `vectors` has it; `temporal`
        [T, 1, .] tells attention over time where frames are.

        Where several captions read the same tokens, `x` may hold these once, and the modulation a row a caption.
        Returns the tokens. Where the `following` block is given, its first norm is fused with this one's last residual:
        the result is then (tokens, what that block takes as `normed`).
        """
        vectors = self.vectors(modulation)  # [B, 1 or T, 1, D] each
        shift_mlp, scale_mlp, gate_mlp = vectors[3:6]
        repeats = len(gate_mlp) // len(x)
        if repeats > 1:
            vectors = tuple(vector[: len(x)] for vector in vectors)

        if normed is None:
            normed = ops.norm_modulate(x, vectors[0], vectors[1])
        x = self.attend(x, normed, vectors, temporal)  # [B, T, S, D] everywhere
        if repeats > 1:  # from here on each caption has tokens of its own
            x = x.repeat(repeats, 1, 1, 1)
        y = self.cross_attn(x, text, captions)
        x, normed = ops.residual_norm_modulate(x, None, y, shift_mlp, scale_mlp)  # x + y, and its modulated norm
        y = self.mlp(normed)

        if following is None:
            return ops.gate_residual(x, gate_mlp, y)
        shift, scale, *_ = following.vectors(modulation)
        return ops.residual_norm_modulate(x, gate_mlp, y, shift, scale)

    def attend(self, x: Tensor, normed: Tensor, vectors: Sequence[Tensor], temporal: Tensor | None) -> Tensor:
        """Tokens [B, T, S, D] after they have seen each other; `normed` is their modulated norm."""
        return ops.gate_residual(x, vectors[2], self.attn(normed, temporal))

    def vectors(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of attention, then of the MLP, each [B, 1 or T, 1, D]; others after these."""
        return (self.scale_shift_table[:, None, None, None] + modulation).unbind(0)


class BlockInputs(NamedTuple):
    """What a model makes of latents and conditions for its blocks and its final layer."""

    tokens: Tensor  # [B, T, S, D]
    modulation: Tensor  # [n, B, 1 or T, 1, D]
    final: Tensor  # [B, D] or [B, T, D], from which the final layer is modulated
    temporal: Tensor | None  # [T, 1, .], where frames are


@dataclass(frozen=True)
class PreparedText:
    """What every block makes of the captions, which is the same at all steps of sampling; from `prepare_text`."""

    blocks: Sequence[BlockText]
    captions: WholeCaptions
    num_samples: int


class CaptionedModel(nn.Module):
    """A model whose blocks read captions: how they are given these, and how they are run.

    `activation_checkpointing` ("none", "selective", "full") trades time for memory, see recompute.py; with
    `offload_activations` what it keeps of a block's input waits in host memory.
    """

    x_embedder: PatchEmbed3D
    y_embedder: CaptionEmbedder
    final_layer: FinalLayer
    temporal_everywhere = True  # whether every block is told where frames are, or the first one alone

    def __init__(self, cfg: CaptionedConfig) -> None:
        super().__init__()
        self.cfg: Any = cfg
        self.activation_checkpointing = "none"
        self.offload_activations = False
        self._compiled_block: Callable[..., Tensor] | None = None

    def in_order(self) -> list[Block]:
        """The blocks as tokens go through them."""
        raise NotImplementedError

    def initial_std(self, name: str) -> float | None:
        """Of a linear layer's initial weights, which are normal; 0: zeros; None: Xavier-uniform ones."""
        raise NotImplementedError

    def predict(
        self, latents: Tensor, inputs: BlockInputs, texts: Sequence[BlockText], captions: WholeCaptions, repeats: int
    ) -> Tensor:
        """Run the blocks: float32 [repeats * B, C_out, T, H, W]."""
        x, modulation, final, temporal = inputs
        if repeats > 1:
            final = final.repeat(repeats, *[1] * (final.ndim - 1))
            modulation = modulation.repeat(1, repeats, 1, 1, 1)
        # Contiguous, or one sample's strides would differ from several samples', for which blocks are compiled again.
        modulation = modulation.contiguous()
        with self.as_precise_as(x):
            x = self._run_blocks(x, texts, modulation, captions, temporal)
            x = self.final_layer(x, final)  # [B, T', S, pT * pH * pW * C_out]
        return unpatchify(x, self.cfg.patch_size, latents.shape[2:])

    def as_precise_as(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Autocast, where tokens are more precise than the weights: so they stay, and so does what is added to them."""
        dtype, kind = self.x_embedder.proj.weight.dtype, x.device.type
        mixed = x.dtype != dtype and not torch.is_autocast_enabled(kind)
        return torch.autocast(kind, dtype) if mixed else contextlib.nullcontext()

    def prepare_text(
        self,
        text: Tensor,
        mask: Tensor | None = None,
        *,
        null: Tensor | None = None,
        null_mask: Tensor | None = None,
    ) -> PreparedText:
        """What `forward` takes in place of text [B, L, Ct] and mask [B, L], to compute it once for many calls.

        With `null` [L, Ct] B more samples follow, the null caption under each mask, or under its own, `null_mask` [L].
        It holds for these weights and this autocast alone, and keeps no gradients where there are none to keep: call
        it under no_grad to sample.
        """
        text, mask = self.unpack_text(text, mask)
        self.check_text(text, mask, len(text))
        samples, rows = len(text), None
        if null is not None:
            rows = [*range(samples), *[samples] * samples]
            text = torch.cat([text, null[None, : text.shape[1]].to(text)])
            if null_mask is not None:
                mask = torch.ones(samples, text.shape[1], dtype=torch.bool) if mask is None else mask
                mask = torch.cat([mask, null_mask.to(mask).expand_as(mask)])
            samples *= 2
            # Without a mask: the same, for the samples must still be told apart from the captions
            mask = torch.ones(samples, text.shape[1], dtype=torch.bool) if mask is None else mask
        y = self.embed_text(text)
        captions = ALL if mask is None else self._lay_out(mask, samples, y.device, rows)
        attentions: list[Any] = [block.cross_attn for block in self.in_order()]
        return PreparedText([attention.prepare(y, captions) for attention in attentions], captions, samples)

    def read_text(
        self, text: Tensor | PreparedText, mask: Tensor | None, drop_text: Tensor | None, num_latents: int
    ) -> tuple[Sequence[BlockText], WholeCaptions, int]:
        """What each block reads, how it lies, and how many captions there are to a latent."""
        if isinstance(text, PreparedText):
            if mask is not None or drop_text is not None:
                raise ValueError("prepared text has its mask already, and no caption of it can be dropped")
            if text.num_samples % num_latents:
                raise ValueError(f"{num_latents} latents cannot be repeated over {text.num_samples} prepared captions")
            return text.blocks, text.captions, text.num_samples // num_latents
        text, mask = self.unpack_text(text, mask)
        self.check_text(text, mask, num_latents)
        y = self.embed_text(text, drop_text)  # [B, L, D]
        num_blocks = len(self.in_order())
        if mask is None:
            return [y] * num_blocks, ALL, 1
        captions = self._lay_out(mask, len(text), y.device)
        return [captions.take(y)] * num_blocks, captions, 1

    def unpack_text(self, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Captions as [B, L, Ct], which may come as [B, 1, L, Ct], and their mask."""
        return (text[:, 0] if text.ndim == 4 and text.shape[1] == 1 else text), mask

    def embed_text(self, text: Tensor, drop_text: Tensor | None = None) -> Tensor:
        """Captions [B, L, Ct] -> [B, L, D]; rows where `drop_text` [B] is true become the null caption."""
        embedded: Tensor = self.y_embedder(text, drop_text)
        return embedded

    def _lay_out(
        self, mask: Tensor, num_samples: int, device: torch.device, rows: Sequence[int] | None = None
    ) -> WholeCaptions:
        dtype = computing_dtype(self.x_embedder.proj.weight, device)
        varlen = varlen_kernel(device, dtype, self.cfg.hidden_size // self.cfg.num_heads)
        return lay_out(mask, num_samples, device, varlen=varlen, rows=rows)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Let torch.compile make one program of a kind of block, which serves all of them, at the first call.

        For training alone: without gradients blocks run as they are, or validation and sampling would need programs of
        their own. Numbers of samples, frames, places and caption tokens are variables of the program; only where one
        of them is 1, all captions have one length, or one is empty, it is compiled again, and where frames are given.
        The compiler fuses torch's own operations, not the kernels of `train.kernels`.
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
        later = temporal if self.temporal_everywhere else None
        if compiled is not None:
            if temporal is not None and later is None:
                # A block that adds nothing would be compiled by itself, and so would one that is given a view. Zeros
                # that are added while tokens are copied cost nothing.
                later = torch.zeros_like(temporal)
                temporal = temporal + later
            _mark_sizes(texts[0], modulation, captions, temporal, later)
        host = HostStack(x.device) if keep != "none" and self.offload_activations else None
        normed = None
        blocks = self.in_order()
        for block, following, text in zip(blocks, [*blocks[1:], None], texts, strict=True):
            if compiled is not None:
                _mark([(x, [0, 1, 2])])  # for every block: each kind of them is compiled at its first one's tokens
            rest = (text, modulation, captions, temporal)
            with contextlib.nullcontext() if host is None else host.holding(x):
                if pairs and following is not None:
                    x, normed = run(block, x, *rest, normed, following)
                else:
                    x = run(block, x, *rest, normed)
            temporal = later
        return x

    def embed_places(
        self, latents: Tensor, height: Tensor, width: Tensor, first_frame: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, H, W] -> tokens [B, T', S, D] with their places, and the rotary table [T', 1, d]."""
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        x = self._add_places(x, -(-latents.shape[3] // self.cfg.patch_size[1]), height, width)
        first, frames = first_frame // self.cfg.patch_size[0], x.shape[1]
        return x, rotary_table(self.cfg.hidden_size // self.cfg.num_heads, first + frames, x.device)[first:]

    def _add_places(self, x: Tensor, rows: int, height: Tensor, width: Tensor) -> Tensor:
        """Add the spatial table to tokens [B, T, S, D] of pictures so many pixels high and wide, the first one's size.

        Positions count tokens in a picture of `input_sq_size`^2 pixels, and pixels in others.
        """
        places, dim = x.shape[2:]
        size = [to_device(side[:1].float(), x.device) for side in (height, width)]
        scale = (size[0] * size[1]).sqrt()[0] / self.cfg.input_sq_size
        table = spatial_positions(dim, rows, places // rows, scale=scale, base_size=round(math.sqrt(places)))
        return x + table.float()

    def null_condition(self) -> Tensor:
        """Return the null caption [L, Ct], what the model sees where a caption was dropped."""
        return self.y_embedder.y_embedding

    def check_inputs(self, latents: Tensor, timestep: Tensor, first_frame: int) -> None:
        check_latents(latents, timestep, self.cfg.in_channels)
        if first_frame < 0 or first_frame % self.cfg.patch_size[0]:
            raise ValueError(
                f"first_frame={first_frame} must be a multiple of patch_size[0]={self.cfg.patch_size[0]}, 0 or more"
            )

    def check_text(self, text: Tensor, mask: Tensor | None, batch: int) -> None:
        cfg, channels = self.cfg, self.text_channels
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != channels:
            raise ValueError(f"expected text [{batch}, L, {channels}], got {list(text.shape)}")
        if text.shape[1] > cfg.model_max_length:
            raise ValueError(f"captions of {text.shape[1]} tokens exceed model.model_max_length={cfg.model_max_length}")
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != text.shape[1]):
            raise ValueError(f"expected a caption mask [B, {text.shape[1]}], got {list(mask.shape)}")

    @property
    def text_channels(self) -> int:
        channels: int = self.cfg.caption_channels
        return channels

    def initialize_weights(self, only: str = "", generator: torch.Generator | None = None) -> None:
        """Draw initial weights of linear layers as the model was published; `only` with that in their names."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear) or only not in name:
                continue
            nn.init.zeros_(module.bias)
            std = self.initial_std(name)
            if std is None:
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif std:
                nn.init.normal_(module.weight, std=std, generator=generator)
            else:
                nn.init.zeros_(module.weight)


def check_rotary(cfg: STDiT2Config | STDiT3Config) -> None:
    """Raise ValueError at sizes that cannot be, of a model with rotary positions."""
    check_sizes(cfg.hidden_size, cfg.num_heads, cfg.patch_size)
    if cfg.hidden_size // cfg.num_heads % 2:
        raise ValueError(
            f"model.hidden_size={cfg.hidden_size} over model.num_heads={cfg.num_heads} must be even: "
            "rotary positions turn pairs of channels"
        )
    if cfg.input_sq_size <= 0:
        raise ValueError(f"model.input_sq_size={cfg.input_sq_size} must be positive")


def _mark_sizes(text: BlockText, modulation: Tensor, captions: WholeCaptions, *temporal: Tensor | None) -> None:
    """Mark what blocks are given beside their tokens."""
    of_frames = [2] * (modulation.shape[2] > 1)
    axes: list[tuple[Any, list[int]]] = [(modulation, [1, *of_frames]), *((table, [0]) for table in temporal)]
    if isinstance(text, Tensor):
        axes.append((text, [0, 1] if text.ndim == 3 else [0]))  # [B, L, D], or [N, D] end to end
    _mark([*axes, *captions.changing_axes()])


def _mark(axes: Sequence[tuple[Any, list[int]]]) -> None:
    """Tell the compiler which axes of tensors change from batch to batch, before it sees them change."""
    from torch._dynamo import maybe_mark_dynamic

    for tensor, changing in axes:
        if tensor is not None:
            maybe_mark_dynamic(tensor, changing)


def conditions_of(cfg: Any, size: tuple[int, int, int], fps: Tensor, *, frame_interval: int) -> dict[str, Tensor]:
    """Those that the model's config names of fps, height, width, num_frames and ar (width / height), each [B] float32.

    `size`: frames, height and width in pixels. `fps` [B] as the frames were taken, 0 for a picture: every
    `frame_interval`-th of the source's, whose own rate STDiT2 is told, as it was trained.
    """
    names = getattr(cfg, "conditions", ())
    if not names:
        return {}
    frames, height, width = map(float, size)
    rate = fps * frame_interval if cfg.architecture == "stdit2" else fps
    rate = torch.where(rate > 0, rate, torch.full_like(rate, IMAGE_FPS))
    sizes = {"num_frames": frames, "height": height, "width": width, "ar": width / height}
    return {name: rate if name == "fps" else torch.full_like(rate, sizes[name]) for name in names}
