"""Find out what the files of a folder are: one row for each that can be read, a reason for each that cannot.

    python -m data_tools.probe INPUT --out DIR [--decode]

INPUT is a video, a folder of videos (searched with its subfolders), a glob pattern, or a CSV or Parquet table with a
`path` column. DIR receives `manifest.parquet` (true frame count, rate and whether it is constant, size as displayed,
codec, duration, audio) and `rejects.parquet` (id, stage, reason).

A file is rejected that is empty, no video, sound alone, a folder or a dangling link, or that is damaged. Without
`--decode` damage is what the packets show: fewer than the header promises, one cut short, or H.264 or HEVC units that
do not fit their packet. With it every frame is decoded. A damaged file is rejected as a whole.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora_repro.data.inputs import VIDEO_SUFFIXES, Inputs, Item, content_digest, find_inputs
from opensora_repro.data.jobs import Job, Runner, add_runner_options, run_jobs, runner_of
from opensora_repro.data.manifest import DataError, is_missing
from opensora_repro.data.outcome import MANIFEST, Row, path_from, reject, run_tool, with_types, write_outcome

METHOD = 1  # raise when the same file would give another row, so that finished files are probed again
COLUMNS = {
    **MANIFEST, "source": "string", "duration": "double", "constant_fps": "bool", "codec": "string",
    "pixel_format": "string", "coded_height": "int64", "coded_width": "int64", "rotation": "int64", "audio": "bool",
    "container": "string", "file_size": "int64", "same_as": "string",
}  # fmt: skip
PATIENCE = 60.0  # seconds that any file may take
READ_RATE, DECODE_RATE = 5e6, 20e3  # bytes a second that a slow disk and a slow core manage, for large files


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(argv)
    return run_tool(lambda: probe_all(args.input, Path(args.out), args.decode, args.images, runner_of(args)))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="data_tools.probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("input", help="a video, folder, glob pattern or table (put -- before a leading dash)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for manifest.parquet and rejects.parquet")
    parser.add_argument("--decode", action="store_true", help="also decode every frame")
    parser.add_argument("--images", action="store_true", help="take the pictures of a folder, too")
    add_runner_options(parser)
    return parser.parse_args(argv)


def probe_all(given: str, out: Path, decode: bool, images: bool, runner: Runner) -> int:
    """Probe every input, write the tables; returns the exit status. Raises DataError when nothing can be read."""
    inputs = find_inputs(given, out=out, suffixes=suffixes(images))
    usable = [item for item in inputs.items if not item.reason]
    jobs = [job_of(item, decode) for item in usable]
    found = run_jobs(probe_file, jobs, out / "files", runner=runner, label="probing", unit="file")
    results = {id(item): found[job.key] for item, job in zip(usable, jobs, strict=True)}
    rows, rejects = collect(inputs, results, out)
    write_outcome(out, rows, rejects, with_types(rows, COLUMNS))
    print(f"{len(inputs.items)} files, {len(rows)} readable, {len(rejects)} rejected, {inputs.others} others: {out}")
    if not rows:
        raise DataError(f"{given}: no file can be read; the reasons are in {out / 'rejects.parquet'}")
    return 0


def suffixes(images: bool) -> frozenset[str]:
    from opensora_repro.data.video import IMAGE_SUFFIXES

    return VIDEO_SUFFIXES | IMAGE_SUFFIXES if images else VIDEO_SUFFIXES


def job_of(item: Item, decode: bool) -> Job:
    """Return the job for a file, known by its place, size and time of change: hashing it is part of the work."""
    size, what = 0, "absent"
    try:
        status = os.stat(item.path)
        size, what = status.st_size, f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
    except OSError:
        pass  # a dangling link
    told = f"{METHOD} {decode} {os.path.abspath(item.path)} {what}"
    key = hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
    seconds = PATIENCE + size / (DECODE_RATE if decode else READ_RATE)
    return Job(key, item.name, {"path": os.fspath(item.path.absolute()), "decode": decode}, seconds)


def probe_file(args: dict[str, Any]) -> Row:
    """Return a file's facts and its content's digest, or {"error": reason}."""
    from opensora_repro.data.facts import read_facts
    from opensora_repro.data.video import DecodeError

    path = Path(args["path"])
    digest = content_digest(path)
    try:
        facts = asdict(read_facts(path, decode=args["decode"]))
    except DecodeError as error:
        return {"id": digest, "error": str(error).removeprefix(f"{path}: ")}
    return {"id": digest, "caption": "", "file_size": path.stat().st_size, **facts}


def collect(inputs: Inputs, results: dict[int, Row], out: Path) -> tuple[list[Row], list[Row]]:
    """Return the manifest's rows and the rejects, in the inputs' order.

    A table's rows keep their columns. Of files with the same content each has its row, and `same_as` names the first;
    the first one's id is the content's digest, the others' add one of their name, since ids are unique.
    """
    rows: dict[str, Row] = {}
    rejects: list[Row] = []
    first: dict[str, str] = {}
    for item in inputs.items:
        result = results.get(id(item), {"error": item.reason})
        named = hashlib.blake2b(item.name.encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
        path = "" if item.reason else path_from(out, item.path)
        given = {k: v for k, v in (item.row or {}).items() if k in ("id", "caption", "source") and not is_missing(v)}
        if "error" in result:
            identity = str(given.get("id", result.get("id", named)))
            rejects.append(reject(identity, item.name, "probe", result["error"], path=path))
            continue
        same = first.setdefault(result["id"], item.name)
        row = {**(item.row or {}), **result, "source": item.name, **given, "path": path}
        if same != item.name:
            row |= {"id": given.get("id", f"{result['id']}-{named[:8]}"), "same_as": same}
        row["id"] = str(row["id"])
        if rows.setdefault(row["id"], row) is not row:
            rejects.append(reject(row["id"], item.name, "probe", "another row has this id", path=path))
    return list(rows.values()), rejects


if __name__ == "__main__":
    sys.exit(main())
