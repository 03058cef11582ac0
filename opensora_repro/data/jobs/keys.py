"""What names a record of finished work: the content or the file it was made from, and how."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

SAMPLE = 1 << 16  # bytes


def digest(parts: Sequence[Any]) -> str:
    """Return 32 hex digits of JSON-able parts."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_key(path: Path, *how: object) -> str:
    """Return 24 hex digits of a file's place, size and time of change, and of how it is treated: it is not read.

    What is not there has a key, too: opening it tells why.
    """
    what = "absent"
    with suppress(OSError, ValueError):
        status = os.stat(path)
        what = f"{status.st_size} {status.st_mtime_ns}"
    told = " ".join((*map(str, how), os.path.abspath(path), what))
    return hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def sampled_digest(path: Path) -> str:
    """Return a digest of a file's size and of its first, middle and last 64 KiB.

    Enough to tell clips apart, whose containers list the sizes of all frames at an end, without reading them whole.
    Of the name for what cannot be read: why not, is told when it is opened.
    """
    content = hashlib.blake2b(digest_size=16)
    try:
        size = path.stat().st_size
        content.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for at in sorted({0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)}):
                file.seek(at)
                content.update(file.read(SAMPLE))
    except OSError as error:
        content.update(f"{type(error).__name__} {path.name}".encode("utf-8", "surrogateescape"))
    return content.hexdigest()
