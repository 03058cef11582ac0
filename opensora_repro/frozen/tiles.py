"""Large frames through an autoencoder in overlapping tiles, which bounds what memory its feature maps take.

Tiles do not see each other, and where they overlap, their results fade over linearly: close to the whole, not equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

OVERLAP = 4  # a tile and its neighbour share a fourth of their side


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, multiple: int = 1) -> Tensor:
    """`function` over tiles [..., tile, tile] of x [..., H, W], of results larger or smaller by one ratio in space.

    Tiles begin at multiples of `multiple`, so that results begin at whole places. A frame that is no larger than a
    tile goes through whole, bit for bit as without tiles.
    """
    height, width = x.shape[-2:]
    if max(height, width) <= tile:
        return function(x)
    joined = weights = None
    for top in starts(height, tile, multiple):
        for left in starts(width, tile, multiple):
            part = function(x[..., top : top + tile, left : left + tile])
            ratio = part.shape[-1] / min(tile, width)
            if joined is None or weights is None:
                size = (round(height * ratio), round(width * ratio))
                joined, weights = part.new_zeros(*part.shape[:-2], *size), part.new_zeros(size)
            rows, columns = part.shape[-2:]
            row, column = round(top * ratio), round(left * ratio)
            faded = fade(rows, part)[:, None] * fade(columns, part)
            joined[..., row : row + rows, column : column + columns] += part * faded
            weights[row : row + rows, column : column + columns] += faded
    assert joined is not None and weights is not None
    return joined.div_(weights)


def starts(length: int, tile: int, multiple: int = 1) -> Iterator[int]:
    """Where tiles begin along an axis: evenly apart, a fourth of a tile shared at least, the last one at the end."""
    if length <= tile:
        yield 0
        return
    step = max(multiple, (tile - tile // OVERLAP) // multiple * multiple)
    count = 1 + -(-(length - tile) // step)
    last = (length - tile) // multiple * multiple
    yield from (last * number // (count - 1) // multiple * multiple for number in range(count))


def fade(length: int, like: Tensor) -> Tensor:
    """Weights along a tile's side: falling linearly from its middle fourths to its ends, never to zero."""
    ramp = max(1, length // OVERLAP)
    distance = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    return torch.minimum(distance, distance.flip(0)).clamp(max=ramp) / ramp
