"""Near-duplicates among the embeddings of millions: clusters, and products within them (SemDeDup, Abbas et al., 2023).

A row is a duplicate where a better one is near enough; nothing is told by way of others. Rows are compared within
the cells of a k-means over all of them. A pair at the edge of a cell would be lost, so a row is also compared with the
cells whose centres come next. No cell is cut, however full: time grows with the square of what lies together, memory
with the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

COSINE = 0.95
EXACT_ROWS = 20_000  # so few are all compared with each other, which takes seconds
PROBES = 8  # cells that a row is compared with: loses fewer than one pair in a hundred where embeddings have no order
ITERATIONS, SAMPLES = 10, 64  # of k-means, and how many rows a cell it looks at
BLOCK = 1 << 22  # cosines that are held at a time
ROWS = 1 << 14  # that are read at a time


@dataclass(frozen=True)
class NearDuplicates:
    """What was found of N rows, best first: each one's best better row (-1: none), their cosine, how many pairs."""

    better: np.ndarray  # int64 [N]
    cosine: np.ndarray  # float32 [N]; -1 where there is none
    num_pairs: int

    def kept(self) -> np.ndarray:
        """Return int64 [N]: the row without a better one to which each row's better ones lead; itself, if it has none.

        One that is near a duplicate alone is led on by it, and need not be near to the last itself.
        """
        rows = np.where(self.better < 0, np.arange(len(self.better)), self.better)
        while not np.array_equal(rows, further := rows[rows]):
            rows = further
        return rows


def num_cells(count: int) -> int:
    """Return of how many cells the search over `count` rows is: 1, every pair, for few rows, or without faiss."""
    return isqrt(count) if count > EXACT_ROWS and find_spec("faiss") else 1


def cells_note(count: int) -> str:
    """Say how so many rows are compared."""
    if (cells := num_cells(count)) > 1:
        return f"{count:,} embeddings are compared within {cells:,} clusters, each with the {PROBES} nearest"
    slow = "; with faiss (pip install faiss-cpu) it would be within clusters" if count > EXACT_ROWS else ""
    return f"{count:,} embeddings are all compared with each other{slow}"


def find_near_duplicates(
    vectors: np.ndarray,
    order: np.ndarray,
    *,
    cosine: float = COSINE,
    cells: int | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> NearDuplicates:
    """Compare rows of `vectors`, float [M, D] of any length but zero; `order`, int64 [N], names them, best first.

    Results count rows in that order. `vectors` may lie on the disk (a memmap). `advance` is told of rows that are done.
    """
    cells = num_cells(len(order)) if cells is None else cells
    found = _Found(len(order), _probes(vectors, order, cells), cosine)
    for cell, (members, guests) in enumerate(_by_cell(found.probes, cells)):
        if len(members):
            theirs = _unit(vectors, order[members])
            for rows in (members, guests):
                for start in range(0, len(rows), size := max(1, BLOCK // len(members))):
                    part = rows[start : start + size]
                    near = found.near(_unit(vectors, order[part]) @ theirs.T)
                    found.add(cell, part, members, *near)
        advance(len(members))
    return NearDuplicates(np.where(found.better < len(order), found.better, -1), found.best_cosine, found.num_pairs)


class _Found:
    """Gathers the pairs of N rows, of which no more than a block's are held."""

    def __init__(self, count: int, probes: np.ndarray, cosine: float) -> None:
        self.probes, self.cosine = probes, cosine
        self.better = np.full(count, count, dtype=np.int64)  # none yet: behind all
        self.best_cosine = np.full(count, -1, dtype=np.float32)
        self.num_pairs = 0

    def near(self, cosines: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the places (rows, columns) in a block that are near enough, and their cosines."""
        rows = (cosines.amax(dim=1) >= self.cosine).nonzero()[:, 0]  # most blocks have few or none
        some = cosines[rows].numpy()
        at, columns = np.nonzero(some >= self.cosine)
        return rows.numpy()[at], columns, some[at, columns]

    def add(self, cell: int, part: np.ndarray, members: np.ndarray, rows: Any, columns: Any, cosines: Any) -> None:
        """Take pairs between `part`, of this cell or its guests, and the cell's members."""
        first, second = part[rows], members[columns]
        home = self.probes[first, 0]
        # Two members meet twice in their cell; so do rows of two cells, each of which is the other's guest.
        again = np.where(home == cell, first < second, (home < cell) & (home == self.probes[second].T).any(axis=0))
        self.num_pairs += int(np.count_nonzero(~again & (first != second)))
        worse, better = np.maximum(first, second), np.minimum(first, second)
        best = np.lexsort((better, worse))
        best = best[np.flatnonzero(np.diff(worse[best], prepend=-1))]  # of each worse row, its best better one
        best = best[better[best] < np.minimum(self.better[worse[best]], worse[best])]
        self.better[worse[best]], self.best_cosine[worse[best]] = better[best], cosines[best]


def _by_cell(probes: np.ndarray, cells: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each cell the rows whose nearest it is, and those that come as guests, both in order."""
    homes, others = probes[:, 0], probes[:, 1:].ravel()
    members, guests = np.argsort(homes, kind="stable"), np.argsort(others, kind="stable")
    own = np.searchsorted(homes[members], np.arange(cells + 1))
    coming = np.searchsorted(others[guests], np.arange(cells + 1))
    for cell in range(cells):
        visits = guests[coming[cell] : coming[cell + 1]]
        yield members[own[cell] : own[cell + 1]], visits // max(1, probes.shape[1] - 1)


def _probes(vectors: np.ndarray, order: np.ndarray, cells: int) -> np.ndarray:
    """Return int32 [N, P]: the cells of each row, the nearest first."""
    if cells == 1:
        return np.zeros((len(order), 1), dtype=np.int32)
    import faiss
    import torch

    faiss.omp_set_num_threads(torch.get_num_threads())
    sample = np.random.default_rng(0).choice(len(order), min(len(order), SAMPLES * cells), replace=False)
    means = faiss.Kmeans(
        vectors.shape[1], cells, niter=ITERATIONS, seed=0, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=SAMPLES,
    )  # fmt: skip
    means.train(_unit(vectors, order[np.sort(sample)]).numpy())
    index = faiss.IndexFlatIP(vectors.shape[1])
    assert means.centroids is not None
    index.add(means.centroids)
    probes = np.empty((len(order), min(PROBES, cells)), dtype=np.int32)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        probes[start : start + ROWS] = index.search(_unit(vectors, rows).numpy(), probes.shape[1])[1]
    return probes


def _unit(vectors: np.ndarray, rows: np.ndarray) -> Tensor:
    """Return float32 [n, D] of length 1."""
    import torch

    some = torch.from_numpy(vectors[rows].astype(np.float32))
    return torch.nn.functional.normalize(some, dim=1)
