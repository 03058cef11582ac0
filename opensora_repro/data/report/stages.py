"""A line of dataset tools as it lies on disk: what each kept and lost, for which reasons, and of which source video."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opensora_repro.data.inputs import TABLE_SUFFIXES
from opensora_repro.data.report.rows import batches, numeric
from opensora_repro.data.tables import EmptyTableError, Table, open_table
from opensora_repro.errors import DataError
from opensora_repro.files import is_file, one_line
from opensora_repro.storage.addresses import address_of
from opensora_repro.storage.objects import reason_missing
from opensora_repro.storage.scratch import fetched

MANIFEST_FILE, REJECTS_FILE, RULES_FILE = "manifest.parquet", "rejects.parquet", "filter.json"
SOURCES_COUNTED = 100_000  # beyond, it is only told that there are more
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


@dataclass(frozen=True)
class ToolOutcome:
    """One tool's outcome; a table without rows is None."""

    name: str
    folder: Path
    manifest: Table | None
    rejects: Table | None
    rules: list[dict[str, Any]]  # of a filter, as its filter.json tells them


@dataclass
class Counts:
    """What went through a stage."""

    rows: int
    rejected: int
    seconds: float | None  # of video; None where the manifest does not tell
    sources: int  # different values of `source`, up to SOURCES_COUNTED
    reasons: Reasons


def find_stages(inputs: Sequence[str]) -> list[ToolOutcome]:
    """Return the stages that tools' folders, or single manifests, stand for, in the order given. Raises DataError."""
    stages: list[ToolOutcome] = []
    for given in inputs:
        stage = _stage_of(Path(given))
        same = sum(other.name == stage.name for other in stages)
        stages.append(replace(stage, name=f"{stage.name} ({same + 1})") if same else stage)
    if all(stage.manifest is None and stage.rejects is None for stage in stages):
        raise DataError(f"{one_line(inputs[0])}: no row in its manifest, none rejected: there is nothing to report")
    return stages


def _stage_of(given: Path) -> ToolOutcome:
    manifest, folder = given / MANIFEST_FILE, given
    if given.suffix.lower() in TABLE_SUFFIXES and is_file(given):
        manifest, folder = given, given.parent
    elif not given.is_dir() and not address_of(given):
        raise DataError(f"{one_line(given)}: no such folder or manifest")
    rejects = folder / REJECTS_FILE
    if not is_file(manifest) and not is_file(rejects):
        if address_of(given) and (reason := reason_missing(given)):
            raise DataError(f"{one_line(given)}: {reason}")
        raise DataError(f"{one_line(given)}: holds no {MANIFEST_FILE}; expected the --out folder of a dataset tool")
    name = folder.absolute().name if manifest.name == MANIFEST_FILE else manifest.stem
    return ToolOutcome(
        re.sub(r"^\d+-", "", name) or name, folder, _table(manifest), _table(rejects), _rules(folder / RULES_FILE)
    )


def _table(path: Path) -> Table | None:
    try:
        return open_table(path) if is_file(path) else None
    except EmptyTableError:
        return None


