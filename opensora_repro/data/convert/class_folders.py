"""UCF101 and ImageNet: the class is the folder's name, DIR/CLASS/FILE or DIR/train/CLASS/FILE.

The class gives the caption and, for class-conditional training, a number. Without a list of classes the numbers follow
the names in order, which is UCF101's and ImageNet's own order where all classes are there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from opensora_repro.data.convert.source import InputRows, Refuse, refusal, source_of_rows
from opensora_repro.data.inputs import files_below
from opensora_repro.data.tables import Row
from opensora_repro.errors import DataError
from opensora_repro.files import one_line

SPLITS = ("train", "val", "test", "videos", "images", "UCF-101")  # folders that hold class folders
WORDNET_ID = re.compile(r"n\d{8}")
COLUMNS = {"label": "int64", "class": "string"}


@dataclass(frozen=True)
class Class:
    """What is known of a class."""

    label: int  # from 0
    caption: str


def open_class_folders(
    root: Path, out: Path, suffixes: Collection[str], classes: Path | None, listed: Path | None
) -> InputRows:
    """Open class folders; `classes` names and orders the classes, `listed` restricts the files. Raises DataError."""
    folders = class_folders(root, out)
    if not folders:
        raise DataError(f"{root}: no class folders in it; expected DIR/CLASS/FILE or DIR/train/CLASS/FILE")
    names = sorted({path.name for _, path in folders})
    known = read_classes(classes) if classes else {name: Class(at, words(name)) for at, name in enumerate(names)}
    if not all(kind.caption for kind in known.values()):
        print("note: the folders' names give no captions; --classes FILE would", file=sys.stderr)
    listed_names = read_list(listed) if listed else None
    columns = {**COLUMNS, "split": "string"} if any(split for split, _ in folders) else COLUMNS

    def rows(refuse: Refuse) -> Iterator[Row]:
        left = dict.fromkeys(sorted(listed_names or ()))
        for name in _loose(root, out, suffixes) if listed_names is None else ():
            refuse(refusal("", "lies in no class folder", name))
        for split, folder in folders:
            for item in files_below(folder, out, suffixes).items:
                name = f"{folder.name}/{item.name}"
                keys = {name, name.rpartition(".")[0]}  # ImageNet's own list has no extensions
                if listed_names is not None and not keys & listed_names:
                    continue
                for key in keys:
                    left.pop(key, None)
                path, kind = (folder.relative_to(root) / item.name).as_posix(), known.get(folder.name)
                if item.reason or kind is None:
                    reason = item.reason or f"unknown class {folder.name}: not in {classes}"
                    refuse(refusal("", reason, path))
                    continue
                yield {"path": path, "caption": kind.caption, "label": kind.label, "class": folder.name, "split": split}
        for name in left:
            refuse(refusal("", f"listed in {listed}, but there is no such file", name))

    return source_of_rows(root.absolute(), columns, rows)


def class_folders(root: Path, out: Path) -> list[tuple[str | None, Path]]:
    """Return the class folders in order, each with the name of the split it belongs to, if there are splits."""
    found: list[tuple[str | None, Path]] = []
    for folder in _subfolders(root, out):
        if folder.name in SPLITS:
            found += [(folder.name, below) for below in _subfolders(folder, out)]
        else:
            found.append((None, folder))
    return found


def _subfolders(root: Path, out: Path) -> list[Path]:
    left_out = out.resolve()
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.resolve() != left_out)


def _loose(root: Path, out: Path, suffixes: Collection[str]) -> Iterator[str]:
    """Yield the names of files that lie above the class folders."""
    for folder in (root, *(f for f in _subfolders(root, out) if f.name in SPLITS)):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in suffixes and path.is_file():
                yield path.relative_to(root).as_posix()


def read_classes(path: Path) -> dict[str, Class]:
    """Read classInd.txt (`1 ApplyEyeMakeup`), synset words (`n01440764 tench, Tinca tinca`) or bare names."""
    found: dict[str, Class] = {}
    for number, line in _lines(path):
        first, _, rest = line.partition(" ")
        rest = rest.strip()
        if first.isdigit() and rest:
            name, kind = rest, Class(int(first) - 1, words(rest))
        else:
            name, kind = first, Class(len(found), rest or words(first))
        if kind.label < 0 or found.setdefault(name, kind) is not kind:
            reason = "numbers start at 1" if kind.label < 0 else f"class {name} is there twice"
            raise DataError(f"{path}: line {number}: {one_line(reason)}")
    return found


def read_list(path: Path) -> set[str]:
    """Read a list of files, CLASS/FILE with or without an extension and a number after it."""
    return {re.sub(r"\s+\d+$", "", line) for _, line in _lines(path)}


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8: {error.reason}") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"{path}: is empty")
    return found


def words(name: str) -> str:
    """Return "apply eye makeup" for ApplyEyeMakeup; nothing for a WordNet id, which says nothing."""
    if WORDNET_ID.fullmatch(name):
        return ""
    return " ".join(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_\-]+", " ", name).lower().split())
