"""A line of dataset tools as it lies on disk: what each left behind, and how much of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.inputs import TABLE_SUFFIXES
from opensora_repro.data.report.reasons import Reasons
from opensora_repro.data.report.rows import batches, numeric
from opensora_repro.data.tables import EmptyTableError, Table, open_table
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

MANIFEST_FILE, REJECTS_FILE, RULES_FILE = "manifest.parquet", "rejects.parquet", "filter.json"
SOURCES_COUNTED = 100_000  # beyond, it is only told that there are more


@dataclass(frozen=True)
class Stage:
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


def find_stages(inputs: Sequence[str]) -> list[Stage]:
    """Return the stages that tools' folders, or single manifests, stand for, in the order given. Raises DataError."""
    stages: list[Stage] = []
    for given in inputs:
        stage = _stage_of(Path(given))
        same = sum(other.name == stage.name for other in stages)
        stages.append(Stage(f"{stage.name} ({same + 1})", *_rest(stage)) if same else stage)
    if all(stage.manifest is None and stage.rejects is None for stage in stages):
        raise DataError(f"{one_line(inputs[0])}: no row in its manifest, none rejected: there is nothing to report")
    return stages


def _rest(stage: Stage) -> tuple[Path, Table | None, Table | None, list[dict[str, Any]]]:
    return stage.folder, stage.manifest, stage.rejects, stage.rules


def _stage_of(given: Path) -> Stage:
    manifest, folder = given / MANIFEST_FILE, given
    if given.suffix.lower() in TABLE_SUFFIXES and given.is_file():
        manifest, folder = given, given.parent
    elif not given.is_dir():
        raise DataError(f"{one_line(given)}: no such folder or manifest")
    rejects = folder / REJECTS_FILE
    if not manifest.is_file() and not rejects.is_file():
        raise DataError(f"{one_line(given)}: holds no {MANIFEST_FILE}; expected the --out folder of a dataset tool")
    name = folder.absolute().name if manifest.name == MANIFEST_FILE else manifest.stem
    return Stage(
        re.sub(r"^\d+-", "", name) or name, folder, _table(manifest), _table(rejects), _rules(folder / RULES_FILE)
    )


def _table(path: Path) -> Table | None:
    try:
        return open_table(path) if path.is_file() else None
    except EmptyTableError:
        return None


def _rules(path: Path) -> list[dict[str, Any]]:
    """Return a filter's rules; what is no such file has none."""
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))["rules"]
        return [rule for rule in rules if isinstance(rule["rule"], str) and isinstance(rule["dropped_alone"], int)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


def count_stage(stage: Stage, advance: Callable[[int], None]) -> Counts:
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
