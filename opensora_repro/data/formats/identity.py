"""Ids for rows that have none, and no id twice."""

from __future__ import annotations

import hashlib
from typing import Any

from opensora_repro.data.formats.source import Refuse, refusal
from opensora_repro.data.seen import Seen


def text_digest(*parts: str) -> str:
    """Return 16 hex digits of some texts."""
    told = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        told.update(f"{len(data)}:".encode() + data)
    return told.hexdigest()


def with_ids(batch: Any, found: list[str | None], seen: Seen, refuse: Refuse) -> Any:
    """Return the batch with an id in every row; rows whose id was there before are refused.

    A row without an id gets the one that was `found` for it, its content's digest, or else its path's digest; where the
    same file comes again with another caption, a digest of both is added. So an id stays when rows come and go.
    """
    import pyarrow as pa

    given = batch.column("id").to_pylist()
    named = [bool(identity) for identity in given]
    if not all(named):
        paths, captions = batch.column("path").to_pylist(), batch.column("caption").to_pylist()
        given = [
            identity or base or text_digest(path) for identity, base, path in zip(given, found, paths, strict=True)
        ]
    new = seen.add(given)
    again = [at for at in range(len(given)) if not new[at]]
    unnamed = [at for at in again if not named[at]]
    for at in unnamed:
        given[at] += f"-{text_digest(paths[at], captions[at] or '')[:8]}"
    if unnamed:
        for at, fresh in zip(unnamed, seen.add([given[at] for at in unnamed]), strict=True):
            new[at] = fresh
    for at in again:
        if not new[at]:
            reason = "another row has this id" if named[at] else "another row has this file and caption"
            refuse(refusal(given[at], reason, batch.column("path")[at].as_py()))
    batch = batch.set_column(batch.schema.get_field_index("id"), batch.schema.field("id"), pa.array(given, pa.string()))
    return batch if all(new) else batch.filter(pa.array(new))
