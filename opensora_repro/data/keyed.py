"""Randomness that belongs to a sample: generators keyed by (seed, epoch, sample id, stream).

No rank, worker or step enters the key, so a sample meets the same crop, noise and timestep wherever and whenever it is
processed, and no generator state needs saving.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, *parts: int | str) -> int:
    """Hash the key to 64 bits with BLAKE2b; the same on every machine, process and Python version.

    Each part is written with its type and length, so that ("a", "bc") and ("ab", "c"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(f"{'s' if isinstance(part, str) else 'i'}{len(data)}:".encode())
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def keyed_generator(seed: int, epoch: int, sample_id: str, stream: str) -> torch.Generator:
    """Return a CPU generator for one purpose (`stream`: "noise", "timestep", "crop", ...) of one sample's visit.

    torch's CPU generator keeps the low 32 bits of its seed, so two of n keys agree with probability about n^2 / 2^33.
    """
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, epoch, sample_id, stream))
