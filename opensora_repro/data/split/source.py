"""From one source to its clips: the job that splits it, what its clips are called, and what is told of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.ids import Originals, text_digest
from opensora_repro.data.inputs import Item, Items
from opensora_repro.data.jobs.course import Job
from opensora_repro.data.jobs.earlier import file_key
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.manifest import reject
from opensora_repro.data.split.options import Options, encoding_of, scans_in_one_pass
from opensora_repro.data.tables import Again, Row, in_batches
from opensora_repro.files import digest, is_file, size_and_time

if TYPE_CHECKING:
    from opensora_repro.data.split.scenes import Scan, Span

METHOD = 6  # raise when the same options would give other clips, so that finished sources are done again
PATIENCE = 600.0  # seconds that any source may take
SLOWEST = 20e3  # bytes of a source that a busy core splits in a second
Record = dict[str, Any]  # of a finished source: rows of "clips" and "rejects", 16 digits of its "content"


@dataclass(frozen=True)
class Source:
    """A video: where it is, what the manifest calls it, and a digest of its content."""

    path: Path
    name: str
    digest: str


def jobs_of(items: Items, out: Path, options: Options) -> Iterable[Job]:
    return Again(lambda: (job_of(item, out, options) for item in items if not item.reason))


def job_of(item: Item, out: Path, options: Options) -> Job:
    """Return the job that splits a file. One that hangs its decoder is given up, a slow machine is waited for."""
    size = (size_and_time(item.path) or [0])[0]
    args = {
        "path": os.fspath(item.path.absolute()), "out": os.fspath(out.absolute()), "options": asdict(options),
        "name": item.name,
    }  # fmt: skip
    how = [METHOD, asdict(options)]
    before = hashlib.blake2b(json.dumps(how).encode(), digest_size=4)  # as earlier releases named options
    earlier = file_key(item.path, f"-{before.hexdigest()}")
    return Job(digest(how), item.name, args, PATIENCE + size / SLOWEST, (item.path,), earlier)


def job_of_row(row: Record, options: Record) -> Job | None:
    """Return the job of a file that was probed; none for a long one."""
    if (row.get("duration") or 0) > options["long"]:
        return None
    return job_of(Item(Path(row["path"]), row["source"]), Path(options["out"]), Options(**options["options"]))


def rows_of(args: Record, result: Record) -> list[Row]:
    """Return the clips of a source for the next step of a line."""
    folder = os.path.join(args["out"], "clips")
    return [{**row, "source": args["name"], "path": f"{folder}/{row['path']}"} for row in result.get("clips", [])]


def split_job(args: dict[str, Any]) -> Record:
    """Split one source, the part that runs in a worker."""
    path, content, options = Path(args["path"]), args["contents"][0][:16], Options(**args["options"])
    return {"content": content, **split_source(Source(path, path.name, content), Path(args["out"]), options)}


def split_source(source: Source, out: Path, options: Options) -> Record:
    """Detect, cut, verify; return the clips and what gave none. A source that cannot be read is a reject."""
    from opensora_repro.data.split.cut import cut_clips
    from opensora_repro.data.split.scenes import scan_video
    from opensora_repro.data.split.single_pass import SceneOptions, scan_and_cut
    from opensora_repro.data.video import DecodeError

    target = partial(clip_path, source, out)
    encoding, scan, o = encoding_of(options), None, options
    try:
        if scans_in_one_pass(o):
            how = SceneOptions(encoding, o.threshold, o.min_frames, o.trim)
            scan = scan_and_cut(source.path, target, how)
        written = scan is not None
        scan = scan or scan_video(source.path, detector=o.detector, threshold=o.threshold)
        spans, rejects = planned_spans(scan, o)
        kept = [(span, target(span)) for span in spans]
        if not written:
            cut_clips(source.path, scan, kept, encoding)
        return {"clips": [clip_row(path, scan, span) for span, path in kept], "rejects": rejects}
    except DecodeError as error:
        return {"clips": [], "rejects": [reject_row(str(error).removeprefix(f"{source.path}: "))]}


def planned_spans(scan: Scan, o: Options) -> tuple[list[Span], list[Row]]:
    """Return the spans of a source's clips, and rejects for those that are too short."""
    from opensora_repro.data.split.cut import num_written
    from opensora_repro.data.split.scenes import plan_spans
    from opensora_repro.data.video import average_rate

    fps, limits = encoding_of(o).fps, {"min_frames": o.min_frames, "max_frames": o.max_frames}
    if fps is not None:  # limits count frames as they are written
        faster = average_rate(scan.times, scan.time_base) / float(fps)
        limits = {name: round(limit * faster) or limit for name, limit in limits.items()}
    spans = plan_spans(len(scan.times), scan.cuts, transitions=scan.transitions, trim=o.trim, **limits)
    lengths = {span: num_written(scan, span, fps) for span in spans}
    short = [span for span in spans if lengths[span] < o.min_frames]
    rejects = [reject_row(f"{lengths[s]} frames, --min-frames is {o.min_frames}", s.start, s.end) for s in short]
    return [span for span in spans if lengths[span] >= o.min_frames], rejects


