"""WebDataset archives of a manifest's clips, the same bytes for the same rows and files.

A sample is KEY.mp4 (or what the clip's file is), KEY.txt with the caption if there is one, KEY.cls with the label if
there is one, and KEY.json with the whole row. KEY is the id, made safe where it holds more than letters, digits, _, -.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opensora_repro.data.convert.source import Refuse, refusal
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.tables import Row, is_missing, open_table
from opensora_repro.files import digest, remove_leftovers, safe_name, size_and_time, writing

METHOD = 1  # raise when the same rows would give other bytes


def write_shards(rows: Path, out: Path, records: Records, size: int, runner: Runner, refuse: Refuse) -> int:
    """Write the clips of the table `rows` to OUT/shards/000000.tar and on, `size` rows each; returns how many came.

    Paths are relative to the table. A shard that is there, of the same rows and files, is not written again.
    """
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    remove_leftovers(shards)
    jobs = [_job(number, slice_, rows, shards, size) for number, slice_ in enumerate(_slices(rows, size))]

    def holds(job: Job, result: Any) -> bool:
        """A shard that is gone, or another table's by now, is written again."""
        return bool(result.get("stamp") == size_and_time(Path(job.args["tar"])))

    done = run_jobs(write_shard, jobs, Keeping(records, "shards", holds), runner=runner, label="writing", unit="shard")
    names = {Path(job.args["tar"]).name for job in jobs}
    for old in shards.glob("*.tar"):
        if re.fullmatch(r"\d{6,}\.tar", old.name) and old.name not in names:
            old.unlink()  # of a longer table before
    for job, result in zip(jobs, done, strict=True):
        for entry in result.get("rejects", [refusal("", result.get("error", ""), Path(job.args["tar"]).name)]):
            refuse(entry)
    return sum(result.get("samples", 0) for result in done)


def _slices(path: Path, size: int) -> Iterator[list[Row]]:
    waiting: list[Row] = []
    for batch in open_table(path).batches():
        for start in range(0, batch.num_rows, size):
            waiting += batch.slice(start, size).to_pylist()
            if len(waiting) >= size:
                yield waiting[:size]
                del waiting[:size]
    if waiting:
        yield waiting


def _job(number: int, part: list[Row], table: Path, shards: Path, size: int) -> Job:
    """Return the job of one shard, known by its rows and its files."""
    tar = shards / f"{number:06d}.tar"
    args = {
        "table": os.fspath(table.absolute()),
        "start": number * size,
        "count": len(part),
        "tar": os.fspath(tar.absolute()),
    }
    files = tuple(table.parent / row["path"] for row in part)
    return Job(digest([METHOD, number, json.dumps(part, default=str)]), tar.name, args, files=files)


def write_shard(args: dict[str, Any]) -> dict[str, Any]:
    """Write one archive: the part that runs in a worker. Returns how many samples it has, and the rejects."""
    table, tar = Path(args["table"]), Path(args["tar"])
    samples, rejects = 0, list[Row]()
    with writing(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for row in _rows(table, args["start"], args["count"]):
            reason = _add(archive, table.parent / row["path"], row)
            if reason:
                rejects.append(refusal(row["id"], reason, row["path"]))
            samples += not reason
    return {"samples": samples, "rejects": rejects, "stamp": size_and_time(tar)}


def _rows(table: Path, start: int, count: int) -> list[Row]:
    """Read some rows of a Parquet file, decoding only the row groups that hold them."""
    import pyarrow.parquet as pq

    rows: list[Row] = []
    with pq.ParquetFile(table) as file:
        first = 0
        for number in range(file.num_row_groups):
            length = file.metadata.row_group(number).num_rows
            if first < start + count and start < first + length:
                group = file.read_row_group(number)
                offset = max(0, start - first)
                rows += group.slice(offset, start + count - first - offset).to_pylist()
            first += length
    return rows


def _add(archive: tarfile.TarFile, path: Path, row: Row) -> str:
    """Add a sample, or return why there is none."""
    suffix = path.suffix.lower().removeprefix(".")
    if not re.fullmatch(r"[a-z0-9]{1,8}", suffix):
        return f"a file without an extension to tell its kind: {path.name}"
    try:
        if not path.is_file():
            return "no such file"
        with open(path, "rb") as file:
            add = _adder(archive, safe_name(row["id"]))
            add(suffix, file, os.fstat(file.fileno()).st_size)
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        return error.strerror or str(error)
    texts = {"txt": row["caption"], "cls": row.get("label"), "json": _json(row)}
    for extension, value in texts.items():
        if not is_missing(value):
            data = str(value).encode("utf-8", "replace")
            add(extension, io.BytesIO(data), len(data))
    return ""


def _adder(archive: tarfile.TarFile, key: str) -> Callable[[str, Any, int], None]:
    def add(extension: str, data: Any, size: int) -> None:
        member = tarfile.TarInfo(f"{key}.{extension}")  # with owner 0, time 0 and mode 644
        member.size = size
        archive.addfile(member, data)

    return add


def _json(row: Row) -> str:
    known = {name: value for name, value in row.items() if name != "path" and value is not None}
    return json.dumps(known, ensure_ascii=False, default=str)
