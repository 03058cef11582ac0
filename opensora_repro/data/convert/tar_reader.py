"""WebDataset archives: members with the same key make a sample, and its video or picture becomes a file.

A member's name decides nothing but the key: files are written under names made from it, regular members only.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from opensora_repro.data.convert.source import Refuse, Source, refusal, source_of_rows
from opensora_repro.data.files import beside, one_line, safe_name
from opensora_repro.data.inputs import VIDEO_SUFFIXES, Item, files_below, find_inputs
from opensora_repro.data.jobs.keys import file_key
from opensora_repro.data.jobs.run import Job, Runner, run_jobs
from opensora_repro.data.jobs.workers import DISK_TROUBLE
from opensora_repro.data.manifest import DataError
from opensora_repro.data.outcome import LINEAGE, MANIFEST, Row, with_types

METHOD = 1  # raise when an archive would give other rows, so that finished ones are read again
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
TEXT_BYTES = 1 << 20  # of a caption or its JSON
CAPTIONS = ("txt", "text", "caption")
COLUMNS = {**MANIFEST, **LINEAGE, "label": "int64"}


def find_tars(given: str, out: Path) -> list[Item]:
    """Return the archives that INPUT stands for. Raises DataError."""
    last = {Path(f"x{suffix}").suffix for suffix in TAR_SUFFIXES}
    inputs = files_below(Path(given), out, last) if Path(given).is_dir() else find_inputs(given, out=out)
    items = [item for item in inputs.items if item.name.lower().endswith(TAR_SUFFIXES) and not item.reason]
    if not items:
        raise DataError(f"{one_line(given)}: no tar archive (looked for {' '.join(TAR_SUFFIXES)})")
    return items


def open_webdataset(items: list[Item], out: Path, runner: Runner) -> Source:
    """Extract what has not been extracted yet to OUT/media, and return the rows. Raises DataError."""
    jobs = [_job(item, out) for item in items]
    _forget_lost(jobs, out / "tars")
    done = run_jobs(read_tar, jobs, out / "tars", runner=runner, label="extracting", unit="tar")
    failed = [refusal("", done[job.key]["error"], job.name) for job in jobs if "error" in done[job.key]]
    lists = [Path(job.args["rows"]) for job in jobs if "error" not in done[job.key]]
    names = {name for path in lists for entry in _entries(path) for name in entry.get("row", ())}
    found = (entry["row"] for path in lists for entry in _entries(path) if "row" in entry)
    columns = {k: v for k, v in with_types(found, COLUMNS).items() if k not in MANIFEST and k in names}

    def rows(refuse: Refuse) -> Iterator[Row]:
        for row in failed:
            refuse(row)
        for path in lists:
            for entry in _entries(path):
                if "row" in entry:
                    yield entry["row"]
                elif "reject" in entry:
                    refuse(entry["reject"])

    return source_of_rows(out.absolute(), columns, rows)


def _job(item: Item, out: Path) -> Job:
    key, name = file_key(item.path, METHOD), safe_name(item.name.removesuffix(".tar"))
    args = {
        "key": key,
        "tar": os.fspath(item.path.absolute()),
        "name": item.name,
        "folder": f"media/{name}",
        "out": os.fspath(out.absolute()),
        "rows": os.fspath(out.absolute() / "tars" / f"{name}.jsonl"),
    }
    return Job(key, item.name, args)


def _forget_lost(jobs: list[Job], folder: Path) -> None:
    """Take back the record of an archive whose rows or files are gone, or another's by now: it is extracted again."""
    for job in jobs:
        out, path = Path(job.args["out"]), Path(job.args["rows"])
        entries = _entries(path) if path.is_file() else iter(())
        mine = next(entries, {}).get("key") == job.key
        if not (mine and all((out / entry["row"]["path"]).is_file() for entry in entries if "row" in entry)):
            (folder / f"{job.key}.json").unlink(missing_ok=True)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {"key": of the job that wrote them}, then {"row": ...} and {"reject": ...}."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_tar(args: dict[str, Any]) -> dict[str, int]:
    """Extract one archive anew: the part that runs in a worker. Writes a line a row or reject; returns how many."""
    out, target = Path(args["out"]), Path(args["rows"])
    folder = out / args["folder"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unfinished, count = beside(target), 0
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(json.dumps({"key": args["key"]}) + "\n")
            for entry in _samples(args["tar"], args["name"], folder, args["folder"]):
                file.write(json.dumps(entry) + "\n")
                count += 1
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return {"entries": count}


class _Sample:
    """The members of one key, as they come."""

    def __init__(self, key: str, repeated: bool) -> None:
        self.key, self.repeated = key, repeated
        self.media: dict[str, Path] = {}  # by suffix
        self.texts: dict[str, bytes] = {}
        self.others: list[str] = []


def _samples(path: str, name: str, folder: Path, within: str) -> Iterator[dict[str, Row]]:
    """Yield {"row": ...} or {"reject": ...}; what is wrong with the archive itself is the last entry."""
    sample, keys = None, set[str]()
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                if member.isdir():
                    continue
                key, extension = split_key(member.name)
                readable = member.name.encode("utf-8", "backslashreplace").decode()
                if not member.isreg() or member.issparse():
                    yield {"reject": refusal(key, f"{name}: {readable}: a link or device, not extracted", readable)}
                    continue
                if not key or not extension:
                    continue  # of no sample: a readme, a hidden file
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield _finish(sample, name, within)
                    sample = _Sample(key, key in keys)
                    keys.add(key)
                if not sample.repeated:
                    _take(tar, member, sample, extension, folder)
    except OSError as error:  # a damaged gzip stream is one, too
        if error.errno in DISK_TROUBLE:
            raise
        damage: Exception | None = error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        damage = error
    else:
        damage = None
    if sample is not None and damage is None:
        yield _finish(sample, name, within)
    elif sample is not None:  # what is still missing of it cannot be known
        for left in sample.media.values():
            left.unlink()
        yield {"reject": refusal(sample.key, f"{name}: the archive ends within this key", name)}
    if damage is not None:
        yield {"reject": refusal("", f"{name}: cannot be read to its end: {damage}", name)}


def split_key(name: str) -> tuple[str, str]:
    """Return a member's key and extension: the name up to the first dot of its last part, and what follows it."""
    name = name.encode("utf-8", "backslashreplace").decode().removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), extension.lower()


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, sample: _Sample, extension: str, folder: Path) -> None:
    from opensora_repro.data.video import IMAGE_SUFFIXES

    last = extension.rpartition(".")[2]
    data = tar.extractfile(member)
    assert data is not None  # it is a regular file
    if f".{last}" in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        if f".{last}" not in sample.media:
            sample.media[f".{last}"] = _write(data, folder / f"{safe_name(sample.key)}.{last}")
    elif last in (*CAPTIONS, "json", "cls") and member.size <= TEXT_BYTES:
        sample.texts.setdefault(last, data.read())
    else:
        sample.others.append(extension)


