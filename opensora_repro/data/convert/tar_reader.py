"""WebDataset archives: members with the same key make a sample, and its video or picture becomes a file.

A member's name decides nothing but the key: files are written under names made from it, regular members only. The
members of a sample may lie anywhere in the archive. A key stands for one video; what is rejected is not left on disk.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tarfile import EmptyHeaderError, TruncatedHeaderError  # type: ignore[attr-defined]
from typing import IO, Any

from opensora_repro.data.caption_values import texts_in
from opensora_repro.data.convert.source import InputRows, Refuse, refusal, source_of_rows
from opensora_repro.data.ids import Seen
from opensora_repro.data.inputs import VIDEO_SUFFIXES, Item, files_below, find_inputs
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.earlier import file_key
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.jobs.workers import DISK_TROUBLE
from opensora_repro.data.manifest import LINEAGE, MANIFEST
from opensora_repro.data.tables import Row, in_batches, with_types
from opensora_repro.errors import DataError
from opensora_repro.files import digest, one_line, replacing, safe_name, size_and_time

METHOD = 3  # raise when an archive would give other rows, so that finished ones are read again
TAR_SUFFIXES = (".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
TEXT_BYTES = 1 << 20  # of a caption or its JSON
ALL_TEXTS, ALL_KEYS = 1 << 29, 1 << 20  # bytes and samples of an archive that are in memory until its end
CAPTIONS = ("txt", "text", "caption")
COLUMNS = {**MANIFEST, **LINEAGE, "label": "int64"}


@dataclass(frozen=True)
class Limits:
    """Bytes, unpacked: a small archive of strangers may hold more than the disk does."""

    member: int = 4 << 30
    archive: int = 200 << 30


def find_tars(given: str, out: Path) -> list[Item]:
    """Return the archives that INPUT stands for. Raises DataError."""
    last = {Path(f"x{suffix}").suffix for suffix in TAR_SUFFIXES}
    inputs = files_below(Path(given), out, last) if Path(given).is_dir() else find_inputs(given, out=out)
    items = [item for item in inputs.items if item.name.lower().endswith(TAR_SUFFIXES) and not item.reason]
    if not items:
        raise DataError(f"{one_line(given)}: no tar archive (looked for {' '.join(TAR_SUFFIXES)})")
    return items


def open_webdataset(items: list[Item], out: Path, records: Records, limits: Limits, runner: Runner) -> InputRows:
    """Extract what has not been extracted yet to OUT/media, and return the rows. Raises DataError.

    The id is the sample's own, or its key; where archives have the same keys, all of these follow the archive's name.
    """
    jobs, archives = [_job(item, out, limits) for item in items], _archives(items)

    def holds(job: Job, result: Any) -> bool:
        return "error" in result or _is_there(Path(job.args["rows"]), result.get("key", job.earlier), out, archives)

    done = run_jobs(read_tar, jobs, Keeping(records, "tars", holds), runner=runner, label="extracting", unit="tar")
    failed, lists = list[Row](), dict[Path, str]()
    for job, result in zip(jobs, done, strict=True):
        if "error" in result:
            failed.append(refusal("", result["error"], job.name))
        else:
            lists[Path(job.args["rows"])] = _shard(job.name)
    names = {name for path in lists for entry in _entries(path) for name in entry.get("row", ())}
    found = (entry["row"] for path in lists for entry in _entries(path) if "row" in entry)
    columns = {k: v for k, v in with_types(found, COLUMNS).items() if k not in MANIFEST and k in names}
    seen, keys = Seen(), (entry["row"]["id"] for path in lists for entry in _entries(path) if entry.get("by_key"))
    shared = not all(seen.add(batch).all() for batch in in_batches(keys))  # type: ignore[arg-type]

    def rows(refuse: Refuse) -> Iterator[Row]:
        for row in failed:
            refuse(row)
        for path, shard in lists.items():
            for entry in _entries(path):
                if "row" in entry:
                    prefix = f"{shard}/" if shared and entry["by_key"] else ""
                    yield {**entry["row"], "id": f"{prefix}{entry['row']['id']}"}
                elif "reject" in entry:
                    refuse(entry["reject"])

    return source_of_rows(out.absolute(), columns, rows)


def delete_rejected(items: list[Item], out: Path, limits: Limits, rejects: list[Row]) -> None:
    """Delete the files of rows that were rejected later, and note it where the archive's rows are.

    A row may be rejected because of another archive's, so the note holds as long as the archives are these.
    """
    reasons = {row["path"]: row for row in rejects}
    archives = _archives(items)
    for path in [Path(_job(item, out, limits).args["rows"]) for item in items]:
        if not path.is_file() or not any(entry.get("row", {}).get("path") in reasons for entry in _entries(path)):
            continue
        with replacing(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            for entry in _entries(path):
                if reason := reasons.get(entry.get("row", {}).get("path")):
                    (out / entry["row"]["path"]).unlink(missing_ok=True)
                    entry = {"reject": reason, "archives": archives}
                file.write(json.dumps(entry) + "\n")


def _archives(items: list[Item]) -> str:
    """Return what changes with any of the archives: these are not read for it."""
    return digest(sorted([item.name, size_and_time(item.path)] for item in items))


def _shard(name: str) -> str:
    """Return an archive's name without its suffix."""
    return name[: -len(next(suffix for suffix in TAR_SUFFIXES if name.lower().endswith(suffix)))]


