"""Download the files that a table's rows name.

    python -m data_tools.download TABLE --out DIR [--max-bytes 2G] [--max-total 500G] [--yt-dlp]

TABLE (CSV or Parquet) has a column url, and may have id, caption, sha256 or md5, and start_time and end_time (seconds).
Files come to DIR/files, named after the id, or after `source` where the row describes a part of a video; a URL that
several rows name is fetched once. Only http and https are followed, and with --allow-private to this machine and to
private networks. What is no video or picture by its first bytes is refused, whatever the server calls it. A file that
was interrupted goes on where it was, if the server can do that and still has the same one. A download that fails for
good (404, too large, a wrong checksum) is remembered; one that may succeed another time is tried --retries times, and
again by the next run.

DIR/manifest.parquet has a row for each row of TABLE that got its file, with all its columns. Rows that describe a part
of a video (start_time and end_time) are in DIR/captions.parquet instead, and the manifest has one row for their file:
cut it with data_tools.split, then join the captions with data_tools.caption --sidecar DIR/captions.parquet. Rows
without a file are in DIR/rejects.parquet with the reason. --yt-dlp fetches from video sites with a yt-dlp of your own.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from opensora_repro.data.download.downloads import Download, Place, fetch_all
from opensora_repro.data.download.fetch import Budget, Limits
from opensora_repro.data.download.video_pages import find_yt_dlp
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.manifest import reject, rejects_writer
from opensora_repro.data.options import argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.tables import Row, in_batches, is_missing, rows_batch
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import digest, one_line, remove_leftovers, safe_name
from opensora_repro.storage.addresses import redacted

if TYPE_CHECKING:
    from opensora_repro.data.tables import Table

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DIGESTS = {"sha256": 64, "md5": 32}  # hex digits
MADE = {
    "id": "string",
    "path": "string",
    "caption": "string",
    "source": "string",
    "sha256": "string",
    "file_size": "int64",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    table: str = argument("CSV or Parquet with a column url", type=local_path)
    out: str = option("folder for files/ and manifest.parquet", type=local_path, metavar="DIR")
    max_bytes: str = option("largest file, such as 500M (%(default)s)", "4G", metavar="N")
    max_total: str | None = option("all files together, such as 2T (default: no limit)", None, metavar="N")
    workers: int = option("downloads at a time (%(default)s)", 8, metavar="N")
    per_host: int = option("of them from one host (%(default)s)", 2, metavar="N")
    retries: int = option("tries after the first (%(default)s)", 4, metavar="N")
    timeout: float = option("seconds without a byte (%(default)s)", 30.0, metavar="S")
    max_time: float = option("seconds for a file (%(default)g)", 7200.0, metavar="S")
    allow_private: bool = option("fetch from this machine and private networks", False)
    yt_dlp: bool = option("fetch pages of video sites with your yt-dlp", False)


build_parser = partial(parser_of, Arguments, "data_tools.download", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("download", args)(lambda: download(args)))


def place_of(args: Arguments) -> Place:
    """Check the options. Raises DataError."""
    for name, least in (("workers", 1), ("per_host", 1), ("retries", 0)):
        if getattr(args, name) < least:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    for name in ("timeout", "max_time"):
        if not 0 < getattr(args, name) < threading.TIMEOUT_MAX:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected seconds, more than 0")
    total = num_bytes("--max-total", args.max_total) if args.max_total else None
    largest = num_bytes("--max-bytes", args.max_bytes)
    limits = Limits(largest, args.timeout, args.retries, args.max_time, args.allow_private)
    return Place(Path(args.out), limits, Budget(total), threading.Event(), find_yt_dlp() if args.yt_dlp else None)


def num_bytes(option: str, text: str) -> int:
    """Return the bytes of "500M". Raises DataError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise DataError(f"{option} {text}: expected bytes, such as 500M or 2G")
    return size


def download(args: Arguments) -> int:
    """Download what is not there yet, then write the tables; returns the exit status."""
    from opensora_repro.data.tables import open_table

    place, table = place_of(args), open_table(Path(args.table))
    if "url" not in table.schema.names:
        raise DataError(f"{table.path}: column url missing (has {', '.join(map(one_line, table.schema.names))})")
    if place.out.resolve() == table.path.resolve().parent:
        raise DataError(f"--out {place.out}: is the table's own folder; choose another")
    with Records(place.out) as records:  # which no two runs have: they would write the same partial files
        for name in ("", "files", "parts"):
            (place.out / name).mkdir(exist_ok=True)
            remove_leftovers(place.out / name)
        results = fetch_all(list_files(table), place, records, args.workers, args.per_host)
        rejects = write_tables(table, results, place.out)
    rows = table.num_rows - rejects
    size = sum(result.get("bytes", 0) for result in results.values())
    files = sum("file" in result for result in results.values())
    print(f"{rows:,} rows with {files:,} files ({size / 1e6:,.1f} MB), {rejects:,} rejected: {place.out}")
    if not rows:
        raise DataError(f"{table.path}: no file came; the reasons are in {place.out / 'rejects.parquet'}")
    return 0


