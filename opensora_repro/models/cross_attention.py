"""Cross-attention to captions of different length, without work on their padding."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from opensora_repro.kernels.ops import to_device
from opensora_repro.models.layers import is_plain

MAX_HEAD_SIZE = 128  # beyond, not every GPU has the kernel's backward pass

# Attention of sequences that lie end to end: queries, keys and values [N, H, d], where the sequences of queries and of
# keys begin and end (int32 [B + 1]), and the longest of each.
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class KeysValues(NamedTuple):
    """A block's keys and values of captions, as their `take` lays them: [B, H, L, d] or [N, H, d]."""

    keys: Tensor
    values: Tensor


class FoldedText(NamedTuple):
    """A block's cross-attention to one caption of n tokens, with what surrounds it, as two matrices.

    The query projection is multiplied into the keys and the values into the output projection. For a token x [D],
    attention is softmax(x @ scores + bias) over each head's n numbers, times `values`: fewer multiplications than the
    two projections alone while a caption has fewer tokens than a head has channels.
    """

    scores: Tensor  # [D, H * n]
    bias: Tensor  # [H * n]
    values: Tensor  # [H * n, D]


# What a block reads: embedded captions as `take` of the captions lays them, or what was made of them beforehand.
BlockText = Tensor | KeysValues | list[FoldedText]