def _rules(path: Path) -> list[dict[str, Any]]:
    """Return a filter's rules; what is no such file has none."""
    try:
        rules = json.loads(fetched(path).read_text(encoding="utf-8"))["rules"]
        return [rule for rule in rules if isinstance(rule["rule"], str) and isinstance(rule["dropped_alone"], int)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def count_stage(stage: ToolOutcome, advance: Callable[[int], None]) -> Counts:
    """Read a stage's tables once; `advance` is told how many rows were read."""
    counts = Counts(0, 0, None, 0, Reasons())
    if stage.manifest:
        counts.rows = stage.manifest.num_rows
        counts.seconds, counts.sources = _played(stage.manifest, advance)
    if stage.rejects:
        counts.rejected = stage.rejects.num_rows
        names = [n for n in ("reason", "source", "path", "id") if n in stage.rejects.schema.names]
        for batch in batches(stage.rejects, names) if "reason" in names else ():
            counts.reasons.add(batch)
            advance(batch.num_rows)
    return counts


def _played(table: Table, advance: Callable[[int], None]) -> tuple[float | None, int]:
    """Return the seconds of video, and of how many sources."""
    import pyarrow.compute as pc

    duration = numeric("duration", table.schema)
    columns = set(duration.columns if duration else ()) | ({"source"} & set(table.schema.names))
    total, sources = 0.0, set[Any]()
    for batch in batches(table, sorted(columns)) if columns else ():
        if duration:
            total += pc.sum(duration.array(batch)).as_py() or 0.0
        if "source" in columns and len(sources) < SOURCES_COUNTED:
            sources.update(pc.unique(batch.column("source").drop_null()).to_pylist())
        advance(batch.num_rows)
    return total if duration else None, min(len(sources), SOURCES_COUNTED)


# ---- reasons that differ in a number or a name alone are one


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


# ---- by source video


@dataclass
class SourceCounts:
    """One source; reasons are told with their stage."""

    name: str
    kept: int = 0
    seconds: float = 0.0
    lost: dict[str, Reason] = field(default_factory=dict)

    @property
    def num_lost(self) -> int:
        return sum(reason.count for reason in self.lost.values())

    @property
    def num_rows(self) -> int:
        return self.kept + self.num_lost

    def lose(self, stage: str, text: str, count: int) -> None:
        """Count rows; reasons that differ in a number or a name alone become one, without these."""
        alike = f"{stage}: {normal(text)}"
        reason = self.lost.setdefault(alike, Reason(f"{stage}: {text}"))
        if reason.text != f"{stage}: {text}":
            reason.text = alike
        reason.count += count


def count_sources(
    stages: Sequence[ToolOutcome], last: ToolOutcome | None, advance: Callable[[int], None]
) -> list[SourceCounts]:
    """Return the sources by what they lost, those first of which nothing was kept; empty where no table names any.

    Beyond SOURCES_COUNTED sources, those met later are left out.
    """
    found: dict[str, SourceCounts] = {}

    def source(name: str) -> SourceCounts:
        if name not in found and len(found) >= SOURCES_COUNTED:
            return SourceCounts(name)
        return found.setdefault(name, SourceCounts(name))

    if last and last.manifest:
        for name, count, seconds in _kept(last.manifest, advance):
            one = source(name)
            one.kept, one.seconds = one.kept + count, one.seconds + seconds
    for stage in stages:
        for name, reason, count in _lost(stage.rejects, advance) if stage.rejects else ():
            source(name).lose(stage.name, reason, count)
    return sorted(found.values(), key=lambda one: (one.kept > 0, -one.num_lost, one.name))


def _kept(table: Table, advance: Callable[[int], None]) -> Iterator[tuple[str, int, float]]:
    """Yield each batch's sources with their rows and seconds."""
    import pyarrow as pa

    if "source" not in table.schema.names:
        return
    duration = numeric("duration", table.schema)
    columns = {"source", *(duration.columns if duration else ())}
    for batch in batches(table, sorted(columns)):
        advance(batch.num_rows)
        seconds = duration.array(batch) if duration else pa.nulls(batch.num_rows, pa.float64())
        pairs = {"source": batch.column("source"), "seconds": seconds}
        sums = pa.table(pairs).group_by("source").aggregate([([], "count_all"), ("seconds", "sum")])
        for row in _rows(sums):
            yield row["source"], row["count_all"], row["seconds_sum"] or 0.0


def _lost(table: Table, advance: Callable[[int], None]) -> Iterator[tuple[str, str, int]]:
    """Yield each batch's sources with a reason and how many rows were rejected for it."""
    import pyarrow as pa

    if not {"source", "reason"} <= set(table.schema.names):
        return
    for batch in batches(table, ["source", "reason"]):
        advance(batch.num_rows)
        for row in _rows(pa.Table.from_batches([batch]).group_by(["source", "reason"]).aggregate([([], "count_all")])):
            yield row["source"], row["reason"] or "no reason given", row["count_all"]


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    return (row for row in table.to_pylist() if isinstance(row["source"], str) and row["source"])