def _write(data: IO[bytes], path: Path) -> Path:
    unfinished = beside(path)
    try:
        with open(unfinished, "wb") as file:
            while block := data.read(1 << 20):
                file.write(block)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _finish(sample: _Sample, name: str, within: str) -> dict[str, Row]:
    if sample.repeated:
        return {"reject": refusal(sample.key, f"{name}: its key is there twice")}
    if not sample.media:
        has = ", ".join(sorted([*sample.texts, *sample.others]))
        return {"reject": refusal(sample.key, f"{name}: no video or picture of this key (has {has})")}
    kept = min(sample.media, key=lambda suffix: suffix not in VIDEO_SUFFIXES)  # a video rather than its picture
    for suffix, path in sample.media.items():
        if suffix != kept:
            path.unlink()
    row = _described(sample.texts.get("json", b""))
    label = sample.texts.get("cls", b"").decode("utf-8", "replace").strip()
    if label.isdigit():
        row["label"] = int(label[:18])
    text = next((sample.texts[e].decode("utf-8", "replace").strip() for e in CAPTIONS if e in sample.texts), "")
    row["caption"] = text or row.get("caption") or row.get("text") or ""
    row["id"] = row.get("id") or sample.key
    return {"row": {**row, "path": f"{within}/{sample.media[kept].name}"}}


def _described(data: bytes) -> Row:
    """Return what the JSON beside a sample tells; values of the wrong type for a known column are left out."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    row: Row = {}
    for column, value in found.items() if isinstance(found, dict) else ():
        value = _plain(value)
        wanted = COLUMNS.get(column)
        if wanted == "double" and type(value) is int:
            value = float(value)
        if wanted is None or type(value) is {"string": str, "int64": int, "double": float}[wanted]:
            row[column.encode("utf-8", "backslashreplace").decode()] = value
    return row


def _plain(value: Any) -> Any:
    """Return what a column can hold: lists and objects as JSON, very large numbers and broken text as text."""
    if isinstance(value, list | dict) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        value = json.dumps(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