class WholeCaptions:
    """Which caption tokens each sample reads and how they lie, made once for all blocks: of each as many, and no mask.

    Those below lie otherwise; `lay_out` chooses.
    """

    def __init__(
        self,
        sources: Sequence[int] = (),
        *,
        length: int | None = None,
        rows: Tensor | None = None,
        present: Tensor | None = None,
        tokens: list[list[int]] | None = None,
    ) -> None:
        self.sources = sources  # which caption each sample reads
        self.length = length  # tokens kept of each caption; None: all
        self.rows = rows  # `sources` on the device, [B]; None: each its own
        self.present = present  # bool, broadcast over values; None: every caption has tokens
        self.tokens = tokens  # positions of each sample's tokens, where they are known

    def take(self, text: Tensor) -> Tensor:
        """What is read of text [captions, L, C]: [B, L', C], or where captions are packed [N, C]."""
        if self.length is None and self.rows is None:
            return text
        text = text[:, : self.length]
        # Always a copy: for a view blocks would be compiled once more.
        return text.clone() if self.rows is None else text[self.rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries [B, N, H, d] to keys and values [B, H, L', d], packed [N', H, d] -> [B, N, H, d]."""
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)

    def changing_axes(self) -> list[tuple[Tensor | None, list[int]]]:
        """For the compiler: which axes of what blocks read here change from batch to batch."""
        return [(self.present, [0])]


ALL = WholeCaptions()  # every token of every caption


class PaddedCaptions(WholeCaptions):
    """As many tokens of each as the longest has, the shorter ones' padding behind a mask."""

    def __init__(self, sources: Sequence[int], mask: Tensor, **how: Any) -> None:
        super().__init__(sources, **how)
        self.mask = mask  # bool [B, 1, 1, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=self.mask).transpose(1, 2)

    def changing_axes(self) -> list[tuple[Tensor | None, list[int]]]:
        return [*super().changing_axes(), (self.mask, [0, 3])]


class PackedCaptions(WholeCaptions):
    """All captions' tokens end to end, nothing in between."""

    def __init__(
        self, sources: Sequence[int], varlen: Varlen | None, index: Tensor, ends: Tensor, width: int, **how: Any
    ) -> None:
        super().__init__(sources, **how)
        self.varlen = varlen
        self.index = index  # [N], where the tokens lie in the captions end to end
        self.ends = ends  # int32 [B + 1], where each sample's tokens begin and end
        self.width = width  # no caption is longer

    def take(self, text: Tensor) -> Tensor:
        return text.flatten(0, 1)[self.index]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self.varlen is not None
        samples, queries = q.shape[:2]
        starts = queries * torch.arange(samples + 1, dtype=torch.int32, device=q.device)
        # No caption is longer than the width; the longest's own length would be compiled anew for every batch.
        out = self.varlen(q.flatten(0, 1), k, v, starts, self.ends, queries, self.width)
        return out.view(q.shape)

    def changing_axes(self) -> list[tuple[Tensor | None, list[int]]]:
        return [*super().changing_axes(), (self.ends, [0])]


def positions_under(mask: Tensor) -> list[list[int]]:
    """Where each caption's tokens are under a mask [B, L] in host memory."""
    return [[i for i, there in enumerate(row) if there] for row in mask.tolist()]


def end_to_end(
    tokens: list[list[int]],
    width: int,
    device: torch.device,
    varlen: Varlen | None = None,
    *,
    sources: Sequence[int] | None = None,
    **how: Any,
) -> PackedCaptions:
    """Captions of `width` tokens, of which sample i reads those at tokens[i] of caption sources[i]; None: of its own.

    Without `varlen`, `attend` is left to others.
    """
    sources = list(range(len(tokens))) if sources is None else list(sources)
    read = [positions or [0] for positions in tokens]
    counts = torch.tensor(list(map(len, read)))
    if not all(tokens):
        present = torch.tensor(list(map(bool, tokens)))
        how["present"] = to_device(present.repeat_interleave(counts).view(-1, 1, 1), device)
    index = torch.tensor([source * width + i for source, at in zip(sources, read, strict=True) for i in at])
    ends = F.pad(counts.cumsum(0), (1, 0)).int()
    how["tokens"] = tokens
    return PackedCaptions(sources, varlen, to_device(index, device), to_device(ends, device), width, **how)


def lay_out(
    mask: Tensor,
    num_samples: int,
    device: torch.device,
    *,
    varlen: Varlen | None = None,
    rows: Sequence[int] | None = None,
    known: bool | None = None,
) -> WholeCaptions:
    """Captions under `mask` [B, L], or fewer rows that are repeated; sample i reads caption rows[i], None: its own.

    A mask in host memory tells the lengths without waiting for a GPU: captions of one length need no mask, others are
    packed where there is the kernel `varlen` for it, else padded. Of a mask in a GPU's memory nothing is known: all
    tokens are read, behind the mask. `known`: whether to look into the mask; None: where that takes no waiting.
    A caption without any token attends to nothing: a softmax over nothing is undefined, so tokens are let in and their
    values are zeroed.
    """
    if len(mask) == 0 or num_samples % len(mask):
        raise ValueError(f"a caption mask of {len(mask)} rows cannot be repeated over {num_samples} samples")
    mask = mask.bool().repeat(num_samples // len(mask), 1)
    sources = list(range(num_samples)) if rows is None else list(rows)
    how: dict[str, Any] = {"rows": None if rows is None else to_device(torch.tensor(sources), device)}
    if not (mask.device.type == "cpu" if known is None else known):
        mask = mask[:, None, None, :]
        present = mask.any(dim=-1, keepdim=True)
        return PaddedCaptions(sources, mask | ~present, present=present, **how)

    tokens = positions_under(mask)
    read = [positions or [0] for positions in tokens]
    length = max(positions[-1] for positions in read) + 1
    if min(map(len, read)) < length and varlen is not None:
        return end_to_end(tokens, mask.shape[1], device, varlen, sources=sources, **how)
    present = torch.tensor(list(map(bool, tokens)))
    how |= {"tokens": tokens, "length": length}
    present = present.view(-1, 1, 1, 1)
    if not all(tokens):
        how["present"] = to_device(present, device)
    if min(map(len, read)) == length:
        return WholeCaptions(sources, **how)
    # Not a view, for which blocks would be compiled again
    return PaddedCaptions(sources, to_device(mask[:, None, None, :length] | ~present, device), **how)


class CrossAttention(nn.Module):
    """Tokens [B, T, S, D] attend to caption tokens."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: BlockText, captions: WholeCaptions = ALL) -> Tensor:
        """`text`: what `captions` take of embedded captions [B, L, D], or `prepare`'s result."""
        if isinstance(text, list):
            return self._attend_folded(x, text)
        samples, frames = x.shape[:2]
        q = rearrange(self.q_linear(x), "b t s (h d) -> b (t s) h d", h=self.num_heads)
        k, v = text if isinstance(text, KeysValues) else self.split(self.kv_linear(text), captions)
        out = captions.attend(q, k, v)  # [B, T * S, H, d]
        return self.proj(rearrange(out, "b (t s) h d -> b t s (h d)", b=samples, t=frames))

    def prepare(self, text: Tensor, captions: WholeCaptions) -> KeysValues | list[FoldedText]:
        """What `forward` takes for embedded captions [captions, L, D] where it reads them more than once."""
        kv = self.kv_linear(text)
        if captions.tokens is not None and self._folds(kv, captions.tokens):
            return self._fold(kv, captions.sources, captions.tokens)
        return self.split(captions.take(kv), captions)

    def split(self, kv: Tensor, captions: WholeCaptions) -> KeysValues:
        axes = "b l (two h d) -> two b h l d" if kv.ndim == 3 else "n (two h d) -> two n h d"
        k, v = rearrange(kv, axes, two=2, h=self.num_heads).unbind(0)
        return KeysValues(k, v if captions.present is None else v * captions.present)

    def _folds(self, kv: Tensor, tokens: list[list[int]]) -> bool:
        """Folding pays on a CPU while captions are short; in half precision the two matrices would be rounded.

        On a GPU the attention kernel keeps on the chip what folding would write to memory.
        """
        exact = kv.dtype == torch.float32 and not torch.is_autocast_enabled(kv.device.type)
        head_size = kv.shape[-1] // (2 * self.num_heads)
        short = sum(map(len, tokens)) <= len(tokens) * head_size
        return exact and kv.device.type == "cpu" and short and is_plain(self.q_linear) and is_plain(self.proj)

    def _fold(self, kv: Tensor, sources: Sequence[int], tokens: list[list[int]]) -> list[FoldedText]:
        heads = self.num_heads
        query = rearrange(self.q_linear.weight, "(h d) c -> h d c", h=heads)
        query_bias = rearrange(self.q_linear.bias, "(h d) -> h 1 d", h=heads)
        output = rearrange(self.proj.weight, "c (h d) -> h d c", h=heads)
        folded = []
        for source, positions in zip(sources, tokens, strict=True):
            k, v = rearrange(kv[source, positions or [0]], "n (two h d) -> two h n d", two=2, h=heads).unbind(0)
            k = k * k.shape[-1] ** -0.5
            if not positions:
                v = torch.zeros_like(v)
            scores = rearrange(k @ query, "h n c -> c (h n)").contiguous()
            bias = (k * query_bias).sum(-1).flatten()
            folded.append(FoldedText(scores, bias, (v @ output).flatten(0, 1)))
        return folded

    def _attend_folded(self, x: Tensor, text: list[FoldedText]) -> Tensor:
        out = []
        for tokens, caption in zip(x.flatten(1, 2), text, strict=True):
            scores = torch.addmm(caption.bias, tokens, caption.scores).unflatten(1, (self.num_heads, -1))
            out.append(torch.addmm(self.proj.bias, scores.softmax(-1).flatten(1), caption.values))
        return torch.stack(out).view_as(x)


def varlen_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> Varlen | None:
    """torch's attention for sequences end to end, or None where there is none for these."""
    if device.type != "cuda" or torch.version.hip is not None or head_size % 8 or head_size > MAX_HEAD_SIZE:
        return None
    one = torch.empty(1, 1, 1, head_size, dtype=dtype, device=device)
    if not can_use_flash_attention(SDPAParams(one, one, one, None, 0.0, False, False)):
        return None
    return _find_varlen()


@lru_cache(maxsize=1)
def _find_varlen() -> Varlen | None:
    try:
        kernel: Varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):  # came with torch 2.10
        return None
    return kernel
