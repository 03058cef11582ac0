"""Records of finished work: rows of OUT/records.sqlite, which outlast a tool that is killed the moment after."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opensora_repro.errors import DataError

RECORDS_FILE = "records.sqlite"
OURS = 0x4F535252  # SQLite's application id: what tells our files from others' databases


class Records:
    """The JSON texts that a tool keeps in a folder, by their kind and key. The process that opens them has them alone.

    Where an earlier release left OUT/KIND/KEY.json, all of a kind are taken over when it is asked for first, and not
    looked at again. Threads may share it. Raises DataError for what is in use, damaged or another's file.
    """

    def __init__(self, out: Path) -> None:
        self.path, self.lock, self.taken = out / RECORDS_FILE, threading.Lock(), dict[str, int]()
        out.mkdir(parents=True, exist_ok=True)
        with self._asking():
            self.rows = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except BaseException:
            self.rows.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        with self._asking():
            self.rows.close()

    def _open(self) -> None:
        # Of one process alone, the log (WAL) needs no memory that processes share, which a network's file system has
        # not. Where there can be no log all the same, SQLite stays with its plain journal: the same, but slower.
        self._ask("PRAGMA locking_mode = EXCLUSIVE")
        ((mark,),) = self._ask("PRAGMA application_id")
        if mark != OURS and self._ask("SELECT 1 FROM sqlite_master LIMIT 1"):
            raise DataError(f"{self.path}: is a database of something else; choose another --out")
        self._ask("PRAGMA journal_mode = WAL")
        self._ask("PRAGMA synchronous = NORMAL")  # a row waits for no disk; a power cut costs the last ones alone
        if mark != OURS:
            with self._together():
                self.rows.execute("CREATE TABLE records (kind TEXT, key TEXT, text TEXT, PRIMARY KEY (kind, key))")
                self.rows.execute(f"PRAGMA application_id = {OURS}")

    def get(self, kind: str, keys: Collection[str]) -> dict[str, Any]:
        """Return what is recorded under `keys`."""
        self.num_taken_over(kind)
        found = self._ask(
            "SELECT key, text FROM records WHERE kind = ? AND key IN (SELECT value FROM json_each(?))",
            (kind, json.dumps(list(keys))),
        )
        return {key: json.loads(text) for key, text in found}

    def put(self, kind: str, texts: Mapping[str, str]) -> None:
        """Record JSON texts by their keys, all or none."""
        self.num_taken_over(kind)
        with self._together():
            self.rows.executemany("REPLACE INTO records VALUES (?, ?, ?)", [(kind, *item) for item in texts.items()])

    def drop(self, kind: str, prefix: str) -> None:
        """Forget the records whose keys begin with `prefix`, of letters and digits."""
        self._ask("DELETE FROM records WHERE kind = ? AND key GLOB ?", (kind, f"{prefix}*"))

    def num_taken_over(self, kind: str) -> int:
        """Take over what an earlier release recorded of a kind, unless that is done; return how many records it was."""
        if kind not in self.taken:
            done = self._ask("SELECT text FROM records WHERE kind = 'taken over' AND key = ?", (kind,))
            self.taken[kind] = int(done[0][0]) if done else self._take_over(kind)
        return self.taken[kind]

    def _take_over(self, kind: str) -> int:
        texts = dict(_texts_below(self.path.parent / kind))
        with self._together():
            self.rows.executemany("REPLACE INTO records VALUES (?, ?, ?)", [(kind, *item) for item in texts.items()])
            self.rows.execute("REPLACE INTO records VALUES ('taken over', ?, ?)", (kind, str(len(texts))))
        return len(texts)

    def _ask(self, statement: str, values: tuple[str, ...] = ()) -> list[Any]:
        with self._asking():
            return self.rows.execute(statement, values).fetchall()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Commit all that the block does, or nothing of it."""
        with self._asking():
            self.rows.execute("BEGIN")
            try:
                yield
            except BaseException:
                self.rows.execute("ROLLBACK")
                raise
            self.rows.execute("COMMIT")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Let one thread at a time ask, and tell SQLite's errors as ours."""
        try:
            with self.lock:
                yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DataError(f"{self.path.parent}: another command is at work in this folder") from None
            code = errno.ENOSPC if "full" in str(error) else errno.EROFS if "readonly" in str(error) else errno.EIO
            raise OSError(code, f"{os.strerror(code)} ({error})", str(self.path)) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path}: is damaged, or no file of records ({error}): restore it, or delete it and all work "
                "that it records is done again"
            ) from None


def _texts_below(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield keys and texts of OUT/KIND/KEY.json and its subfolders; of a batch's those of its items."""
    for path in sorted(folder.rglob("[!.]*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        items = record.get("clips") if isinstance(record, dict) else None
        for key, item in (items if isinstance(items, dict) else {path.stem: record}).items():
            yield key, json.dumps(item)
