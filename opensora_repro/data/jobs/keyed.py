"""Items that are known by keys alone, such as a clip's content and what is asked of it: which are left, and results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from opensora_repro.data.ids import Seen
from opensora_repro.data.jobs.course import LOOKED_UP, Keeping
from opensora_repro.data.jobs.records import Spool
from opensora_repro.data.tables import in_batches

Item = TypeVar("Item")


def left_of(items: Iterable[tuple[str, Item]], keeping: Keeping, failed: str) -> Iterator[tuple[str, Item]]:
    """Yield the items that have neither a result nor, as records of the kind `failed`, a failure; of each key one."""
    seen = Seen()
    for batch in in_batches(items, LOOKED_UP):
        keys = [key for key, _ in batch]
        known = keeping.records.places(keeping.kind, keys).keys() | keeping.records.places(failed, keys).keys()
        new = seen.add(keys).tolist()
        yield from (item for item, is_new in zip(batch, new, strict=True) if is_new and item[0] not in known)


def results_of(keys: Iterable[str], keeping: Keeping, failed: str) -> Spool:
    """Return the results of all keys in their order, a failure where that is all there is; failures are forgotten."""
    records = keeping.records
    found = Spool(records.path.parent)
    for batch in in_batches(keys, LOOKED_UP):
        places = records.places(failed, batch) | records.places(keeping.kind, batch)
        found.add(records.texts_at([places[key] for key in batch]))
    records.drop(failed, "")
    return found
