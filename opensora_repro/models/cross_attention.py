"""Cross-attention to captions of different length, without work on their padding."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from opensora_repro.kernels.choice import to_device
from opensora_repro.models.layers import is_plain

MAX_HEAD_SIZE = 128  # beyond, not every GPU has the kernel's backward pass

# Attention of sequences that lie end to end: queries, keys and values [N, H, d], where the sequences of queries and of
# keys begin and end (int32 [B + 1]), and the longest of each.
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


class KeysValues(NamedTuple):
    """A block's keys and values of a batch's captions, as `Captions.take` lays them: [B, H, L, d] or [N, H, d]."""

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


# What a block reads: embedded captions as `Captions.take` lays them, or what was made of them beforehand.
BlockText = Tensor | KeysValues | list[FoldedText]


class Captions:
    """Which caption tokens each sample reads and how they lie, made once for all blocks.

    A mask in host memory tells the lengths without waiting for a GPU. Then no caption is longer than the longest:

    - of one length: as many tokens of each, and no mask;
    - where there is a kernel for it: all captions' tokens end to end, nothing in between;
    - else: as many tokens of each as the longest has, the shorter ones' padding masked.

    Of a mask in a GPU's memory nothing is known: all tokens are read, behind the mask.

    A caption without any token attends to nothing: a softmax over nothing is undefined, so tokens are let in and their
    values are zeroed.
    """

    attend: Tensor | None = None  # [B, 1, 1, L] bool
    present: Tensor | None = None  # bool, broadcast over values; None: every caption has tokens
    length: int | None = None  # tokens kept of each caption; None: all
    rows: Tensor | None = None  # [B], which caption each sample reads; None: each its own
    index: Tensor | None = None  # [N], where the tokens lie in the captions end to end, for `varlen`
    varlen: Varlen | None = None
    ends: Tensor  # int32 [B + 1], with `varlen`: where each sample's tokens begin and end
    width: int  # with `varlen`: no caption is longer
    tokens: list[list[int]] | None = None  # positions of each sample's tokens, where they are known

    def __init__(
        self,
        mask: Tensor,
        num_samples: int,
        device: torch.device,
        *,
        varlen: Varlen | None = None,
        rows: Sequence[int] | None = None,
        known: bool | None = None,
    ) -> None:
        """`mask` [B, L], or fewer rows that are repeated. `rows`: sample i reads caption rows[i]; None: caption i.

        `known`: whether to look into the mask; None: where that takes no waiting.
        """
        if len(mask) == 0 or num_samples % len(mask):
            raise ValueError(f"a caption mask of {len(mask)} rows cannot be repeated over {num_samples} samples")
        mask = mask.bool().repeat(num_samples // len(mask), 1)
        self.sources = list(range(num_samples)) if rows is None else list(rows)
        self.rows = None if rows is None else to_device(torch.tensor(self.sources), device)
        if mask.device.type == "cpu" if known is None else known:
            self._lay_out(mask, device, varlen)
        else:
            mask = mask[:, None, None, :]
            self.present = mask.any(dim=-1, keepdim=True)
            self.attend = mask | ~self.present

    def _lay_out(self, mask: Tensor, device: torch.device, varlen: Varlen | None) -> None:
        self.tokens = [[i for i, there in enumerate(row) if there] for row in mask.tolist()]
        read = [positions or [0] for positions in self.tokens]
        present = torch.tensor(list(map(bool, self.tokens)))
        self.length = max(positions[-1] for positions in read) + 1
        if min(map(len, read)) < self.length:
            if varlen is not None:
                self._lay_end_to_end(read, mask.shape[1], device, varlen)
                present = present.repeat_interleave(torch.tensor(list(map(len, read))))
            else:
                # Not a view, for which blocks would be compiled again
                attend = mask[:, None, None, : self.length] | ~present[:, None, None, None]
                self.attend = to_device(attend, device)
        if not all(self.tokens):
            shape = (-1, 1, 1) if self.varlen else (-1, 1, 1, 1)
            self.present = to_device(present.view(shape), device)

    def _lay_end_to_end(self, read: list[list[int]], width: int, device: torch.device, varlen: Varlen) -> None:
        pairs = zip(self.sources, read, strict=True)
        index = [source * width + position for source, positions in pairs for position in positions]
        ends = torch.tensor([0, *map(len, read)]).cumsum(0)
        self.varlen, self.width = varlen, width
        self.index = to_device(torch.tensor(index), device)
        self.ends = to_device(ends.int(), device)

    def take(self, text: Tensor) -> Tensor:
        """What is read of text [captions, L, C]: [B, L', C], or [N, C] end to end."""
        if self.index is not None:
            return text.flatten(0, 1)[self.index]
        text = text[:, : self.length]
        # Always a copy: for a view blocks would be compiled once more.
        return text.clone() if self.rows is None else text[self.rows]

    def end_to_end(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of queries [B, N, H, d] to keys and values laid end to end."""
        assert self.varlen is not None
        samples, queries = q.shape[:2]
        starts = queries * torch.arange(samples + 1, dtype=torch.int32, device=q.device)
        # No caption is longer than the width; the longest's own length would be compiled anew for every batch.
        out = self.varlen(q.flatten(0, 1), k, v, starts, self.ends, queries, self.width)
        return out.view(q.shape)


class CrossAttention(nn.Module):
    """Tokens [B, T, S, D] attend to caption tokens."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: BlockText, captions: Captions | None = None) -> Tensor:
        """`text`: what `captions` take of embedded captions [B, L, D], or `prepare`'s result; no captions: all."""
        if isinstance(text, list):
            return self._attend_folded(x, text)
        k, v = text if isinstance(text, KeysValues) else self._split(self.kv_linear(text), captions)
        samples, frames = x.shape[:2]
        q = rearrange(self.q_linear(x), "b t s (h d) -> b (t s) h d", h=self.num_heads)
        if captions is not None and captions.varlen is not None:
            out = captions.end_to_end(q, k, v)
        else:
            attend = None if captions is None else captions.attend
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=attend).transpose(1, 2)
        return self.proj(rearrange(out, "b (t s) h d -> b t s (h d)", b=samples, t=frames))

    def prepare(self, text: Tensor, captions: Captions | None) -> KeysValues | list[FoldedText]:
        """What `forward` takes for embedded captions [captions, L, D] where it reads them more than once."""
        kv = self.kv_linear(text)
        if captions is not None and captions.tokens is not None and self._folds(kv, captions.tokens):
            return self._fold(kv, captions.sources, captions.tokens)
        return self._split(kv if captions is None else captions.take(kv), captions)

    def _split(self, kv: Tensor, captions: Captions | None) -> KeysValues:
        axes = "b l (two h d) -> two b h l d" if kv.ndim == 3 else "n (two h d) -> two n h d"
        k, v = rearrange(kv, axes, two=2, h=self.num_heads).unbind(0)
        present = None if captions is None else captions.present
        return KeysValues(k, v if present is None else v * present)

    def _folds(self, kv: Tensor, tokens: list[list[int]]) -> bool:
        """Folding pays on a CPU while captions are short; in half precision the two matrices would be rounded.

        On a GPU the attention kernel keeps on the chip what folding would write to memory.
        """
        exact = kv.dtype == torch.float32 and not torch.is_autocast_enabled(kv.device.type)
        head_size = kv.shape[-1] // (2 * self.num_heads)
        short = sum(map(len, tokens)) <= len(tokens) * head_size
        return exact and kv.device.type == "cpu" and short and is_plain(self.q_linear) and is_plain(self.proj)

    def _fold(self, kv: Tensor, sources: list[int], tokens: list[list[int]]) -> list[FoldedText]:
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
