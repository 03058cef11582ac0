"""Probe files: one row for each that can be read, in worker processes, and a manifest of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opensora_repro.data.ids import Originals, Seen, text_digest
from opensora_repro.data.inputs import TABLE_SUFFIXES, VIDEO_SUFFIXES, Item, Items, TableItems, find_inputs
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import LOOKED_UP, Job, Keeping
from opensora_repro.data.jobs.earlier import file_key
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, run_jobs
from opensora_repro.data.manifest import MANIFEST, path_from, reject, write_parted
from opensora_repro.data.origin import Maker, making
from opensora_repro.data.tables import Again, Row, in_batches, is_missing, read_names, with_types
from opensora_repro.errors import DataError
from opensora_repro.files import digest, is_file, one_line, size_and_time
from opensora_repro.storage.addresses import address_of

METHOD = 3  # raise when the same file would give another row, so that finished files are probed again
COLUMNS = {
    **MANIFEST, "source": "string", "duration": "double", "constant_fps": "bool", "codec": "string",
    "pixel_format": "string", "transfer": "string", "primaries": "string", "coded_height": "int64",
    "coded_width": "int64", "rotation": "int64", "audio": "bool", "container": "string", "file_size": "int64",
    "same_as": "string",
}  # fmt: skip
RESOURCES = Resources(memory=1 << 29, rows=256)
PATIENCE = 60.0  # seconds that any file may take
READ_RATE, DECODE_RATE = 5e6, 20e3  # bytes a second that a slow disk and a slow core manage, for large files
LINK_RATE = 200e3  # and a slow line to a store, which busy processes share

INPUT_HELP = (
    "manifest of clips, Parquet or CSV; or a video, folder, glob pattern or table of paths, which is probed first"
)


def manifest_of(given: str, out: Path, runner: Runner, *, required_columns: Collection[str] = tuple(MANIFEST)) -> Path:
    """Return the manifest that INPUT is or stands for, and see to it that OUT is not its folder.

    A table with `required_columns` is one. Of anything else (folder, file, pattern, table of paths) the files are
    probed into OUT/probe, and that manifest is returned. Raises DataError.
    """
    path = Path(given)
    if path.suffix.lower() in TABLE_SUFFIXES and is_file(path):
        if out.resolve() == path.resolve().parent:
            raise DataError(
                f"--out {one_line(out)}: is the manifest's own folder, where it would be replaced; choose another"
            )
        names = read_names(path)
        if set(required_columns) <= set(names) or "path" not in names:
            return path
    with making(Maker("probe", {}, str(given), out / "probe")):
        probe_all(given, out / "probe", runner, images=True, leave_out=out)
    return out / "probe" / "manifest.parquet"


def probe_all(
    given: str,
    out: Path,
    runner: Runner,
    *,
    decode: bool = False,
    images: bool = False,
    leave_out: Path | None = None,
) -> int:
    """Probe every input, write the tables; returns the exit status. Raises DataError when nothing can be read.

    `leave_out` is the folder in which no input is looked for, OUT by default.
    """
    inputs = find_inputs(given, out=leave_out or out, suffixes=suffixes(images))
    with Records(out) as records:
        jobs, keeping = jobs_of(inputs.items, decode), Keeping(records, "files")
        found = run_jobs(probe_file, jobs, keeping, runner=runner, label="probing", resources=RESOURCES)
    probed = Probed(inputs.items, found, out)
    columns = with_types(probed.rows(lambda row: None), COLUMNS) if isinstance(inputs.items, TableItems) else COLUMNS
    rows, rejects = write_parted(out, probed.rows, columns)
    counts = f"{len(inputs.items)} files, {rows} readable, {rejects} rejected, {inputs.others} others"
    print(f"{counts}: {one_line(out)}")
    if not rows:
        raise DataError(f"{given}: no file can be read; the reasons are in {out / 'rejects.parquet'}")
    return 0


def suffixes(images: bool) -> frozenset[str]:
    from opensora_repro.data.video import IMAGE_SUFFIXES

    return VIDEO_SUFFIXES | IMAGE_SUFFIXES if images else VIDEO_SUFFIXES


def jobs_of(items: Items, decode: bool) -> Iterable[Job]:
    return Again(lambda: (job_of(item, decode) for item in items if not item.reason))


def job_of(item: Item, decode: bool) -> Job:
    """Return the job for a file; what it contains is part of the work. A name's end may tell pictures from videos."""
    size = (size_and_time(item.path) or [0])[0]  # a dangling link has none
    seconds = PATIENCE + size / (DECODE_RATE if decode else LINK_RATE if address_of(item.path) else READ_RATE)
    args = {"path": os.fspath(item.path.absolute()), "decode": decode, "name": item.name, "given": given_in(item)}
    key, earlier = digest([METHOD, decode, item.path.suffix.lower()]), file_key(item.path, METHOD, decode)
    return Job(key, item.name, args, seconds, (item.path,), earlier)


