"""Why rows were rejected, counted: reasons that differ in a number or a name alone are one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

FEW = 12  # so many different reasons are told as they are
MOST = 10_000  # different reasons that are counted one by one
EXAMPLES = 3  # rows named for each
LONGEST = 300  # characters of a reason that count
REST = "other reasons"
VARIABLE = (
    (re.compile(r"same content as .*"), "same content as …"),
    (re.compile(r"'[^']*'|\"[^\"]*\""), "…"),
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{8,}[-0-9]*\b"), "…"),
    (re.compile(r"[^\s,;:]+\.[a-zA-Z]\w{1,4}\b(?!\()"), "…"),
    (re.compile(r"(?<!\w)[-+]?\d[\d.,]*(?:e[-+]?\d+)?"), "#"),
)


@dataclass
class Reason:
    """A reason: how many rows were rejected for it, and some of them by name, each with its own words."""

    text: str
    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


class Reasons:
    """Gathers reasons while rows stream by, in memory that does not grow with them."""

    def __init__(self) -> None:
        self._groups: dict[str, Reason] = {}
        self._alike = False  # whether reasons are counted by their normal form

    def add(self, batch: Any) -> None:
        """Count a record batch with the column reason and some of source, path and id."""
        for text, count, examples in _counted(batch):
            self._put(text, count, examples)
        if not self._alike and len(self._groups) > FEW:
            groups, self._groups, self._alike = self._groups.values(), {}, True
            for group in groups:
                self._put(group.text, group.count, group.examples)

    def ranked(self) -> list[Reason]:
        """Return the reasons, the most frequent first."""
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def _put(self, text: str, count: int, examples: list[tuple[str, str]]) -> None:
        key = normal(text) if self._alike else text
        if key not in self._groups and len(self._groups) >= MOST:
            key = REST
        group = self._groups.setdefault(key, Reason(key))
        group.count += count
        group.examples += examples[: EXAMPLES - len(group.examples)]


def normal(text: str) -> str:
    """Return a reason with what varies from row to row left out: numbers, names of files, quoted text."""
    for pattern, word in VARIABLE:
        text = pattern.sub(word, text)
    return text


def _counted(batch: Any) -> Iterator[tuple[str, int, list[tuple[str, str]]]]:
    """Yield each different reason of a batch, how often it occurs, and its first rows."""
    import numpy as np
    import pyarrow as pa

    coded = batch.column("reason").cast(pa.string()).fill_null("no reason given").dictionary_encode()
    codes = coded.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=len(coded.dictionary))
    ends = np.cumsum(counts)
    for text, count, end in zip(coded.dictionary.to_pylist(), counts.tolist(), ends.tolist(), strict=True):
        rows = order[end - count : end][:EXAMPLES].tolist()
        yield text[:LONGEST], count, [(_name(batch, row), text[:LONGEST]) for row in rows]


def _name(batch: Any, row: int) -> str:
    """Source and path, where they differ and are there; else the id."""
    names = [name for name in ("source", "path", "id") if name in batch.schema.names]
    values = {name: str(batch.column(name)[row].as_py() or "") for name in names}
    place = dict.fromkeys(value for name, value in values.items() if value and name != "id")
    return " · ".join(place) or values.get("id", "")
