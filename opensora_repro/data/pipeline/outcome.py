"""A line's own manifest and rejects, of all its stages' tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opensora_repro.data.outcome import REJECTS
from opensora_repro.data.report.stages import Stage
from opensora_repro.data.tables import Rebase, Table, table_writer


def write_manifest_of(stage: Stage, path: Path) -> int:
    """Write a stage's manifest again as `path`, with paths relative to its folder; returns the rows."""
    assert stage.manifest, stage.name
    rebase = Rebase(stage.folder.absolute(), path.parent.absolute())
    with table_writer(path, stage.manifest.schema) as write:
        for batch in stage.manifest.batches():
            write(rebase(batch))
    return stage.manifest.num_rows


def write_rejects_of(stages: Sequence[Stage], path: Path) -> int:
    """Write the rejects of all stages as one table, in the stages' order; returns the rows."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in REJECTS.items()])
    rows = 0
    with table_writer(path, schema) as write:
        for stage in stages:
            rebase = Rebase(stage.folder.absolute(), path.parent.absolute())
            for batch in _shaped(stage.rejects, stage.name, schema) if stage.rejects else ():
                write(rebase(batch))
                rows += batch.num_rows
    return rows


def _shaped(rejects: Table, stage: str, schema: Any) -> Iterator[Any]:
    """Yield a stage's rejects with the columns that every stage has; `stage` where they do not tell it."""
    import pyarrow as pa

    for batch in rejects.batches():
        columns = []
        for field in schema:
            if field.name in batch.schema.names:
                columns.append(batch.column(field.name).cast(field.type))
            elif field.name == "stage":
                columns.append(pa.repeat(pa.scalar(stage), batch.num_rows))
            else:
                columns.append(pa.nulls(batch.num_rows, field.type))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
