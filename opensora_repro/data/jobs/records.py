"""Records of finished work: `FOLDER/KEY.json`, each whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opensora_repro.files import replacing


def write_record(folder: Path, key: str, text: str) -> None:
    """Write a job's record, whole or not at all."""
    with replacing(folder / f"{key}.json") as unfinished:  # nothing waits for the disk
        unfinished.write_text(text, encoding="utf-8")


def read_record(folder: Path, key: str) -> Any:
    """Return a finished job's result, None if it has none."""
    try:
        return json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished(keys: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the results that are recorded; a folder is listed once rather than asked for every job."""
    names = set(os.listdir(folder))
    recorded = {key for key in keys if f"{key}.json" in names}
    records = {key: read_record(folder, key) for key in recorded}
    return {key: record for key, record in records.items() if record is not None}
