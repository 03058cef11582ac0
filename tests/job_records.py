"""What a tool has recorded in a folder, read while the tool may be at work there, or have been killed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.records import RECORDS_FILE


def recorded(out: Path, kind: str) -> dict[str, Any]:
    """Return the records of a kind by their keys: of a copy, since who writes them has them alone."""
    with tempfile.TemporaryDirectory() as folder:
        for path in out.glob(f"{RECORDS_FILE}*"):
            with suppress(FileNotFoundError):  # a journal, whose rows are in the database by now
                shutil.copy(path, folder)
        if not (copy := Path(folder, RECORDS_FILE)).is_file():
            return {}
        with closing(sqlite3.connect(copy)) as rows:
            if not rows.execute("SELECT 1 FROM sqlite_master").fetchall():
                return {}
            found = rows.execute("SELECT key, text FROM records WHERE kind = ?", (kind,)).fetchall()
    return {key: json.loads(text) for key, text in found}
