"""Exact percentiles of more numbers than fit in memory, in a few passes over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

Chunks = Callable[[], Iterable[np.ndarray]]  # starts a pass over float64 arrays, always the same ones
DIGIT_BITS = 16
COLLECT = 1 << 18  # so few candidates are sorted instead of counted again


def percentile(chunks: Chunks, percent: float) -> float | None:
    """Return what numpy's default (linear) method gives; None where there are no numbers. NaN is left out.

    Memory does not grow with the count: a radix select. A float's bits, read as an integer, can be put in the
    float's order, so counting their leading 16 bits tells which numbers can still be the one; at most three further
    passes look at the next bits of those alone, until few enough are left to be sorted.
    """
    total = sum(int(np.count_nonzero(~np.isnan(chunk))) for chunk in chunks())
    if total == 0:
        return None
    position = (total - 1) * (percent / 100)
    lower, following = _select(chunks, math.floor(position))
    if position.is_integer():
        return lower
    upper = _select(chunks, math.floor(position) + 1)[0] if following is None else following
    if lower == upper:
        return lower
    # A multiple of the difference, taken from the nearer end, as numpy does it: equal to the last bit
    share, step = position - math.floor(position), upper - lower
    return upper - step * (1 - share) if share >= 0.5 else lower + step * share


def _select(chunks: Chunks, rank: int) -> tuple[float, float | None]:
    """Return the number of that rank, from 0, and the one after it where it was seen too."""
    prefix, known = 0, 0  # the leading bits found so far, and how many they are
    while known < 64:
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for keys in _candidates(chunks, prefix, known):
            digits = (keys >> np.uint64(64 - known - DIGIT_BITS)) & np.uint64((1 << DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit] - counts[digit])
        prefix, known = prefix << DIGIT_BITS | digit, known + DIGIT_BITS
        if counts[digit] <= COLLECT:
            keys = np.sort(np.concatenate(list(_candidates(chunks, prefix, known))))
            return _number(int(keys[rank])), _number(int(keys[rank + 1])) if rank + 1 < len(keys) else None
    return _number(prefix), _number(prefix) if rank + 1 < counts[digit] else None


def _candidates(chunks: Chunks, prefix: int, known: int) -> Iterable[np.ndarray]:
    for chunk in chunks():
        keys = _keys(chunk[~np.isnan(chunk)])
        yield keys[keys >> np.uint64(64 - known) == np.uint64(prefix)] if known else keys


def _keys(numbers: np.ndarray) -> np.ndarray:
    """Integers in the numbers' order: the sign bit set for positive ones, all bits turned for negative ones."""
    bits = np.ascontiguousarray(numbers + 0.0, dtype=np.float64).view(np.uint64)  # + 0.0: one zero, not two
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def _number(key: int) -> float:
    sign = 1 << 63
    bits = key ^ sign if key & sign else ~key & (1 << 64) - 1
    return float(np.array(bits, dtype=np.uint64).view(np.float64))
