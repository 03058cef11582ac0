"""Split long videos at their cuts into clips that training reads fast.

    python -m data_tools.split INPUT --out DIR

INPUT is a video, a folder of videos (searched with its subfolders), a glob pattern, or a CSV or Parquet table with a
`path` column, such as `probe`'s manifest. DIR receives `clips/*.mp4`, `manifest.parquet` (one row a clip, captions
empty) and `rejects.parquet` (what gave no clip, with the reason). Run again, it does only what is not done yet: a
source is finished once it is recorded in `DIR/records.sqlite`, and is known by its content.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.ids import Originals, text_digest
from opensora_repro.data.inputs import Item, Items, find_inputs
from opensora_repro.data.jobs.cluster import Needs
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.earlier import file_key
from opensora_repro.data.jobs.line import Stage
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, run_jobs, runner_of
from opensora_repro.data.jobs.workers import num_cores
from opensora_repro.data.manifest import LINEAGE, MANIFEST, reject, write_parted
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.tables import Again, Row, in_batches
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import digest, is_file, one_line, remove_leftovers, size_and_time

if TYPE_CHECKING:
    from opensora_repro.data.split.cut import Encoding
    from opensora_repro.data.split.scenes import Scan, Span

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
CLIP_COLUMNS = {**MANIFEST, **LINEAGE, "resplit": "bool"}
USUAL: dict[str, Any] = {"min_frames": 8, "short_side": 0, "fps": ""}  # where neither they nor a config are given
METHOD = 5  # raise when the same options would give other clips, so that finished sources are done again
NEEDS = Needs(memory=1 << 30)
PATIENCE = 600.0  # seconds that any source may take
SLOWEST = 20e3  # bytes of a source that a busy core splits in a second
FEW = 4  # sources a worker, up to which it pays to share one out: its frames are decoded twice then
Record = dict[str, Any]  # of a finished source: rows of "clips" and "rejects", 16 digits of its "content"


@dataclass(frozen=True)
class Options:
    """What a source's clips depend on besides its content."""

    detector: str
    threshold: float | None
    min_frames: int
    max_frames: int
    crf: int
    trim: int | None = None
    preset: str = "veryfast"
    short_side: int = 0
    fps: str = ""
    audio: bool = False
    copy: bool = False
    for_training: bool = False


@dataclass(frozen=True)
class Source:
    """A video: where it is, what the manifest calls it, and a digest of its content."""

    path: Path
    name: str
    digest: str


def config_path(text: str) -> str:
    """Keep an input that stands behind --for-training from being taken for its config."""
    if text and not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"{text!r} is no .toml; write the input before it, or --for-training=CONFIG")
    return expanduser(text)


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    input: str = argument("a video, folder, glob pattern or table (put -- before a leading dash)", type=any_path)
    out: str = option("folder for clips/ and their manifest", type=any_path, metavar="DIR")
    detector: str = option(
        "shots: what no motion explains, dissolves and fades too; PySceneDetect's adaptive: change against the"
        " neighbouring frames; its content: change as such (%(default)s)",
        "shots",
        choices=("shots", "adaptive", "content"),
    )
    threshold: float | None = option(
        "level of a cut (shots: 1.5; adaptive: by how restless the video is, 2.1 to 3.5; content: 27)",
        None,
        metavar="X",
    )
    min_frames: int | None = option("drop shorter scenes, counted as they are written (8)", None, metavar="N")
    max_frames: int = option("divide longer scenes evenly and mark them `resplit` (0: never)", 0, metavar="N")
    trim: int | None = option(
        "leave out dissolves and fades, and N frames on either side of every cut (default: leave out nothing)",
        None,
        metavar="N",
    )
    preset: str = option("x264 preset (%(default)s)", "veryfast", choices=PRESETS)
    short_side: int | None = option("reduce to this short side (0, usual: keep)", None, metavar="PX")
    fps: str | None = option("frames a second, such as 24 or 30000/1001 (usual: keep)", None, metavar="RATE")
    audio: bool = option("keep the sound, as AAC", False)
    copy: bool = option("copy instead of encoding where cuts fall on key frames", False)
    for_training: str | None = option(
        "clips that are read fast: short side 256 unless --short-side says otherwise, quick to decode; with a"
        " stage's config, such as configs/stage2_16x256x256.toml, clips that fit it: --min-frames, --short-side and"
        " --fps are what its samples need, unless they are given",
        None,
        nargs="?",
        const="",
        type=config_path,
        metavar="CONFIG.toml",
    )
    share: float = option(
        "where there are few videos, several workers share those of more than so many minutes (%(default)s); 0: never",
        30.0,
        metavar="MIN",
    )
    crf: int = option("x264 quality of the clips, 0 (best) to 51 (%(default)s)", 18)


