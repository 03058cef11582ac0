"""What the columns of a table hold, in two passes over it: numbers as histograms, few-valued columns as counts.

Memory does not grow with the table: the first pass finds extremes and takes a sample, evenly spread over the rows,
which places a histogram's bins; the second fills them with every row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opensora_repro.data.report.rows import batches, numeric, spread
from opensora_repro.data.tables import NUMBER, Table, Value

BINS = 32
SAMPLE = 20_000  # rows
TAIL = 0.5  # percent of the sample at either end that does not stretch the axis
FEW = 12  # different numbers that are counted instead of binned
VALUES_SHOWN, VALUES_KEPT = 10, 1000  # of a column of text; with more different ones it is left out
UNIQUE = ("id", "path", "caption", "caption_original", "duplicate_group", "url")  # columns that are no classes
WORDS, CHARACTERS = "caption, words", "caption, characters"
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
WORDS_KEPT = 200_000  # different words; rare ones are forgotten beyond
CAPTION_READ = 5000  # characters of a caption that are looked at
PLAIN = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been being but by for from had has have he her his in into is it its of on or over she"
        " so some that the their them then there these they this those through to up was were which while who with",
    )
)  # English words that say nothing of a caption's subject


@dataclass
class Numbers:
    """A column of numbers. The first and last bin also hold what lies beyond them."""

    name: str
    count: int
    missing: int
    low: float
    high: float
    mean: float
    median: float  # of the sample
    edges: np.ndarray  # [bins + 1]
    counts: np.ndarray  # [bins], rows
    before: np.ndarray | None = None  # [bins]: the same of another table's rows


@dataclass
class Classes:
    """A column of few values, by frequency."""

    name: str
    counts: list[tuple[str, int]]
    others: int  # rows with a value that is not among `counts`
    missing: int

    @property
    def total(self) -> int:
        return sum(count for _, count in self.counts) + self.others + self.missing


@dataclass
class Summary:
    """What is told of a table's columns, in the table's order."""

    numbers: list[Numbers] = field(default_factory=list)
    classes: list[Classes] = field(default_factory=list)


class _Measure:
    """First pass over a column of numbers."""

    def __init__(self, value: Value) -> None:
        self.value = value
        self.count = self.missing = 0
        self.low, self.high, self.sum = np.inf, -np.inf, 0.0
        self.few: Counter[float] | None = Counter()
        self.sample: list[np.ndarray] = []

    def add(self, batch: Any, sampled: np.ndarray) -> None:
        values = values_of(self.value, batch)
        known = values[np.isfinite(values)]
        self.missing += len(values) - len(known)
        self.sample.append(values[sampled])
        if not len(known):
            return
        self.count += len(known)
        self.low, self.high = min(self.low, float(known.min())), max(self.high, float(known.max()))
        self.sum += float(known.sum())
        if self.few is not None:
            different, counts = np.unique(known, return_counts=True)
            self.few.update(dict(zip(different.tolist(), counts.tolist(), strict=True)))
            if len(self.few) > FEW:
                self.few = None

    def known_sample(self) -> np.ndarray:
        """Return the finite numbers of the sample; the extremes where there is none. At least one row was read."""
        sample = np.concatenate(self.sample)
        sample = sample[np.isfinite(sample)]
        return sample if len(sample) else np.array([self.low, self.high])

    def finish(self, name: str, before: _Measure | None) -> Numbers:
        """Return the column with empty bins, which reach over the numbers of `before` too."""
        sample = self.known_sample()
        middle, low, high = float(np.median(sample)), self.low, self.high
        if before is not None and before.count:
            low, high = min(low, before.low), max(high, before.high)
            sample = np.concatenate([sample, before.known_sample()])
        edges = bin_edges(low, high, sample)
        counts = np.zeros(len(edges) - 1, dtype=np.int64)
        return Numbers(
            name, self.count, self.missing, self.low, self.high, self.sum / self.count, middle, edges, counts
        )


class _Tally:
    """First pass over a column of text or truth values."""

    def __init__(self) -> None:
        self.counts: Counter[str] | None = Counter()
        self.missing = 0

    def add(self, column: Any) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.missing += column.null_count
        if self.counts is None:
            return
        for entry in pc.value_counts(column.cast(pa.string()).drop_null()).to_pylist():
            self.counts[entry["values"]] += entry["counts"]
        if len(self.counts) > VALUES_KEPT:
            self.counts = None


def summarize(table: Table, advance: Callable[[int], None], before: Table | None = None) -> Summary:
    """Return what the columns hold; `before` is a table whose rows are counted into the same bins.

    `advance` is told how many rows were read. Raises DataError for a damaged file.
    """
    tallies = {name: _Tally() for name in class_columns(table.schema)}
    measures = _measure(table, tallies, advance)
    others = _measure(before, {}, advance) if before else {}
    summary = Summary()
    few = {n: m for n, m in measures.items() if m.few and (len(m.few) == 1 or all(v.is_integer() for v in m.few))}
    summary.numbers = [m.finish(name, others.get(name)) for name, m in measures.items() if m.count and name not in few]
    fill(summary.numbers, table, advance)
    if before is not None:
        fill(summary.numbers, before, advance, as_before=True)
    for name in dict.fromkeys([*table.schema.names, *few]):
        if name in few:
            summary.classes.append(_of_numbers(name, few[name]))
        elif name in tallies and (shown := _of_text(name, tallies[name])):
            summary.classes.append(shown)
    return summary


def _measure(table: Table, tallies: dict[str, _Tally], advance: Callable[[int], None]) -> dict[str, _Measure]:
    """First pass: return what the columns of numbers hold, and add what the others do to `tallies`."""
    measures = {name: _Measure(value) for name, value in number_columns(table.schema).items()}
    read = frozenset(tallies).union(*(measure.value.columns for measure in measures.values()))
    positions, start = np.array(spread(table.num_rows, SAMPLE)), 0
    for batch in batches(table, sorted(read)):
        sampled = positions[(positions >= start) & (positions < start + batch.num_rows)] - start
        for measure in measures.values():
            measure.add(batch, sampled)
        for name, tally in tallies.items():
            tally.add(batch.column(name))
        start += batch.num_rows
        advance(batch.num_rows)
    return measures


def fill(columns: list[Numbers], table: Table, advance: Callable[[int], None], *, as_before: bool = False) -> None:
    """Count a table's rows into the bins: into `counts`, or into `before` where the table has the column."""
    values = number_columns(table.schema)
    filled = [column for column in columns if column.name in values]
    if as_before:
        for column in filled:
            column.before = np.zeros_like(column.counts)
    needed = sorted(frozenset[str]().union(*(values[column.name].columns for column in filled)))
    for batch in batches(table, needed) if needed else ():
        for column in filled:
            numbers_here = values_of(values[column.name], batch)
            clipped = np.clip(numbers_here[np.isfinite(numbers_here)], column.edges[0], column.edges[-1])
            target = column.before if as_before and column.before is not None else column.counts
            target += np.histogram(clipped, column.edges)[0]
        advance(batch.num_rows)