def has_its_clips(out: Path, job: Job, result: Record) -> bool:
    return all(is_file(out / "clips" / row["path"]) for row in result.get("clips", []))


def take_over(records: Records, jobs: Iterable[Job]) -> None:
    """Bring an earlier release's records together: of a file the name of its content's, and of that the clips."""
    for batch in in_batches(jobs) if records.num_taken_over("files") else ():
        named = records.get("files", [job.earlier for job in batch])
        names = {key: record["digest"] for key, record in named.items() if "digest" in record}
        found = records.get("sources", names.values())
        known = {key: {**found[name], "content": name[:16]} for key, name in names.items() if name in found}
        records.put("sources", {key: json.dumps(record) for key, record in known.items()})


def clip_path(source: Source, out: Path, span: Span) -> Path:
    return out / "clips" / f"{clip_id(source, span)}.mp4"


def clip_id(source: Source, span: Span) -> str:
    """The id follows from the source's content and the span, so that a clip keeps it wherever the files go."""
    return f"{source.digest}-{span.start:06d}-{span.end:06d}"


def clip_row(path: Path, scan: Scan, span: Span) -> Row:
    from opensora_repro.data.video import average_rate, probe

    info = probe(path)
    rate = average_rate(scan.times[span.start : span.end], scan.time_base)
    return {
        "id": path.stem,
        "path": path.name,
        "caption": "",
        "num_frames": info.num_frames,
        "fps": (rate if info.num_frames == len(span) else 0) or info.fps,
        "height": info.height,
        "width": info.width,
        "start_frame": span.start,
        "end_frame": span.end,
        "start_time": scan.seconds(span.start),
        "end_time": scan.seconds(span.end),
        "resplit": span.resplit,
    }


def reject_row(reason: str, start: int | None = None, end: int | None = None) -> Row:
    return {"start_frame": start, "end_frame": end, "reason": reason}


class Outcome:
    """The clips and the rejects, in the sources' order, made of the results as often as they are asked for.

    Of sources with the same content the first is kept.
    """

    def __init__(self, items: Items, results: Iterable[Record]) -> None:
        self.items, self.results = items, results
        self.originals = Originals(source.digest for source, record in self._told() if record.get("clips"))

    def clips(self, refuse: Callable[[Row], None]) -> Iterator[Row]:
        """Yield the clips, and hand the rejects to `refuse`."""
        original = self.originals.names()
        for source, record in self._told():
            found = record.get("clips", [])
            refused = record.get("rejects", []) if "error" not in record else [reject_row(str(record["error"]))]
            first = original(source.name) if found else source.name
            if first != source.name:
                found, refused = [], [reject_row(f"same content as {first}")]
            yield from ({**row, "source": source.name, "path": f"clips/{row['path']}"} for row in found)
            for row in refused:
                refuse(named_reject(source, row))
        for item in self.items:
            if item.reason:
                refuse(reject("", item.name, "split", item.reason))

    def _told(self) -> Iterator[tuple[Source, Record]]:
        usable = (item for item in self.items if not item.reason)
        for item, record in zip(usable, self.results, strict=True):
            yield Source(item.path, item.name, record.get("content", text_digest(item.name))), record


def named_reject(source: Source, row: Row) -> Row:
    """Give a reject its id: the source's content, and the span if it has one."""
    identity = source.digest
    if row["start_frame"] is not None:
        identity = f"{identity}-{row['start_frame']:06d}-{row['end_frame']:06d}"
    return reject(identity, source.name, "split", **row)
