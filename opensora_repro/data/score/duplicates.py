"""Near-duplicate clips by what they look like: codes of bits, compared only where a band of them agrees.

A clip's code is CODE_WORDS words of 16 bits. Two codes that differ in fewer bits than there are words agree in at
least one whole word, so it is enough to look, word by word, at the clips that share its value (multi-index hashing,
Norouzi et al., 2012): close to n comparisons a word where codes spread evenly, not n squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

HASH_SIDE = 8  # of the square of low frequencies that a picture's hash holds: 64 bits
PICTURES = 3
CODE_WORDS = PICTURES * HASH_SIDE * HASH_SIDE // 16
MAX_DISTANCE = CODE_WORDS - 1  # of 192 bits: what the bands are sure to find
FLAT_LEVEL = 3.0  # mean size of a picture's low frequencies below which it has no pattern to compare
MAX_BUCKET = 2000  # neighbours that a clip is compared with in one bucket; only fuller buckets can lose pairs
_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """Return 64 bits, bool [64]: the signs of a picture's low frequencies against their median (pHash; Zauner, 2010).

    `grey` is uint8 [H, W]; nearly flat ones give 64 zeros. Scaling, compression, brightness and contrast change few of
    the bits.
    """
    import cv2

    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    # Without the first row and column: brightness, and what bars and shading decide
    values = cv2.dct(small)[1 : HASH_SIDE + 1, 1 : HASH_SIDE + 1].ravel()
    if np.abs(values).mean() < FLAT_LEVEL:  # its signs would be noise
        return np.zeros(values.shape, dtype=bool)
    return np.asarray(values > np.median(values))


def clip_code(grey: np.ndarray) -> np.ndarray | None:
    """Return uint16 [CODE_WORDS] of the first, middle and last of frames [T, H, W]; None where all are nearly flat.

    Clips are compared at the same shares of their length: one with another start or end is not found.
    """
    bits = np.concatenate([perceptual_hash(picture) for picture in (grey[0], grey[len(grey) // 2], grey[-1])])
    return np.packbits(bits).view(">u2").astype(np.uint16) if bits.any() else None


def num_crowded(codes: np.ndarray) -> int:
    """Return how many of the different codes are in buckets so full that `near_codes` can lose pairs of them."""
    different = np.unique(codes, axis=0)
    sizes = (np.bincount(column, minlength=1 << 16)[column] for column in different.T)
    return int(np.count_nonzero(np.max(list(sizes), axis=0) > MAX_BUCKET))


def near_codes(codes: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows of `codes`, uint16 [N, W], that differ in at most MAX_DISTANCE bits (some repeatedly).

    Of equal codes each is paired with the first alone. The different ones are sorted by a word, then by the whole code,
    so that a bucket is a run of rows; each is compared with the next, the second next, and so on within the run, all
    runs at once.
    """
    _, different, of = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    first_alike = different[of.ravel()]
    copies = np.flatnonzero(first_alike != np.arange(len(codes)))
    yield from zip(first_alike[copies].tolist(), copies.tolist(), strict=True)
    codes = codes[different]
    for word in range(codes.shape[1]):
        order = np.lexsort((*np.roll(codes, -word - 1, axis=1).T[::-1], codes[:, word]))
        keys = codes[order, word]
        ends = np.searchsorted(keys, keys, side="right")  # of each row's bucket
        rows = np.arange(len(keys))
        for step in range(1, MAX_BUCKET + 1):
            rows = rows[rows + step < ends[rows]]
            if not len(rows):
                break
            for part in np.array_split(rows, len(rows) // 65536 + 1):
                first, second = order[part], order[part + step]
                found = _BITS[codes[first] ^ codes[second]].sum(axis=1, dtype=np.int32) <= MAX_DISTANCE
                yield from zip(different[first[found]].tolist(), different[second[found]].tolist(), strict=True)


def groups_of(count: int, pairs: Iterable[tuple[int, int]], rank: Sequence[int]) -> list[int]:
    """Return for each of `count` rows the best row of its group: those that pairs join, directly or through others.

    The best has the lowest `rank`, which no two share. A row without a pair is its own.
    """
    best = list(range(count))

    def find(row: int) -> int:
        while best[row] != row:
            best[row] = best[best[row]]
            row = best[row]
        return row

    for first, second in pairs:
        a, b = find(first), find(second)
        if a != b:
            best[max(a, b, key=lambda row: rank[row])] = min(a, b, key=lambda row: rank[row])
    return [find(row) for row in range(count)]
