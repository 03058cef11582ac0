"""Ids made of texts, digests of columns, and which have come before among millions: 8 bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


# What may change under the same ids: what it is in the record, and what a message calls it.
TOLD_COLUMNS = {
    "caption": "captions", "num_frames": "lengths (num_frames)", "fps": "rates (fps)", "height": "heights",
    "width": "widths",
}  # fmt: skip


def text_digest(*parts: str) -> str:
    """Return 16 hex digits of some texts."""
    told = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        told.update(f"{len(data)}:".encode() + data)
    return told.hexdigest()


def column_digest(column: Any) -> str:
    """Return 16 hex digits of the values of a pyarrow column in their order, as text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    told = hashlib.blake2b(digest_size=8)
    for batch in pa.table({"texts": column}).to_batches(max_chunksize=1 << 16):  # joined, they have to fit in 2 GB
        texts = batch["texts"].cast(pa.string())
        told_apart = pc.binary_join_element_wise(pc.utf8_length(texts).cast(pa.string()), texts, ":")
        told.update(pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], told_apart), "")[0].as_buffer())
    return told.hexdigest()


def ids_fingerprint(ids: Any) -> str:
    """Digest of a column of ids in their order, on which the order of training depends."""
    return f"{len(ids)} samples, ids {column_digest(ids)}"


class Originals:
    """Which of many files, told by 16 hex digits of their contents, is the first with the same: 16 bytes a file."""

    def __init__(self, digests: Iterable[str]) -> None:
        import numpy as np

        contents = np.fromiter((int(text, 16) for text in digests), np.uint64)
        _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
        self.first = first[inverse]
        self.copied = np.zeros(len(contents), bool)
        self.copied[self.first[self.first != np.arange(len(contents))]] = True

    def names(self) -> Callable[[str], str]:
        """Return a function that is told each file's name in turn, and tells the first one's with its content."""
        numbers, known = count(), dict[int, str]()  # the names of those that have copies

        def original(name: str) -> str:
            number = next(numbers)
            first = int(self.first[number])
            if first == number and self.copied[number]:
                known[number] = name
            return known.get(first, name)

        return original


class Seen:
    """Remembers names by 64-bit hashes, kept as few sorted runs that grow by merging.

    Two of n different names are taken for the same with a probability of n^2 / 2^65: for ten million, 3 in a million.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, names: Sequence[str]) -> np.ndarray:
        """Return for each name whether it is new, bool [N]; of equal ones here, the first is."""
        import numpy as np

        hashes = np.fromiter(map(hash, names), np.int64, len(names))
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        new = np.ones(len(hashes), dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        for run in self.runs:
            at = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            new &= run[at] != ordered
        if new.any():
            self._keep(ordered[new])
        result = np.empty_like(new)
        result[order] = new
        return result

    def _keep(self, run: np.ndarray) -> None:
        import numpy as np

        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), kind="stable")  # stable: a merge of sorted runs
        self.runs.append(run)
