"""Sequence parallelism by frames: a group of processes trains or samples one video, each holding some of its frames.

Only temporal attention needs tokens of other frames. Around it alone, tokens sharded by frame [B, T_own, S, .] and
tokens sharded by place [B, T, S_own, .] are swapped: one all-to-all of the fused queries, keys and values before, one
of the result after. All other layers work on whole frames, so they stay as they are and send nothing. With depth
blocks, D channels and a group of p, a rank sends 4 * depth * B * T * S * D * (p - 1) / p**2 numbers forward and as many
backward, besides its share of the output. Rotary positions and norms of queries and keys need no other frames: they
are applied before the swap.

    apply_sequence_parallelism(model, group)                    # then DDP, ZeRO, ... around the model
    frame_parallel = FrameParallel(wrapped, group, model.cfg.patch_size[0])
    prediction = frame_parallel(latents, timestep, text, mask)  # whole latents in, whole prediction out, on every rank
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from opensora_repro.errors import EngineError
from opensora_repro.models.layers import Attention

FRAMES, PLACES = 1, 2  # axes of tokens [B, T, S, D]


class Frames:
    """How the frames of the video at hand are shared out: the one thing a layer cannot tell from its own tokens.

    All temporal attentions of a model hold the same object. `FrameParallel` sets it before a forward pass, and again
    when the backward pass of that forward begins: activation checkpointing then runs the layers once more, and other
    videos of other lengths may have come between.
    """

    def __init__(self) -> None:
        self.total: int | None = None  # token frames of the whole video, without padding

    def of_each_rank(self, held: int, size: int) -> list[int]:
        """Real frames of each rank, where every rank holds `held` frames, the last ones padded."""
        if self.total is None or -(-self.total // size) != held:
            raise EngineError(
                f"a model made sequence parallel was called with {held} frames that FrameParallel did not give it"
            )
        return [min(max(self.total - rank * held, 0), held) for rank in range(size)]


class SequenceParallelAttention(Attention):
    """Attention over time for tokens [B, T_own, S, D] whose other frames are on the other ranks of a group.

    Holds the very projections of the attention it replaces, under the same names, so parameters and state-dict keys
    stay. `qkv`, `proj` and `num_heads` are read at every call: tensor parallelism may replace them by a rank's share.
    """

    def __init__(self, attention: Attention, group: dist.ProcessGroup, frames: Frames) -> None:
        nn.Module.__init__(self)  # and no weights of its own
        self.num_heads, self.over, self.rotary_first = attention.num_heads, attention.over, attention.rotary_first
        self.qkv, self.q_norm, self.k_norm = attention.qkv, attention.q_norm, attention.k_norm
        self.proj = attention.proj
        self.group = group
        self.frames = frames

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        held, places = x.shape[1:3]
        frames_of = self.frames.of_each_rank(held, size)
        places_of = even_shares(places, size)
        real = frames_of[rank]

        # Padding ends here: it is not projected, not sent, and nobody attends to it.
        qkv = self.turned(self.qkv(x[:, :real]), None if rotary is None else rotary[:real])  # [B, real, S, 3 * D]
        qkv = swap(qkv, self.group, split=(PLACES, places_of), join=(FRAMES, frames_of))  # [B, T, S_own, 3 * D]
        out = self.attend(qkv, self.num_heads)  # [B, T, S_own, D]
        out = swap(out, self.group, split=(FRAMES, frames_of), join=(PLACES, places_of))  # [B, real, S, D]
        return F.pad(self.proj(out), (0, 0, 0, 0, 0, held - real))


def apply_sequence_parallelism(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Make every temporal attention of `model` sequence parallel over `group`, in place; a group of one adds nothing.

    Raises EngineError for a model without any.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return
    found = [
        (block, name, layer)
        for block in model.modules()
        for name, layer in block.named_children()
        if isinstance(layer, Attention) and layer.over == "time"
    ]
    if not found:
        raise EngineError(
            f"parallel.sp_size={size} needs model.temporal_attention=true: "
            "without it every frame attends to every other in all layers, and frames cannot be shared out"
        )
    frames = Frames()
    for block, name, layer in found:
        setattr(block, name, SequenceParallelAttention(layer, group, frames))


class FrameParallel:
    """Call a sequence-parallel model as if it were whole: every rank of the group passes in the same whole video.

    `module` is the model after `apply_sequence_parallelism`, bare or wrapped (DDP, ZeRO, ...). Each rank runs it on its
    own frames and gets the whole prediction back, from which all compute the same loss. A rank's parameter gradients
    are `size` times its own frames' part: their AVERAGE over the group is the gradient of one process, so a wrapper
    that averages over all ranks of the run, sequence- and data-parallel alike, needs to know nothing of this.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, patch_frames: int) -> None:
        """`patch_frames`: latent frames a token covers, patch_size[0]. Raises EngineError."""
        self.module = module
        self.group = group
        self.patch_frames = patch_frames
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        if self.size > 1:
            found = {layer.frames for layer in module.modules() if isinstance(layer, SequenceParallelAttention)}
            if len(found) != 1:
                raise EngineError("FrameParallel needs one model that apply_sequence_parallelism was given")
            self.frames = found.pop()

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        *,
        first_frame: int = 0,
        frame_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Predict [B, C_out, T, H, W] for latents [B, C, T, H, W]; all arguments are those of the model."""
        if frame_mask is not None:
            kwargs["frame_mask"] = frame_mask
        if self.size == 1:
            return self.module(latents, timestep, text, mask, first_frame=first_frame, **kwargs)
        frames = latents.shape[2]
        tokens = -(-frames // self.patch_frames)
        held = -(-tokens // self.size) * self.patch_frames  # latent frames a rank holds
        padded = F.pad(latents, (0, 0, 0, 0, 0, self.size * held - frames))
        own = padded[:, :, self.rank * held : (self.rank + 1) * held]

        if frame_mask is not None:
            kwargs["frame_mask"] = self._own_frames(frame_mask, frames, held)
        self.frames.total = tokens
        first = first_frame + self.rank * held
        prediction = self.module(own, timestep, text, mask, first_frame=first, **kwargs)
        whole: Tensor = _GatherFrames.apply(prediction, self.group, self.frames)
        return whole[:, :, :frames]

    def _own_frames(self, frame_mask: Tensor, frames: int, held: int) -> Tensor | None:
        """This rank's part of a mask of latents' frames or of tokens', where a rank holds `held` latent ones.

        A rank whose own frames are all generated may not know it from its part, for what is padded is not.
        """
        if frame_mask.device.type == "cpu" and frame_mask.all():
            return None
        columns = frame_mask.shape[1]
        own = held if columns == frames else held // self.patch_frames
        padded = F.pad(frame_mask, (0, max(self.size * own - columns, 0)))
        return padded[:, self.rank * own : (self.rank + 1) * own]


# ---------------------------------------------------------------------------------------------------------------------
# Exchanges between ranks


def even_shares(count: int, size: int) -> list[int]:
    """`count` things over `size` ranks, as evenly as can be; the first ranks get one more."""
    return [count // size + (rank < count % size) for rank in range(size)]


def swap(x: Tensor, group: dist.ProcessGroup, *, split: tuple[int, list[int]], join: tuple[int, list[int]]) -> Tensor:
    """Turn a tensor sharded along one axis into one sharded along another, in one all-to-all; differentiable.

    `split`: an axis that is whole here and the part of it that each rank will own. `join`: the axis that is sharded
    here, and the part of it that each rank owns now; it will be whole. Parts may be uneven or empty.
    """
    swapped: Tensor = _Swap.apply(x, group, split, join)
    return swapped


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, group: dist.ProcessGroup, split: tuple[int, list[int]], join: tuple[int, list[int]]
    ) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        return _all_to_all(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _all_to_all(grad, ctx.group, ctx.join, ctx.split), None, None, None


def _all_to_all(
    x: Tensor, group: dist.ProcessGroup, split: tuple[int, list[int]], join: tuple[int, list[int]]
) -> Tensor:
    (split_axis, split_sizes), (join_axis, join_sizes) = split, join
    sent = [part.reshape(-1) for part in x.split(split_sizes, split_axis)]
    shapes = []
    for size in join_sizes:
        shape = list(x.shape)
        shape[split_axis], shape[join_axis] = split_sizes[dist.get_rank(group)], size
        shapes.append(torch.Size(shape))
    counts = [shape.numel() for shape in shapes]
    received = x.new_empty(sum(counts))
    dist.all_to_all_single(received, torch.cat(sent), counts, [part.numel() for part in sent], group=group)
    parts = [part.view(shape) for part, shape in zip(received.split(counts), shapes, strict=True)]
    return torch.cat(parts, join_axis)


class _GatherFrames(torch.autograd.Function):
    """Ranks' predictions [B, C, T_own, H, W] -> the whole one [B, C, T, H, W], on every rank.

    Every rank computes the same loss from it, so the gradient that comes back is already the sum a reduction would
    want: a rank takes its own frames of it, times the group's size (see FrameParallel on averages).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, own: Tensor, group: dist.ProcessGroup, frames: Frames
    ) -> Tensor:
        ctx.group, ctx.frames, ctx.total, ctx.held = group, frames, frames.total, own.shape[2]
        size = dist.get_world_size(group)
        whole = own.new_empty(size * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(whole, own.contiguous(), group=group)
        return rearrange(whole, "(rank b) c t h w -> b c (rank t) h w", rank=size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Every path back into this call's layers starts here, and autograd runs later calls' nodes before earlier
        # ones': until another call's gather, recomputed layers belong to this video.
        ctx.frames.total = ctx.total
        first = dist.get_rank(ctx.group) * ctx.held
        return grad[:, :, first : first + ctx.held] * dist.get_world_size(ctx.group), None, None