def _job(item: Item, out: Path, limits: Limits) -> Job:
    name, how = safe_name(item.name.removesuffix(".tar")), (METHOD, limits.member, limits.archive)
    key = digest([*how, item.name])
    args = {
        "key": key,
        "tar": os.fspath(item.path.absolute()),
        "name": item.name,
        "folder": f"media/{name}",
        "out": os.fspath(out.absolute()),
        "rows": os.fspath(out.absolute() / "tars" / f"{name}.jsonl"),
        "limits": [limits.member, limits.archive],
    }
    return Job(key, item.name, args, files=(item.path,), earlier=file_key(item.path, *how))


def _is_there(path: Path, key: str, out: Path, archives: str) -> bool:
    """Whether an archive's rows and files are there, and not another's by now: else it is extracted again."""
    entries = _entries(path) if path.is_file() else iter(())
    return next(entries, {}).get("key") == key and all(
        entry.get("archives", archives) == archives and ("row" not in entry or (out / entry["row"]["path"]).is_file())
        for entry in entries
    )


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield {"key": of the job that wrote them}, then {"row": ..., "by_key": its id is its key} and {"reject": ...}."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_tar(args: dict[str, Any]) -> dict[str, Any]:
    """Extract one archive anew: the part that runs in a worker. Writes a line a row or reject; returns how many."""
    out, target, key = Path(args["out"]), Path(args["rows"]), digest([args["key"], *args["contents"]])
    folder = out / args["folder"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    count = 0
    with replacing(target) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        file.write(json.dumps({"key": key}) + "\n")
        for entry in _samples(args["tar"], args["name"], folder, args["folder"], Limits(*args["limits"])):
            file.write(json.dumps(entry) + "\n")
            count += 1
    return {"entries": count, "key": key}


@dataclass
class _Sample:
    """The members of one key, by extension (what follows the key's dot), as they come."""

    key: str
    media: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    fault: str = ""  # why there is no row of it
    again: bool = False  # another sample of this key follows, which is left out

    def repeated(self, extension: str, apart: bool) -> bool:
        """Note a member that was there before: of another sample if this one is whole; else nobody knows whose."""
        if extension not in self.media and extension not in self.texts:
            return False
        if apart and self.media and self.texts:
            self.again = True
        else:
            self.fault = self.fault or f"{self.key}.{extension} is there twice"
        return True


class _TooMuch(Exception):
    """An archive beyond the limits."""


class _Member(tarfile.TarInfo):
    """Tells an archive's end from where its file ends: `tarfile` takes a header that is cut, or not there, for it."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except (TruncatedHeaderError, EmptyHeaderError) as error:
            raise EOFError("unexpected end of data") from error


def _samples(path: str, name: str, folder: Path, within: str, limits: Limits) -> Iterator[dict[str, Any]]:
    """Yield {"row": ...} or {"reject": ...}; what is wrong with the archive itself is the last entry."""
    samples: dict[str, _Sample] = {}
    size = texts = 0
    last, damage = "", None
    try:
        with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                if member.isdir():
                    continue
                key, extension = split_key(member.name)
                readable = member.name.encode("utf-8", "backslashreplace").decode()
                if not member.isreg() or member.issparse():
                    yield {"reject": refusal(key, f"{name}: {readable}: a link or device, not extracted", readable)}
                    continue
                size += member.size
                if size > limits.archive:
                    raise _TooMuch(f"holds more than {limits.archive:,} bytes, the limit of --max-total")
                if not key or not extension:
                    continue  # of no sample: a readme, a hidden file
                sample = samples.setdefault(key, _Sample(key))
                if not sample.again and not sample.repeated(extension, key != last):
                    texts += _take(tar, member, sample, extension, folder, limits)
                last = key
                if texts > ALL_TEXTS or len(samples) > ALL_KEYS:
                    raise _TooMuch(f"holds more than {ALL_KEYS:,} keys or {ALL_TEXTS:,} bytes of text")
    except OSError as error:  # a damaged gzip stream is one, too
        if error.errno in DISK_TROUBLE:
            raise
        damage = f"cannot be read to its end: {error}"
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        damage = f"cannot be read to its end: {error}"
    except _TooMuch as error:
        damage = str(error)
    for sample in samples.values():
        if damage and sample.key == last:  # what is still missing of it cannot be known
            sample.fault = sample.fault or "the archive ends within this key"
        yield from _finish(sample, name, within)
    if damage:
        yield {"reject": refusal("", f"{name}: {damage}", name)}


def split_key(name: str) -> tuple[str, str]:
    """Return a member's key and extension: the name up to the first dot of its last part, and what follows it."""
    name = name.encode("utf-8", "backslashreplace").decode().removeprefix("./")
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), extension.lower()


