"""What every reader of a format gives: rows in batches, and what it could not take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_repro.data.ids import Seen, text_digest
from opensora_repro.data.manifest import MANIFEST, reject
from opensora_repro.data.tables import Row, in_batches, rows_batch

Refuse = Callable[[Row], None]
STAGE = "convert"


@dataclass(frozen=True)
class InputRows:
    """The rows of an input, before their ids and sizes are looked at.

    `schema` (pyarrow) starts with the manifest's columns, which may be null; others follow.
    """

    folder: Path  # that relative paths are relative to
    schema: Any
    batches: Callable[[Refuse], Iterator[Any]]  # pyarrow record batches of that schema
    num_rows: int | None = None  # None where it is not known before


def source_of_rows(folder: Path, columns: dict[str, str], rows: Callable[[Refuse], Iterable[Row]]) -> InputRows:
    """Return a source whose reader yields rows; `columns` are those beside the manifest's, as in `write_rows`."""
    from opensora_repro.data.tables import schema_of

    schema = schema_of({**MANIFEST, **columns})
    return InputRows(folder, schema, lambda refuse: (rows_batch(rows_, schema) for rows_ in in_batches(rows(refuse))))


def refusal(identity: str, reason: str, path: str = "") -> Row:
    """Return a row of rejects.parquet."""
    return reject(identity, path, STAGE, reason, path=path)


def with_ids(batch: Any, found: list[str | None], seen: Seen, refuse: Refuse) -> Any:
    """Return the batch with an id in every row; rows whose id was there before are refused.

    A row without an id gets the one that was `found` for it, its content's digest, or else its path's digest; where the
    same file comes again with another caption, a digest of both is added. So an id stays when rows come and go.
    """
    import pyarrow as pa

    given = batch.column("id").to_pylist()
    unnamed = [at for at, identity in enumerate(given) if not identity]
    paths, captions = (batch.column(name).to_pylist() if unnamed else [] for name in ("path", "caption"))
    for at in unnamed:
        given[at] = found[at] or text_digest(paths[at])
    new = seen.add(given)
    other = seen.add([f"{paths[at]}\0{captions[at]}" for at in unnamed])
    again = [at for at, different in zip(unnamed, other, strict=True) if different and not new[at]]
    for at in again:
        given[at] += f"-{text_digest(paths[at], captions[at] or '')[:8]}"
    new[again] = seen.add([given[at] for at in again])
    whole = dict(zip(unnamed, other, strict=True))
    for at in (~new).nonzero()[0].tolist():
        reason = "another row has this id" if whole.get(at, True) else "another row has this file and caption"
        refuse(refusal(given[at], reason, batch.column("path")[at].as_py()))
    batch = batch.set_column(batch.schema.get_field_index("id"), batch.schema.field("id"), pa.array(given, pa.string()))
    return batch if new.all() else batch.filter(pa.array(new))