def number_columns(schema: Any) -> dict[str, Value]:
    """Return the columns of numbers by name, `duration` and the captions' lengths among them."""
    import pyarrow.compute as pc

    found: dict[str, Value] = {}
    for name in dict.fromkeys([*schema.names, "duration"]):
        if value := numeric(name, schema):
            found[name] = value
    if "caption" in schema.names and str(schema.field("caption").type) in ("string", "large_string"):
        found[WORDS] = Value(NUMBER, _num_words, frozenset({"caption"}))
        found[CHARACTERS] = Value(NUMBER, lambda batch: pc.utf8_length(batch.column("caption")), frozenset({"caption"}))
    return found


def class_columns(schema: Any) -> Collection[str]:
    """Return the names of the columns of text or truth values that may have few different values."""
    from pyarrow import types

    kinds = (types.is_boolean, types.is_string, types.is_large_string, types.is_dictionary)
    return [f.name for f in schema if f.name not in UNIQUE and any(kind(f.type) for kind in kinds)]


def values_of(value: Value, batch: Any) -> np.ndarray:
    """Return float64 [rows], NaN for missing."""
    import pyarrow as pa

    return value.array(batch).cast(pa.float64()).to_numpy(zero_copy_only=False)


def bin_edges(low: float, high: float, sample: np.ndarray) -> np.ndarray:
    """Return ascending edges around the sample without its tails, or up to an extreme that is not far off.

    Whole numbers in a small range have a bin each.
    """
    start, end = np.percentile(sample, [TAIL, 100 - TAIL])
    reach = 0.25 * (end - start)
    start, end = (low if low >= start - reach else start), (high if high <= end + reach else end)
    if bool(np.all(sample == np.round(sample))) and end - start < BINS:
        return np.arange(np.floor(start), np.ceil(end) + 2) - 0.5
    if not end > start or not np.isfinite(end - start):
        margin = abs(start) / 2 or 0.5
        start, end = start - margin, start + margin
    return np.linspace(start, end, BINS + 1)


def _num_words(batch: Any) -> Any:
    import pyarrow.compute as pc

    captions = pc.utf8_trim_whitespace(batch.column("caption"))
    return pc.if_else(pc.equal(captions, ""), 0, pc.list_value_length(pc.utf8_split_whitespace(captions)))


def _of_numbers(name: str, measure: _Measure) -> Classes:
    counts = sorted((measure.few or Counter[float]()).items())
    return Classes(name, [(f"{value:g}", count) for value, count in counts], 0, measure.missing)


def _of_text(name: str, tally: _Tally) -> Classes | None:
    if not tally.counts:
        return None
    ranked = sorted(tally.counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ranked[:VALUES_SHOWN]
    return Classes(name, shown, sum(count for _, count in ranked[VALUES_SHOWN:]), tally.missing)


def frequent_words(captions: Iterable[str], count: int) -> list[tuple[str, int]]:
    """Return the words that most captions hold, with how many do, the most frequent first."""
    found: Counter[str] = Counter()
    for caption in captions:
        found.update({word.lower() for word in WORD.findall(caption[:CAPTION_READ])} - PLAIN)
        if len(found) > WORDS_KEPT:
            found = Counter(dict(found.most_common(WORDS_KEPT // 2)))
    return sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]
