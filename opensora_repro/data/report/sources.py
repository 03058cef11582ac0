"""What became of each source video: how many clips were kept, how many were lost, and mostly why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensora_repro.data.report.reasons import Reason, normal
from opensora_repro.data.report.rows import batches, numeric
from opensora_repro.data.report.stages import SOURCES_COUNTED, Stage
from opensora_repro.data.tables import Table, Value


@dataclass
class Source:
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


def count_sources(stages: Sequence[Stage], last: Stage | None, advance: Callable[[int], None]) -> list[Source]:
    """Return the sources by what they lost, those first of which nothing was kept; empty where no table names any.

    Beyond SOURCES_COUNTED sources, those met later are left out.
    """
    found: dict[str, Source] = {}

    def source(name: str) -> Source:
        if name not in found and len(found) >= SOURCES_COUNTED:
            return Source(name)
        return found.setdefault(name, Source(name))

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
        pairs = {"source": batch.column("source"), "seconds": _seconds(duration, batch)}
        sums = pa.table(pairs).group_by("source").aggregate([([], "count_all"), ("seconds", "sum")])
        for row in _rows(sums):
            yield row["source"], row["count_all"], row["seconds_sum"] or 0.0


def _seconds(duration: Value | None, batch: Any) -> Any:
    import pyarrow as pa

    return duration.array(batch) if duration else pa.nulls(batch.num_rows, pa.float64())


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
