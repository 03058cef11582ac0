"""Digests of large files, remembered: the text encoder's 10 GB are read once, not at every start."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from opensora_repro.files import sha256_of, write_text
from opensora_repro.frozen.pretrained import FrozenModel, HashFile


class HashMemo:
    """sha256 by path, size and time of change, kept in a JSON file: a file that was changed is read again.

    The memo only saves time: where it is absent, damaged or cannot be written, files are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, list[str | int]] = {}  # path: size in bytes, time of change in ns, sha256
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            self._known = content if isinstance(content, dict) else {}

    def __call__(self, file: Path) -> str:
        """The file's sha256 in hex."""
        file = file.resolve()  # the hub's cache holds links, whose targets are what changes
        facts = _facts(file)
        known = self._known.get(str(file))
        if isinstance(known, list) and len(known) == 3 and known[:2] == facts:
            return str(known[2])
        digest = sha256_of(file)
        if _facts(file) == facts:  # not changed while it was read
            self._known[str(file)] = [*facts, digest]
            self._save()
        return digest

    def _save(self) -> None:
        with contextlib.suppress(OSError):
            write_text(self.path, json.dumps(self._known, indent=1) + "\n")


def _facts(file: Path) -> list[str | int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns]


def file_facts(model: FrozenModel[Any], recorded: dict[str, Any], hash_file: HashFile) -> dict[str, Any]:
    """Path, size in bytes, time of change in ns and sha256 of each file, by its name."""
    facts = {}
    for file in model.files:
        path = file.resolve()
        stat = path.stat()
        known = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        before = recorded.get(file.name, {})
        same = all(before.get(name) == value for name, value in known.items())
        facts[file.name] = {**known, "sha256": before["sha256"] if same else _named_sha256(path, hash_file)}
    return facts


def _named_sha256(path: Path, hash_file: HashFile) -> str:
    """The hub's cache names large files by their sha256: tens of gigabytes need not be read for it."""
    named = path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name)
    return path.name if named else hash_file(path)