def probe_file(args: dict[str, Any]) -> Row:
    """Return a file's facts and its content's digest as id, or {"error": reason}."""
    from opensora_repro.data.probe.facts import read_facts
    from opensora_repro.data.video import DecodeError

    path, identity = Path(args["path"]), args["contents"][0][:16]
    try:
        facts = asdict(read_facts(path, decode=args["decode"]))
    except DecodeError as error:
        return {"id": identity, "error": str(error).removeprefix(f"{path}: ")}
    return {"id": identity, "caption": "", "file_size": path.stat().st_size, **facts}


def given_in(item: Item) -> dict[str, str]:
    """Return what a table's row says of a file that stays as it is."""
    return {k: str(v) for k, v in (item.row or {}).items() if k in ("id", "caption", "source") and not is_missing(v)}


def rows_of(args: dict[str, Any], result: Row) -> list[Row]:
    """Return a file's row for the next step of a line: with what there is of every file."""
    if "error" in result:
        return []
    return [{**result, "source": args["name"], **args["given"], "path": args["path"], "fps": result["fps"] or 0.0}]


class Probed:
    """The manifest's rows and the rejects, in the inputs' order, made of the results as often as they are asked for.

    A table's rows keep their columns. Of files with the same content each has its row, and `same_as` names the first;
    the first one's id is the content's digest, the others' add one of their name, since ids are unique.
    """

    def __init__(self, items: Items, results: Iterable[Row], out: Path) -> None:
        self.items, self.results, self.out = items, results, out
        self.originals = Originals(result["id"] for _, result in self._told() if "error" not in result)

    def _told(self) -> Iterator[tuple[Item, Row]]:
        results = iter(self.results)
        return ((item, {"error": item.reason} if item.reason else next(results)) for item in self.items)

    def rows(self, refuse: Callable[[Row], None]) -> Iterator[Row]:
        """Yield the manifest's rows, and hand the rejects among them to `refuse`."""
        seen, original = Seen(), self.originals.names()
        for batch in in_batches(self._told(), LOOKED_UP):
            found = [self._row(item, result, original) for item, result in batch]
            new = iter(seen.add([row["id"] for row, good in found if good]).tolist())
            for (item, _), (row, good) in zip(batch, found, strict=True):
                if not good:
                    refuse(row)
                elif next(new):
                    yield row
                else:
                    refuse(reject(row["id"], item.name, "probe", "another row has this id", path=row["path"]))

    def _row(self, item: Item, result: Row, original: Callable[[str], str]) -> tuple[Row, bool]:
        named = text_digest(item.name)
        path = "" if item.reason else path_from(self.out, item.path)
        given = given_in(item)
        if "error" in result:
            identity = str(given.get("id", result.get("id", named)))
            return reject(identity, item.name, "probe", result["error"], path=path), False
        same = original(item.name)
        row = {**(item.row or {}), **result, "source": item.name, **given, "path": path}
        if same != item.name:
            row |= {"id": given.get("id", f"{result['id']}-{named[:8]}"), "same_as": same}
        return {**row, "id": str(row["id"])}, True
