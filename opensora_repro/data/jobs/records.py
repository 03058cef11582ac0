"""Records of finished work: rows of OUT/records.sqlite, which outlast a tool that is killed the moment after.

Beside them what a run passes on in the order of its rows, however many there are: a `Spool`.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from opensora_repro.errors import DataError
from opensora_repro.storage.addresses import address_of
from opensora_repro.storage.scratch import check_in, check_out, unfinished_name

RECORDS_FILE = "records.sqlite"
JOURNAL = "WAL"
SAVED_EVERY = 300.0  # seconds, of records that lie in a store
TAKEN_OVER = "taken over"  # the kind that tells which other kinds were
PIECE = 1 << 17  # bytes of a spool that are read at a time
OURS = 0x4F535252  # SQLite's application id: what tells our files from others' databases


class Records:
    """The JSON texts that a tool keeps in a folder, by their kind and key. The process that opens them has them alone.

    Where an earlier release left OUT/KIND/KEY.json, all of a kind are taken over when it is asked for first, and not
    looked at again. Threads may share it. Raises DataError for what is in use, damaged or another's file.
    """

    def __init__(self, out: Path) -> None:
        self.path, self.lock, self.taken = out / RECORDS_FILE, threading.Lock(), dict[str, int]()
        out.mkdir(parents=True, exist_ok=True)
        self.due = time.monotonic() + SAVED_EVERY
        check_out(self.path)
        with ExitStack() as failed, self._locked():
            self.rows = sqlite3.connect(self.path, timeout=1.0, check_same_thread=False)
            failed.callback(self.rows.close)
            self._open()
            failed.pop_all()

    def _open(self) -> None:
        # Of one process alone, the log (WAL) needs no memory that processes share, which a network's file system has
        # not. Where there can be no log all the same, SQLite stays with its plain journal: the same, but slower.
        self.rows.execute("PRAGMA locking_mode = EXCLUSIVE")
        ((mark,),) = self.rows.execute("PRAGMA application_id")
        if mark != OURS and self.rows.execute("SELECT 1 FROM sqlite_master").fetchall():
            raise DataError(f"{self.path}: is a database of something else; choose another --out")
        self.rows.execute(f"PRAGMA journal_mode = {JOURNAL}")
        self.rows.execute("PRAGMA synchronous = NORMAL")  # a row waits for no disk; a power cut costs the last ones
        if mark != OURS:
            self.rows.executescript(
                "BEGIN; CREATE TABLE records (kind TEXT, key TEXT, text TEXT, PRIMARY KEY (kind, key));"
                f"PRAGMA application_id = {OURS}; COMMIT"
            )

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        with self._locked():
            self.rows.close()
        check_in(self.path)

    def get(self, kind: str, keys: Collection[str]) -> dict[str, Any]:
        """Return what is recorded under `keys`."""
        self.num_taken_over(kind)
        return self._get(kind, keys)

    def put(self, kind: str, texts: Mapping[str, str]) -> None:
        """Record JSON texts by their keys, all or none."""
        self.num_taken_over(kind)
        self._put((kind, key, text) for key, text in texts.items())

    def texts(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yield the keys of all records of a kind, and their JSON texts."""
        self.num_taken_over(kind)
        with self._locked():
            yield from self.rows.execute("SELECT key, text FROM records WHERE kind = ?", (kind,))

    def places(self, kind: str, keys: Collection[str]) -> dict[str, int]:
        """Return the numbers of the rows, from 1 on, that hold what is recorded under `keys`, for `texts_at`.

        They are good until a row is dropped; what is recorded anew keeps its row.
        """
        self.num_taken_over(kind)
        chosen = "SELECT key, rowid FROM records WHERE kind = ? AND key IN (SELECT value FROM json_each(?))"
        with self._locked():
            return dict(self.rows.execute(chosen, (kind, json.dumps(list(keys)))))

    def texts_at(self, places: Sequence[int]) -> list[str]:
        """Return the JSON texts of rows, in the order asked for."""
        chosen = "SELECT rowid, text FROM records WHERE rowid IN (SELECT value FROM json_each(?))"
        with self._locked():
            found = dict(self.rows.execute(chosen, (json.dumps(list(places)),)).fetchall())
        return [found[place] for place in places]

    def drop(self, kind: str, prefix: str, *, but: str = "") -> None:
        """Forget the records whose keys begin with `prefix`, of letters and digits, but for one."""
        with self._locked(), self.rows:
            chosen = "DELETE FROM records WHERE kind = ? AND key GLOB ? AND key != ?"
            self.rows.execute(chosen, (kind, f"{prefix}*", but))

    def num_taken_over(self, kind: str) -> int:
        """Take over what an earlier release recorded of a kind, unless that is done; return how many records it was."""
        if kind not in self.taken:
            done = self._get(TAKEN_OVER, [kind])
            if kind not in done:
                rows = [(kind, *item) for item in dict(_texts_below(self.path.parent / kind)).items()]
                self._put([*rows, (TAKEN_OVER, kind, str(len(rows)))])
                done = {kind: len(rows)}
            self.taken[kind] = done[kind]
        return self.taken[kind]

    def _get(self, kind: str, keys: Collection[str]) -> dict[str, Any]:
        chosen = "SELECT key, text FROM records WHERE kind = ? AND key IN (SELECT value FROM json_each(?))"
        with self._locked():
            found = self.rows.execute(chosen, (kind, json.dumps(list(keys)))).fetchall()
        return {key: json.loads(text) for key, text in found}

    def _put(self, rows: Iterable[tuple[str, ...]]) -> None:
        with self._locked():
            with self.rows:
                self.rows.executemany(
                    "INSERT INTO records VALUES (?, ?, ?) ON CONFLICT (kind, key) DO UPDATE SET text = excluded.text",
                    rows,
                )
            if address_of(self.path) and time.monotonic() >= self.due:
                self._save()

    def _save(self) -> None:
        """Write what is recorded to the store meanwhile, for another node where this one is lost; if it can be."""
        copy = unfinished_name(self.path)
        self.rows.execute("VACUUM INTO ?", (str(copy),))
        with suppress(OSError):  # at the end it has to be
            check_in(self.path, copy)
        copy.unlink(missing_ok=True)
        self.due = time.monotonic() + SAVED_EVERY

    @contextmanager
    def _locked(self) -> Iterator[None]:
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


class Spool:
    """JSON texts in the order in which they are added, in a file that is gone with this process.

    They are read as often as they are asked for, some thousand at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - is gone with this process
        self.count = 0

    def add(self, texts: Sequence[str]) -> None:
        self.file.write("".join(f"{text}\n" for text in texts).encode())
        self.file.flush()
        self.count += len(texts)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        at, rest = 0, b""
        while piece := os.pread(self.file.fileno(), PIECE, at):
            at += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from map(json.loads, lines)


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
