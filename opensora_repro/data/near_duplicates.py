"""Near-duplicates among the embeddings of millions: clusters, and products within them (SemDeDup, Abbas et al., 2023).

A row is a duplicate where a better one is near enough; nothing is told by way of others. Rows are compared within
the cells of a k-means over all of them. A pair at the edge of a cell would be lost, so a row is also compared with the
cells whose centres come next. No cell is cut, however full: time grows with the square of what lies together and is
not near, memory with the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

COSINE = 0.95
EXACT_ROWS = 20_000  # so few are all compared with each other, which takes seconds
PROBES = 10  # cells that a row is compared with; 8 lost 2 pairs in 100 of a million without any order
ITERATIONS, SAMPLES = 10, 64  # of k-means, and how many rows a cell it looks at
BLOCK = 1 << 22  # cosines that are held at a time ...
CHUNK = 1 << 10  # ... of so many rows of a cell with others
ROWS = 1 << 14  # that are read at a time


@dataclass(frozen=True)
class NearDuplicates:
    """What was found of N rows, best first: each one's best better row (-1: none), and their cosine."""

    better: np.ndarray  # int64 [N]
    cosine: np.ndarray  # float32 [N]; -1 where there is none

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
    probes = _probes(vectors, order, cells)
    found = _Found(vectors, order, cosine)
    for members, guests in _by_cell(probes, cells):
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            for rows, compare in ((members[start:], found.among), (guests, found.between)):
                for first in range(0, len(rows), BLOCK // CHUNK):
                    compare(rows[first : first + BLOCK // CHUNK], chunk)
        advance(len(members))
    return NearDuplicates(np.where(found.better < len(order), found.better, -1), found.best_cosine)


class _Found:
    """The best better row of each of N that is known so far. What cannot change it is not compared: of rows that are
    all near to each other each is compared with the first ones alone."""

    def __init__(self, vectors: np.ndarray, order: np.ndarray, cosine: float) -> None:
        self.vectors, self.order, self.cosine = vectors, order, cosine
        self.better = np.full(len(order), len(order), dtype=np.int64)  # none yet: behind all
        self.best_cosine = np.full(len(order), -1, dtype=np.float32)

    def among(self, rows: np.ndarray, chunk: np.ndarray) -> None:
        """Compare rows with those of a chunk that are before them; both are in order."""
        self._keep(rows := self._open_to(rows, chunk), chunk, self._cosines(rows, chunk))

    def between(self, rows: np.ndarray, chunk: np.ndarray) -> None:
        """Compare rows of other cells with a chunk, whichever are the better ones."""
        worse, theirs = self._open_to(rows, chunk), self._open_to(chunk, rows)
        if len(worse) * len(chunk) + len(rows) * len(theirs) >= len(rows) * len(chunk):
            cosines = self._cosines(rows, chunk)  # once for both
            self._keep(rows, chunk, cosines)
            self._keep(chunk, rows, cosines.T)
        else:
            self._keep(worse, chunk, self._cosines(worse, chunk))
            self._keep(theirs, rows, self._cosines(theirs, rows))

    def _open_to(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the rows for which the first of the others would be a better one than is known."""
        return rows[np.minimum(self.better[rows], rows) > others[0]]

    def _cosines(self, rows: np.ndarray, others: np.ndarray) -> Tensor:
        return _unit(self.vectors, self.order[rows]) @ _unit(self.vectors, self.order[others]).T

    def _keep(self, rows: np.ndarray, others: np.ndarray, cosines: Tensor) -> None:
        """Take for each of the rows the first of the others that is near, where that is a better one than is known."""
        some = (cosines.amax(dim=1) >= self.cosine).nonzero()[:, 0]  # most blocks have few or none
        cosines, rows = cosines[some], rows[some.numpy()]
        at = (cosines >= self.cosine).numpy().argmax(axis=1)
        right = np.flatnonzero(others[at] < np.minimum(self.better[rows], rows))
        rows, at = rows[right], at[right]
        self.better[rows], self.best_cosine[rows] = others[at], cosines.numpy()[right, at]


def _by_cell(probes: np.ndarray, cells: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each cell the rows whose nearest it is, and those that come as guests, both in order."""
    homes, others = probes[:, 0], probes[:, 1:].ravel()
    members, guests = np.argsort(homes, kind="stable"), np.argsort(others, kind="stable")
    own = np.searchsorted(homes[members], np.arange(cells + 1))
    coming = np.searchsorted(others[guests], np.arange(cells + 1))
    for cell in range(cells):
        of_cell = guests[coming[cell] : coming[cell + 1]]
        yield members[own[cell] : own[cell + 1]], of_cell // max(1, probes.shape[1] - 1)


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
