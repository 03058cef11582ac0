"""What the kernels over rows of tokens share: tiles, the samples' parts, and how tensors are handed over.

A program works on tiles of ROWS tokens by BLOCK channels, BLOCK being a power of two. Sums over a sample's tokens are
made in two passes: each program adds up the tokens of its part, then the parts are added up. So they come out the same
every time, which atomic additions would not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILE = 4096  # elements of a tile, if a row is not longer
PROGRAMS = 1024  # of a backward pass, about: several for each of a GPU's multiprocessors


def power_of_two(count: int) -> int:
    """The next one from `count` up."""
    return 1 << max(count - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """How a sample's rows are cut; `steps` tiles one after the other make a program's part."""

    rows: int
    block: int
    steps: int
    parts: int  # of a sample

    @property
    def num_warps(self) -> int:
        return 4 if self.rows * self.block <= TILE and self.block <= 1024 else 8 if self.block <= 4096 else 16


def cut(num_rows: int, block: int, others: int, *, long: bool) -> Tiles:
    """Cut `num_rows` rows; `others`: how many programs each part needs besides.

    `long`: few long parts, for sums. The number of steps is a power of two, since every other one is another kernel.
    """
    rows = max(1, min(TILE // block, power_of_two(num_rows)))
    tiles = -(-num_rows // rows)
    steps = power_of_two(-(-tiles * others // PROGRAMS)) if long else 1
    return Tiles(rows, block, steps, -(-tiles // steps))


def adjacent(x: Tensor) -> Tensor:
    """`x` with channels side by side, copied if need be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def partial_sums(vectors: int, samples: int, tiles: Tiles, channels: int, like: Tensor) -> Tensor:
    """Room for the parts' sums, float32 [vectors, B, parts, D]."""
    return torch.empty(vectors, samples, tiles.parts, channels, dtype=torch.float32, device=like.device)


def of_each_sample(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts' sums [B, parts, D] added up, [B, 1, 1, D]."""
    return partial.sum(dim=1).to(dtype)[:, None, None]
