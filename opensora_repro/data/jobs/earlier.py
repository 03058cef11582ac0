"""How earlier releases named records, so that what they made is found: they knew no file by all of its content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from opensora_repro.data.jobs.course import LOOKED_UP, Keeping
from opensora_repro.data.tables import in_batches
from opensora_repro.files import size_and_time

SAMPLE = 1 << 16  # bytes


def file_key(path: Path, *how: object) -> str:
    """Return 24 hex digits of a file's place, size and time of change, and of how it is treated."""
    what = " ".join(map(str, size_and_time(path))) or "absent"
    told = " ".join((*map(str, how), os.path.abspath(path), what))
    return hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def sampled_digest(path: Path) -> str:
    """Return a digest of a file's size and of its first, middle and last 64 KiB, "" for one that cannot be read."""
    content = hashlib.blake2b(digest_size=16)
    try:
        size = path.stat().st_size
        content.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for at in sorted({0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)}):
                file.seek(at)
                content.update(file.read(SAMPLE))
    except OSError:
        return ""
    return content.hexdigest()


def adopt(keeping: Keeping, keys: Iterable[str], earlier: Callable[[], Iterable[str]]) -> None:
    """Let what an earlier release recorded under its keys be found under today's, where nothing is yet."""
    records, kind = keeping.records, keeping.kind
    if not records.num_taken_over(kind) or all(
        len(records.places(kind, batch)) == len(set(batch)) for batch in in_batches(keys, LOOKED_UP)
    ):
        return
    for batch in in_batches(zip(keys, earlier(), strict=True), LOOKED_UP):
        new = set(dict(batch)) - records.places(kind, list(dict(batch))).keys()
        named = {key: name for key, name in batch if key in new}
        found = records.get(kind, list(named.values()))
        records.put(kind, {key: json.dumps(found[name]) for key, name in named.items() if name in found})