def _take(
    tar: tarfile.TarFile, member: tarfile.TarInfo, sample: _Sample, extension: str, folder: Path, limits: Limits
) -> int:
    """Write a video or picture, keep a text; return the bytes that are kept in memory."""
    from opensora_repro.data.video import IMAGE_SUFFIXES

    suffix = extension.rpartition(".")[2]
    data = tar.extractfile(member)
    assert data is not None  # it is a regular file
    media = f".{suffix}" in VIDEO_SUFFIXES | IMAGE_SUFFIXES
    text = suffix in (*CAPTIONS, "json", "cls")
    if member.size > (limits.member if media else TEXT_BYTES) and (media or suffix in CAPTIONS):
        limit = f"--max-bytes is {limits.member:,}" if media else f"a caption may have {TEXT_BYTES:,}"
        sample.fault = sample.fault or f"{sample.key}.{extension} has {member.size:,} bytes, {limit}"
    elif media and not sample.fault:
        name = safe_name(f"{sample.key}.{extension}" if sample.media else sample.key)
        sample.media[extension] = _write(data, folder / f"{name}.{suffix}")
    elif text and member.size <= TEXT_BYTES:
        sample.texts[extension] = data.read()
        return member.size
    else:
        sample.others.append(extension)
    return 0


def _write(data: IO[bytes], path: Path) -> Path:
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        shutil.copyfileobj(data, file, 1 << 20)
    return path