build_parser = partial(parser_of, Arguments, "data_tools.split", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(
        made_by("split", args)(
            lambda: split(args.input, Path(args.out), options_of(args), runner_of(args), share=args.share)
        )
    )


def check(args: Arguments) -> None:
    """Raise DataError for options that cannot work, before any input is looked at."""
    options_of(args)
    if not 0 <= args.share < float("inf"):
        raise DataError(f"--share {args.share}: expected 0 or more minutes")
    runner_of(args)


def options_of(args: Arguments) -> Options:
    """Fill in what was not given and check the numbers; DataError names the option."""
    given = {field.name: getattr(args, field.name) for field in fields(Options)}
    given["for_training"] = args.for_training is not None
    usual = recipe_options(args.for_training) if args.for_training else USUAL
    return check_options(Options(**given | {name: usual[name] for name in usual if given[name] is None}))


def recipe_options(path: str) -> dict[str, Any]:
    """Return the options with which every clip holds a whole sample of a stage's config, at the config's speed.

    A sample takes every `data.frame_interval`-th frame and is shown at `sample.fps`, so what is filmed moves at its own
    speed where clips have the product of both; by time, it takes `data.fps`. The short side fits in landscape and
    portrait. Raises DataError.
    """
    from opensora_repro.config import ConfigError, load_config
    from opensora_repro.config.sections import sample_fps
    from opensora_repro.data.buckets import buckets_of
    from opensora_repro.data.sample_frames import interval_of

    try:
        cfg = load_config(path)
        buckets = buckets_of(cfg)
    except ConfigError as error:
        raise DataError(f"--for-training: {error}") from None
    data, several = cfg.data, bool(cfg.data.buckets)
    pictures, interval = all(bucket.num_frames == 1 for bucket in buckets), interval_of(data)
    shortest = min(bucket.num_frames for bucket in buckets if pictures or bucket.num_frames > 1)
    return {
        # A bucket takes clips of so many whole intervals, and of about its own ratio
        "min_frames": shortest * interval if several else (shortest - 1) * interval + 1,
        "short_side": max((min if several else max)(bucket.height, bucket.width) for bucket in buckets),
        "fps": "" if pictures or data.frame_sampling == "uniform" else f"{data.fps or interval * sample_fps(cfg):g}",
    }


def check_options(args: Options) -> Options:
    """Raise DataError for numbers that cannot work; it names the option."""
    if args.threshold is not None and not args.threshold > 0:
        raise DataError(f"--threshold {args.threshold}: expected a number above 0")
    if args.min_frames < 1:
        raise DataError(f"--min-frames {args.min_frames}: expected at least 1")
    if args.max_frames and args.max_frames < args.min_frames:
        raise DataError(f"--max-frames {args.max_frames}: expected 0 or at least --min-frames {args.min_frames}")
    if not 0 <= args.crf <= 51:
        raise DataError(f"--crf {args.crf}: expected 0 to 51")
    if args.trim is not None and args.trim < 0:
        raise DataError(f"--trim {args.trim}: expected 0 or more frames")
    if args.short_side and args.short_side < 16:
        raise DataError(f"--short-side {args.short_side}: expected 0 or at least 16 pixels")
    try:
        wrong = args.fps != "" and not 0 < Fraction(args.fps) <= 1000
    except (ValueError, ZeroDivisionError):
        wrong = True
    if wrong:
        raise DataError(f"--fps {args.fps}: expected a number or a fraction, such as 24 or 30000/1001")
    return args


def encoding_of(options: Options) -> Encoding:
    from opensora_repro.data.split.cut import TRAINING_SIDE, Encoding

    return Encoding(
        crf=options.crf,
        preset=options.preset,
        short_side=options.short_side or (TRAINING_SIDE if options.for_training else 0),
        fps=Fraction(options.fps) if options.fps else None,
        audio=options.audio,
        copy=options.copy and not options.for_training,
        fast_decode=options.for_training,
    )


def split(given: str, out: Path, options: Options, runner: Runner, *, share: float = 0.0) -> int:
    """Split every source, then write the manifest and the rejects; returns the exit status.

    Where there are few, several workers share a video of more than `share` minutes, unless it is 0.
    """
    inputs = find_inputs(given, out=out)
    make_ready(out)
    jobs = jobs_of(inputs.items, out, options)
    with Records(out) as records:
        take_over(records, jobs)
        keeping = Keeping(records, "sources", partial(has_its_clips, out), one_a_file=True)
        if share and options.detector == "shots" and are_few(inputs.items, runner):
            split_long(list(jobs), options, keeping, 60 * share, runner)
        found = run_jobs(split_job, jobs, keeping, runner=runner, label="splitting", unit="video", needs=NEEDS)
    remove_leftovers(out / "clips")  # again: the workers of a run that was killed just before may have died since
    clips, rejects = write_parted(out, Outcome(inputs.items, found).clips, CLIP_COLUMNS)
    total = len(inputs.items)
    print(f"{total} videos, {clips} clips, {rejects} rejected, {inputs.others} other files: {one_line(out)}")
    if not clips:
        raise DataError(f"{given}: no clip came out; the reasons are in {out / 'rejects.parquet'}")
    return 0


def are_few(items: Items, runner: Runner) -> bool:
    """Whether it pays to share one of the videos out."""
    return sum(not item.reason for item in items) <= FEW * (runner.workers or num_cores())


def make_ready(out: Path) -> None:
    (out / "clips").mkdir(parents=True, exist_ok=True)
    remove_leftovers(out / "clips")


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


def jobs_of(items: Items, out: Path, options: Options) -> Iterable[Job]:
    return Again(lambda: (job_of(item, out, options) for item in items if not item.reason))


def job_of(item: Item, out: Path, options: Options) -> Job:
    """Return the job that splits a file. One that hangs its decoder is given up, a slow machine is waited for."""
    size = (size_and_time(item.path) or [0])[0]
    args = {"path": os.fspath(item.path.absolute()), "out": os.fspath(out.absolute()), "options": asdict(options)}
    how = [METHOD, asdict(options)]
    before = hashlib.blake2b(json.dumps(how).encode(), digest_size=4)  # as earlier releases named options
    earlier = file_key(item.path, f"-{before.hexdigest()}")
    return Job(digest(how), item.name, args, PATIENCE + size / SLOWEST, (item.path,), earlier)


def split_job(args: dict[str, Any]) -> Record:
    """Split one source, the part that runs in a worker."""
    path, content, options = Path(args["path"]), args["contents"][0][:16], Options(**args["options"])
    return {"content": content, **split_source(Source(path, path.name, content), Path(args["out"]), options)}


def scans_in_one_pass(options: Options) -> bool:
    """Whether clips are written while their cuts are found."""
    return options.detector == "shots" and not options.max_frames


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
        record = {"clips": [clip_row(path, scan, span) for span, path in kept], "rejects": rejects}
    except DecodeError as error:
        record = {"clips": [], "rejects": [reject_row(str(error).removeprefix(f"{source.path}: "))]}
    return record


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


# ---- long sources, several workers at one


def split_long(jobs: list[Job], options: Options, keeping: Keeping, seconds: float, runner: Runner) -> None:
    """Split sources of more than so many seconds in ranges, by several workers; recorded is what one would have made.

    What cannot be done so, such as a damaged file, is left to be done in one piece.
    """
    from opensora_repro.data.split.shared import find_cuts, large_left, run_parts

    long = large_left(jobs, keeping, seconds, runner)
    if not long:
        return
    encoding = encoding_of(options)
    whole = scans_in_one_pass(options) and encoding.fps is None and not encoding.audio and not encoding.copy
    how = {"threshold": options.threshold, "whole": whole, "short_side": encoding.short_side}
    cuts = find_cuts(long, keeping.records, runner, seconds=seconds, how=how)
    own = {name: {**long[name].args, "method": METHOD} for name in cuts}
    plans = run_parts(spans_job, [(long[name], {**own[name], **cuts[name]}) for name in cuts], keeping.records, runner)
    sound = {name: plan for name, plan in zip(cuts, plans, strict=True) if "error" not in plan}
    parts = [(name, group) for name, plan in sound.items() for group in plan["groups"]]
    todo = [(long[name], {**own[name], "spans": group}) for name, group in parts]
    made = run_parts(clips_job, todo, keeping.records, runner, label="cutting", holds=keeping.holds)
    for name, plan in sound.items():
        own_parts = [part for (owner, _), part in zip(parts, made, strict=True) if owner == name]
        if all("error" not in part for part in own_parts):
            clips = [row for part in own_parts for row in part["clips"]]
            record = {"content": plan["content"], "clips": clips, "rejects": plan["rejects"]}
            keeping.records.drop(keeping.kind, f"{name.partition('-')[0]}-")
            keeping.records.put(keeping.kind, {name: json.dumps(record)})


def spans_job(args: dict[str, Any]) -> Record:
    """Plan the clips of a source whose cuts are known: those that begin in each range, and what gives none."""
    from opensora_repro.data.split.ranges import scan_of

    scan = scan_of(Path(args["path"]), args["cuts"], args["transitions"])
    spans, rejects = planned_spans(scan, Options(**args["options"]))
    groups: list[list[Any]] = [[] for _ in args["starts"]]
    for span in spans:
        groups[bisect_right(args["starts"], span.start) - 1].append([span.start, span.end, span.resplit])
    return {"content": args["contents"][0][:16], "groups": [group for group in groups if group], "rejects": rejects}


def clips_job(args: dict[str, Any]) -> Record:
    """Cut the clips of one range."""
    from opensora_repro.data.split.cut import cut_clips
    from opensora_repro.data.split.ranges import scan_of
    from opensora_repro.data.split.scenes import Span

    path, options = Path(args["path"]), Options(**args["options"])
    source = Source(path, path.name, args["contents"][0][:16])
    scan, target = scan_of(path, (), ()), partial(clip_path, source, Path(args["out"]))
    clips = [(span, target(span)) for span in (Span(*given) for given in args["spans"])]
    cut_clips(path, scan, clips, encoding_of(options), seek=True)
    return {"clips": [clip_row(path, scan, span) for span, path in clips]}


# ---- as a step of a line over a cluster, see jobs/line.py


def stage_of(args: Arguments) -> Stage:
    out, options = Path(args.out), options_of(args)
    told = {"out": os.fspath(out.absolute()), "options": asdict(options), "long": long_seconds(args, options)}
    holds = partial(has_its_clips, out)
    make_ready(out)
    return Stage("split", out, "sources", split_job, NEEDS, jobs_after_probe, told, holds, one_a_file=True)


def long_seconds(args: Arguments, options: Options) -> float:
    """Return from how many seconds on a source may be one that several workers share: no line has those."""
    return 60 * args.share if args.share and options.detector == "shots" else float("inf")


def first_jobs(args: Arguments) -> Iterable[Job]:
    """Return the jobs of INPUT, but for files that may be long where there are few. Raises DataError."""
    from opensora_repro.data.split.shared import SPARSE

    options, out = options_of(args), Path(args.out)
    items = find_inputs(args.input, out=out).items
    large = long_seconds(args, options) * SPARSE if are_few(items, runner_of(args)) else float("inf")
    jobs = jobs_of(items, out, options)
    return Again(lambda: (job for job in jobs if (size_and_time(job.files[0]) or [0])[0] < large))


def jobs_after_probe(args: Record, result: Record, options: Record) -> list[Job]:
    """Return the job of a file that was probed; none for a long one."""
    if "error" in result or (result.get("duration") or 0) > options["long"]:
        return []
    path = Path(args["path"])
    return [job_of(Item(path, path.name), Path(options["out"]), Options(**options["options"]))]


# ---- what a clip is called, and what is told of it


def clip_path(source: Source, out: Path, span: Span) -> Path:
    return out / "clips" / f"{clip_id(source, span)}.mp4"


def clip_id(source: Source, span: Span) -> str:
    """The id follows from the source's content and the span, so that a clip keeps it wherever the files go."""
    return f"{source.digest}-{span.start:06d}-{span.end:06d}"


def reject_row(reason: str, start: int | None = None, end: int | None = None) -> Row:
    return {"start_frame": start, "end_frame": end, "reason": reason}


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


if __name__ == "__main__":
    sys.exit(main())