def key_of(row: Row) -> str:
    """Return what tells a row's file apart: its URL and the checksums it must have."""
    return digest([str(row["url"]).strip(), *(str(row.get(kind) or "").lower() for kind in DIGESTS)], size=12)


def fault_of(row: Row) -> str:
    """Return why a row cannot be downloaded, "" if it can."""
    if is_missing(row["url"]):
        return "url is empty"
    for kind, length in DIGESTS.items():
        if not is_missing(row.get(kind)) and not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", str(row[kind])):
            return f"{kind} is not {length} hex digits"
    return ""


def id_of(row: Row) -> str:
    from opensora_repro.data.ids import text_digest

    span = [str(row.get(name)) for name in ("start_time", "end_time")] if is_part(row) else []
    return text_digest(str(row["url"]), *span) if is_missing(row.get("id")) else str(row["id"])


def is_part(row: Row) -> bool:
    """Whether a row describes a part of its file."""
    return not (is_missing(row.get("start_time")) and is_missing(row.get("end_time")))


def list_files(table: Table) -> dict[str, Download]:
    """Return the files of all rows, each once, with names that no two of them share."""
    downloads: dict[str, Download] = {}
    taken: set[str] = set()
    for row in table.rows():
        key = "" if fault_of(row) else key_of(row)
        if not key or key in downloads:
            continue
        source = row.get("source")
        name = safe_name(str(source) if is_part(row) and not is_missing(source) else id_of(row))
        if name.lower() in taken:  # some file systems know no case
            name = f"{name}-{key[:12]}"
        taken.add(name.lower())
        digests = tuple((kind, str(row[kind]).lower()) for kind in DIGESTS if not is_missing(row.get(kind)))
        downloads[key] = Download(key, name, str(row["url"]).strip(), digests)
    return downloads


def write_tables(table: Table, results: dict[str, Row], out: Path) -> int:
    """Write rejects.parquet, captions.parquet if rows describe parts, and the manifest; return how many rejects."""
    import pyarrow as pa

    from opensora_repro.data.tables import num_rows, schema_of, table_writer

    whole = pa.schema([*schema_of(MADE), *(field for field in table.schema if field.name not in MADE)])
    parts = pa.schema([pa.field("part", pa.string()) if field.name == "id" else field for field in whole])
    has_parts = bool({"start_time", "end_time"} & set(table.schema.names))
    captions = table_writer(out / "captions.parquet", parts) if has_parts else nullcontext(lambda batch: None)
    with (
        table_writer(out / "manifest.parquet", whole) as write,
        captions as write_part,
        rejects_writer(out / "rejects.parquet") as refuse,
    ):
        for kept, described in with_files(table, results, refuse):
            write(rows_batch(kept, whole))
            write_part(rows_batch(described, parts))
    return num_rows(out / "rejects.parquet")


def with_files(
    table: Table, results: dict[str, Row], refuse: Callable[[Row], None]
) -> Iterator[tuple[list[Row], list[Row]]]:
    """Yield, batch by batch, the manifest's rows and the rows that describe parts of their files."""
    from opensora_repro.data.ids import Seen

    seen, files = Seen(), set[str]()
    for rows in in_batches(table.rows()):
        kept, described = list[Row](), list[Row]()
        ids = [id_of(row) for row in rows]
        for row, identity, new in zip(rows, ids, seen.add(ids), strict=True):
            fault = fault_of(row)
            result = {} if fault else results[key_of(row)]
            reason = fault or result.get("error") or ("" if new else "another row has this id")
            if reason:
                refuse(reject(identity, redacted(str(row["url"] or "")), "download", reason))
                continue
            row = {**row, "url": redacted(str(row["url"]))}  # what was signed has done its work
            made = made_columns(row, identity, result)
            if not is_part(row):
                kept.append({**row, **made})
                continue
            name = result["file"]
            described.append({**row, **made, "source": name, "part": identity})
            if name not in files:
                files.add(name)
                kept.append({**made, "id": Path(name).stem, "source": name, "caption": "", "url": row["url"]})
        yield kept, described


def made_columns(row: Row, identity: str, result: Row) -> Row:
    """Return the columns that the manifest has beside the table's own."""
    name = result["file"]
    return {
        "id": identity,
        "path": f"files/{name}",
        "caption": "" if is_missing(row.get("caption")) else row["caption"],
        "source": name if is_missing(row.get("source")) else row["source"],
        "sha256": result["sha256"],
        "file_size": result["bytes"],
    }


if __name__ == "__main__":
    sys.exit(main())