def _finish(sample: _Sample, name: str, within: str) -> Iterator[dict[str, Any]]:
    """Yield a sample's row or why there is none, and what is left out of it; files without a row are deleted."""
    kept, spare = _chosen(sample)
    row = {} if sample.fault else _row(sample)
    if sample.fault:
        yield {"reject": refusal(sample.key, f"{name}: {sample.fault}")}
    else:
        path = sample.media.pop(kept)
        yield {"row": {**row, "path": f"{within}/{path.name}"}, "by_key": row["id"] == sample.key}
        for extension in spare:
            reason = f"{name}: {sample.key}.{extension} is another video of this key, left out"
            yield {"reject": refusal(sample.key, reason)}
        if sample.again:
            yield {"reject": refusal(sample.key, f"{name}: its key is there twice")}
    for path in sample.media.values():
        path.unlink()


def _chosen(sample: _Sample) -> tuple[str, list[str]]:
    """Return which of the media is the sample's, a video rather than its picture, and the other videos beside it.

    KEY.mp4 comes before KEY.depth.mp4. Two that are equally good are a fault: names with dots of their own
    (clip.01.mp4, clip.02.mp4) have one key, too, and nobody knows whose the caption is.
    """
    videos = [extension for extension in sample.media if f".{extension.rpartition('.')[2]}" in VIDEO_SUFFIXES]
    among = videos or list(sample.media)
    plain = [extension for extension in among if "." not in extension]
    kinds = {extension.rpartition(".")[2] for extension in among}
    clear = len(among) == 1 or (len(plain) == 1 if videos else bool(plain) or len(kinds) == len(among))
    if not among:
        has = ", ".join(sorted([*(extension.rpartition(".")[2] for extension in sample.texts), *sample.others]))
        sample.fault = sample.fault or f"no video or picture of this key (has {has})"
    elif not clear:
        names = ", ".join(f"{sample.key}.{extension}" for extension in among)
        sample.fault = sample.fault or f"several have this key, which ends at a name's first dot: {names}"
    kept = plain[0] if videos and plain else among[0] if among else ""
    return kept, [extension for extension in videos if extension != kept]


def _row(sample: _Sample) -> Row:
    """Return what the texts of a sample tell; notes the fault of those that cannot be read."""
    texts: dict[str, bytes] = {}
    for extension in sorted(sample.texts, key=lambda e: "." in e):  # KEY.txt comes before KEY.other.txt
        texts.setdefault(extension.rpartition(".")[2], sample.texts[extension])
    row = _described(sample, texts.get("json", b""))
    label = texts.get("cls", b"").decode("utf-8", "replace").strip()
    if label.isdigit():
        row["label"] = int(label[:18])
    for suffix in reversed([suffix for suffix in CAPTIONS if suffix in texts]):
        try:
            text = texts[suffix].decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            sample.fault = f"its caption ({suffix}) is no UTF-8 text"
        row["caption"] = text or row["caption"]
    row["id"] = row.get("id") or sample.key
    return row


def _described(sample: _Sample, data: bytes) -> Row:
    """Return what the JSON beside a sample tells; values of the wrong type for a known column are left out."""
    found, caption = None, ""
    try:
        found = json.loads(data)
        caption = next((t for t in texts_in(found if isinstance(found, dict) else None) if t.strip()), "")
    except UnicodeDecodeError:
        sample.fault = "its JSON is no UTF-8 text"
    except (ValueError, RecursionError):
        pass  # no JSON, or no caption in it
    row: Row = {}
    for column, value in found.items() if isinstance(found, dict) else ():
        value = _plain(value)
        kind = COLUMNS.get(column)
        if kind == "double" and type(value) is int:
            value = float(value)
        if kind is None or type(value) is {"string": str, "int64": int, "double": float}[kind]:
            row[column.encode("utf-8", "backslashreplace").decode()] = value
    return row | {"caption": _plain(caption.strip())}


def _plain(value: Any) -> Any:
    """Return what a column can hold: lists and objects as JSON, very large numbers and broken text as text."""
    if isinstance(value, list | dict) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        value = json.dumps(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
