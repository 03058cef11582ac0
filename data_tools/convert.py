"""Turn datasets into our manifest, and our manifest into what other tools read.

    python -m data_tools.convert INPUT --out DIR [--from FORMAT] [--to FORMAT]

INPUT, recognised by its contents (`--from` settles doubt):
    manifest     our manifest, or another CSV or Parquet table with a column path
    opensora     Open-Sora's CSV without a header: path, caption[, num_frames]
    ucf101       CLASS/v_*.avi: the class gives caption and label; --classes classInd.txt, --list trainlist01.txt
    imagenet     train/n01440764/*.JPEG, or any CLASS/picture; --classes with a line `n01440764 tench, Tinca tinca` each
    webdataset   a tar archive, a folder or a pattern of them: extracted to DIR/media
    hdvg, panda70m   HD-VG-130M's JSON files and Panda-70M's CSV: parts of videos, for data_tools.download
--to:
    manifest     DIR/manifest.parquet (the default), csv: DIR/manifest.csv
    opensora     DIR/opensora.csv: path, caption, num_frames, no header, absolute paths
    webdataset   DIR/shards/000000.tar and on, --shard-size clips each

Files are referred to, not copied. Sizes, rates and lengths that INPUT lacks are read from the files (--no-probe leaves
them empty, and files unlooked at). Rows that cannot be taken are in DIR/rejects.parquet with the reason. Tables are
read in batches, so memory does not grow with them; what is done is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.convert.source import refusal
from opensora_repro.data.inputs import VIDEO_SUFFIXES, Item
from opensora_repro.data.jobs.course import Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, run_jobs, runner_of
from opensora_repro.data.manifest import rejects_writer
from opensora_repro.data.options import argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import job_of, probe_file
from opensora_repro.data.progress import progress
from opensora_repro.data.tables import in_batches, rows_batch, schema_of
from opensora_repro.errors import DataError, check_least, run_command
from opensora_repro.files import one_line, remove_leftovers, user_path

if TYPE_CHECKING:
    from opensora_repro.data.convert.source import InputRows, Refuse
    from opensora_repro.data.convert.tar_reader import Limits

FROM = ("manifest", "opensora", "ucf101", "imagenet", "webdataset", "hdvg", "panda70m")
OUTPUTS = {"manifest": "manifest.parquet", "csv": "manifest.csv", "opensora": "opensora.csv"}
URL_OUTPUTS = {"manifest": "urls.parquet", "csv": "urls.csv"}
WITHOUT_FILES = ("hdvg", "panda70m")
OPENSORA = {"path": "string", "caption": "string", "num_frames": "int64"}
PROBED_AT_ONCE = 1 << 14  # files
FACTS = ("num_frames", "fps", "height", "width")


@dataclass(frozen=True)
class Options:
    """What the command line says, checked."""

    given: str
    out: Path
    kind: str
    to: str
    classes: Path | None
    listed: Path | None
    probe: bool
    shard_size: int
    limits: Limits
    runner: Runner


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    input: str = argument("a table, folder, archive or pattern (put -- before a leading dash)", type=local_path)
    out: str = option("folder for the result and rejects.parquet", type=local_path, metavar="DIR")
    kind: str | None = option("format of INPUT (default: as recognised)", None, flag="--from", choices=FROM)
    to: str = option("format to write (manifest)", "manifest", choices=(*OUTPUTS, "webdataset"))
    classes: Path | None = option("class folders: their classes, in order", None, type=user_path, metavar="FILE")
    listed: Path | None = option("class folders: only these files", None, flag="--list", type=user_path, metavar="FILE")
    no_probe: bool = option("leave sizes empty that INPUT does not tell", False)
    shard_size: int = option("clips a tar archive (%(default)s)", 1000, metavar="N")
    max_bytes: str | None = option("tar archives: largest file in one, such as 500M (4G)", None, metavar="N")
    max_total: str | None = option("tar archives: all that is in one, unpacked (200G)", None, metavar="N")


build_parser = partial(parser_of, Arguments, "data_tools.convert", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("convert", args)(lambda: convert(options_of(args))))


def options_of(args: Arguments) -> Options:
    """Check the options and recognise the format. Raises UserError."""
    from opensora_repro.data.convert.recognise import recognise

    out = Path(args.out)
    check_least(args, "shard_size")
    kind = args.kind or recognise(args.input, out)
    for flag, given in (("--classes", args.classes), ("--list", args.listed)):
        if given and kind not in ("ucf101", "imagenet"):
            raise DataError(f"{flag}: only for class folders, INPUT is {kind}")
    limits = limits_of(args, kind)
    if kind in WITHOUT_FILES and args.to not in URL_OUTPUTS:
        raise DataError(f"--to {args.to}: {kind} names no files yet; leave --to out, and pass urls.parquet to download")
    given, shards = Path(args.input).resolve(), (out / "shards").resolve()
    if given == out.resolve() or (args.to == "webdataset" and shards in (given, *given.parents)):
        raise DataError(f"--out {out}: is INPUT itself; choose another folder")
    name = (URL_OUTPUTS if kind in WITHOUT_FILES else OUTPUTS).get(args.to)
    if name and (out / name).resolve() == given:
        raise DataError(f"--out {out}: {name} there is INPUT itself; choose another folder")
    return Options(
        args.input, out, kind, args.to, args.classes, args.listed, not args.no_probe, args.shard_size, limits,
        runner_of(args),
    )  # fmt: skip


def limits_of(args: Arguments, kind: str) -> Limits:
    """Return how much an archive may hold. Raises DataError."""
    from data_tools.download import num_bytes
    from opensora_repro.data.convert.tar_reader import Limits

    usual = Limits()
    for flag, given in (("--max-bytes", args.max_bytes), ("--max-total", args.max_total)):
        if given and kind != "webdataset":
            raise DataError(f"{flag}: only for tar archives, INPUT is {kind}")
    return Limits(
        num_bytes("--max-bytes", args.max_bytes) if args.max_bytes else usual.member,
        num_bytes("--max-total", args.max_total) if args.max_total else usual.archive,
    )


def convert(options: Options) -> int:
    """Write the result and the rejects; returns the exit status. Raises DataError when no row came out."""
    from opensora_repro.data.tables import num_rows

    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "records", out / "tars"):
        remove_leftovers(folder)
    if options.kind in WITHOUT_FILES:
        place, rows = out / URL_OUTPUTS[options.to], write_urls(options)
    else:
        place = out / ("shards" if options.to == "webdataset" else OUTPUTS[options.to])
        with Records(out) as records:
            rows = (write_webdataset if options.to == "webdataset" else write_clips)(options, records)
    rejects = num_rows(out / "rejects.parquet")
    print(f"{options.kind}: {rows:,} rows, {rejects:,} rejected: {place}")
    if not rows:
        raise DataError(f"{one_line(options.given)}: no row came out; the reasons are in {out / 'rejects.parquet'}")
    return 0


def write_urls(options: Options) -> int:
    """Write a table for data_tools.download; returns its rows."""
    from opensora_repro.data.convert.source import with_ids
    from opensora_repro.data.convert.tables import COLUMNS, hdvg_rows, panda_rows
    from opensora_repro.data.ids import Seen
    from opensora_repro.data.tables import table_writer

    path, schema, seen, rows = Path(options.given), schema_of({**COLUMNS, "path": "string"}), Seen(), 0
    with (
        table_writer(options.out / URL_OUTPUTS[options.to], schema_of(COLUMNS)) as write,
        rejects_writer(options.out / "rejects.parquet") as refuse,
        progress("converting", None, "row") as bar,
    ):
        found = panda_rows(path, refuse) if options.kind == "panda70m" else hdvg_rows(json_files(path), refuse)
        for part in in_batches(found):
            batch = with_ids(rows_batch(part, schema), [None] * len(part), seen, refuse).select(list(COLUMNS))
            write(batch)
            rows += batch.num_rows
            bar(len(part))
    return rows


def json_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix.lower() in (".json", ".jsonl") and p.is_file())


def write_clips(options: Options, records: Records) -> int:
    """Write a manifest or a CSV; returns its rows."""
    from opensora_repro.data.manifest import Absolute, Rebase
    from opensora_repro.data.tables import table_writer

    out, source = options.out, open_source(options, records)
    opensora = options.to == "opensora"
    schema = schema_of(OPENSORA) if opensora else source.schema
    place = Absolute(source.folder) if opensora else Rebase(source.folder, out.absolute())
    rows = 0
    with (
        table_writer(out / OUTPUTS[options.to], schema, header=not opensora) as write,
        rejects_writer(out / "rejects.parquet") as refuse,
    ):
        for batch in accepted(source, options, records, refuse):
            if opensora:
                batch = captioned(batch, refuse).select(list(OPENSORA))
            write(place(batch))
            rows += batch.num_rows
    return rows


def write_webdataset(options: Options, records: Records) -> int:
    """Write archives; returns how many samples they have."""
    from opensora_repro.data.convert.tar_writer import write_shards
    from opensora_repro.data.manifest import Rebase
    from opensora_repro.data.tables import table_writer

    table, source, rows = options.out / "records" / "rows.parquet", open_source(options, records), 0
    place = Rebase(source.folder, table.parent.absolute())
    with rejects_writer(options.out / "rejects.parquet") as refuse:
        with table_writer(table, source.schema) as write:
            for batch in accepted(source, options, records, refuse):
                write(place(batch))
                rows += batch.num_rows
        return write_shards(table, options.out, records, options.shard_size, options.runner, refuse) if rows else 0


def open_source(options: Options, records: Records) -> InputRows:
    """Open INPUT as what it is. Raises DataError."""
    from opensora_repro.data.convert import class_folders, tables, tar_reader
    from opensora_repro.data.video import IMAGE_SUFFIXES

    given, out = Path(options.given), options.out
    if options.kind == "webdataset":
        tars = tar_reader.find_tars(options.given, out)
        return tar_reader.open_webdataset(tars, out, records, options.limits, options.runner)
    if options.kind == "manifest":
        return tables.open_clip_table(given)
    if options.kind == "opensora":
        return tables.open_opensora_csv(given)
    if not given.is_dir():
        raise DataError(f"{one_line(given)}: expected a folder of class folders")
    suffixes = VIDEO_SUFFIXES if options.kind == "ucf101" else IMAGE_SUFFIXES
    return class_folders.open_class_folders(given, out, suffixes, options.classes, options.listed)


def accepted(source: InputRows, options: Options, records: Records, refuse: Refuse) -> Iterator[Any]:
    """Yield the rows with ids, and with what the files tell where they are to be asked.

    Files that were extracted from archives and are of no use are deleted in the end.
    """
    from opensora_repro.data.convert import tar_reader
    from opensora_repro.data.convert.source import with_ids
    from opensora_repro.data.ids import Seen

    seen, useless = Seen(), list[dict[str, Any]]()

    def refuse_file(row: dict[str, Any]) -> None:
        refuse(row)
        if options.kind == "webdataset":
            useless.append(row)

    with progress("converting", source.num_rows, "row") as bar:
        for batch in source.batches(refuse):
            for start in range(0, batch.num_rows, PROBED_AT_ONCE):
                part = batch.slice(start, PROBED_AT_ONCE)
                size, found = part.num_rows, list[str | None]()
                if options.probe:
                    part, found = probed(part, source.folder, options, records, refuse_file)
                yield with_ids(part, found or [None] * part.num_rows, seen, refuse_file)
                bar(size)
    if useless:
        items = tar_reader.find_tars(options.given, options.out)
        tar_reader.delete_rejected(items, options.out, options.limits, useless)


def probed(
    batch: Any, folder: Path, options: Options, records: Records, refuse: Refuse
) -> tuple[Any, list[str | None]]:
    """Fill in sizes, rates and lengths from the files where any is missing or impossible.

    Returns the rows whose file can be read, and the digests of the files that were. A row with all of them is believed.
    """
    import pyarrow.compute as pc

    lacking = pc.indices_nonzero(pc.invert(complete(batch))).to_pylist()
    if not lacking:
        return batch, []
    rows: list[Any] = batch.to_pylist()
    found: list[str | None] = [None] * len(rows)
    facts = read_files({at: rows[at]["path"] for at in lacking}, folder, options, records)
    for at, result in facts.items():
        if "error" in result:
            refuse(refusal(rows[at]["id"] or result.get("id", ""), result["error"], rows[at]["path"]))
            rows[at] = None
        else:
            rows[at] |= {name: result[name] for name in FACTS}
            found[at] = result["id"]
    kept = [at for at, row in enumerate(rows) if row is not None]
    return rows_batch([rows[at] for at in kept], batch.schema), [found[at] for at in kept]


def complete(batch: Any) -> Any:
    """Return which rows have a possible number of frames, rate (none for a picture) and size."""
    import pyarrow.compute as pc

    counts = [
        pc.fill_null(pc.greater_equal(batch.column(name), 1), False) for name in ("num_frames", "height", "width")
    ]
    rate = pc.fill_null(pc.greater(batch.column("fps"), 0), False)
    rate = pc.or_(rate, pc.fill_null(pc.equal(batch.column("num_frames"), 1), False))
    return pc.and_(pc.and_(counts[0], counts[1]), pc.and_(counts[2], rate))


def read_files(paths: dict[int, str], folder: Path, options: Options, records: Records) -> dict[int, dict[str, Any]]:
    """Probe files; returns data_tools.probe's result for each, {"error": reason} among them."""
    facts: dict[int, dict[str, Any]] = {}
    jobs = {}
    for at, name in paths.items():
        path = folder / name
        if not path.is_file():
            facts[at] = {"error": "is no regular file" if path.exists() else "no such file"}
        else:
            jobs[at] = job_of(Item(path, name), decode=False)
    if jobs:
        keeping = Keeping(records, "files")
        done = run_jobs(probe_file, list(jobs.values()), keeping, runner=options.runner, label="probing", unit="file")
        facts |= dict(zip(jobs, done, strict=True))
    return {at: facts[at] for at in paths}


def captioned(batch: Any, refuse: Refuse) -> Any:
    """Leave out the rows without a caption."""
    import pyarrow.compute as pc

    good = pc.not_equal(batch.column("caption"), "")
    for at in pc.indices_nonzero(pc.invert(good)).to_pylist():
        refuse(refusal(batch.column("id")[at].as_py(), "caption is empty", batch.column("path")[at].as_py()))
    return batch.filter(good)


if __name__ == "__main__":
    sys.exit(main())
