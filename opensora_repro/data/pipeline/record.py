"""What a step of a line was made from, so that it runs again when that has changed, and only then.

A record beside the step's manifest holds its options, the state of the files they name, and digests of the manifest it
read and of the tables it wrote. It is written last: a step that was killed has none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opensora_repro.data.manifest import REJECTS, Rebase
from opensora_repro.data.report.stages import MANIFEST_FILE, REJECTS_FILE, ToolOutcome
from opensora_repro.data.tables import EmptyTableError, Table, open_table, schema_of, table_writer
from opensora_repro.files import digest, is_file, remove_file, sha256_of, write_text
from opensora_repro.storage.addresses import address_of, is_address
from opensora_repro.storage.objects import objects_below
from opensora_repro.storage.scratch import fetched

RECORD_FILE = "done.json"
METHOD = 1  # raise when a tool would make other tables of the same options and input: steps are then run again


def is_done(folder: Path, tool: str, options: Sequence[str], given: Path) -> bool:
    """Whether the step's outcome in `folder` is that of this tool, these options and the manifest `given`."""
    try:
        record = json.loads(fetched(folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record == _record(folder, tool, options, given)) and has_its_files(folder)


def record_done(folder: Path, tool: str, options: Sequence[str], given: Path) -> None:
    """Note that the step's outcome is there."""
    text = json.dumps(_record(folder, tool, options, given), indent=2, ensure_ascii=True)
    write_text(folder / RECORD_FILE, text + "\n")


def forget(folder: Path) -> None:
    """Take the note back, before the step runs again."""
    remove_file(folder / RECORD_FILE)


def _content(path: Path) -> str:
    return sha256_of(path) if is_file(path) else ""


def _record(folder: Path, tool: str, options: Sequence[str], given: Path) -> dict[str, Any]:
    return {
        "method": METHOD,
        "tool": tool,
        "options": list(options),
        "files": files_state(options),
        "input": _content(given),
        "outcome": [_content(folder / name) for name in (MANIFEST_FILE, REJECTS_FILE)],
    }


def files_state(options: Sequence[str]) -> dict[str, str]:
    """Return a digest of size and time of change of each file or folder that an option names.

    These decide whether a tool looks at the files again, not whether their work is done.
    """
    state = {}
    for option in options:
        value = option.partition("=")[2] if option.startswith("--") else option
        try:
            exists = bool(value) and os.path.lexists(value)
        except ValueError:  # a null character
            continue
        if exists:
            state[value] = digest(sorted(_files_of(value)))
    return state


def _files_of(path: str) -> Iterator[tuple[str, int, int]]:
    if not os.path.isdir(path):
        paths = [path]
    else:
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for name in paths:
        try:
            status = os.stat(name)
        except OSError:
            continue
        yield os.path.relpath(name, path), status.st_size, status.st_mtime_ns


def has_its_files(folder: Path) -> bool:
    """Whether the files inside `folder` that its manifest names, such as clips, are there."""
    if not is_file(folder / MANIFEST_FILE):
        return True
    try:
        table = open_table(folder / MANIFEST_FILE)
    except EmptyTableError:
        return True
    listed: dict[str, set[str]] = {}
    for batch in table.batches(["path"]) if "path" in table.schema.names else ():
        for path in batch.column("path").to_pylist():
            if not isinstance(path, str) or path.startswith(("/", "../")) or is_address(path):
                continue
            parent, _, name = path.rpartition("/")
            if parent not in listed:
                listed[parent] = _names_in(folder / parent)
            if name not in listed[parent]:
                return False
    return True


def _names_in(folder: Path) -> set[str]:
    if address_of(folder):
        return {path.name for path in objects_below(folder)}
    return set(os.listdir(folder)) if folder.is_dir() else set()


def write_manifest_of(stage: ToolOutcome, path: Path) -> int:
    """Write a stage's manifest again as `path`, with paths relative to its folder; returns the rows."""
    assert stage.manifest, stage.name
    rebase = Rebase(stage.folder.absolute(), path.parent.absolute())
    with table_writer(path, stage.manifest.schema) as write:
        for batch in stage.manifest.batches():
            write(rebase(batch))
    return stage.manifest.num_rows


def write_rejects_of(stages: Sequence[ToolOutcome], path: Path) -> int:
    """Write the rejects of all stages as one table, in the stages' order; returns the rows."""
    schema, rows = schema_of(REJECTS), 0
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
