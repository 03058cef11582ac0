"""Long videos on their way through several workers: which they are, their ranges, and the cuts of all of them."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from opensora_repro.data.jobs.course import Job, Keeping, memo_of
from opensora_repro.data.jobs.parts import to_records
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, contents_of, run_jobs
from opensora_repro.data.jobs.workers import Work
from opensora_repro.data.split import source
from opensora_repro.data.split.cut import cut_clips
from opensora_repro.data.split.options import Options, encoding_of, scans_in_one_pass
from opensora_repro.data.split.ranges import (
    LEAD,
    LONGER,
    RangeShots,
    joined,
    plan_ranges,
    scan_of,
    scan_range,
    unlike_before,
)
from opensora_repro.data.split.scenes import Span
from opensora_repro.data.split.source import Record, Source, clip_path, clip_row, planned_spans
from opensora_repro.files import digest, size_and_time

METHOD = 2  # raise when a range would be looked at otherwise
SPARSE = 1e3  # bytes of a second of any video that is worth sharing out
Part = tuple[Job, dict[str, Any]]  # of the work that a job would do alone: what is to be done of it


def large_left(jobs: Sequence[Job], keeping: Keeping, seconds: float, runner: Runner) -> dict[str, Job]:
    """Return by their records' names the jobs that are not done and whose files may last longer than `seconds`."""
    large = [job for job in jobs if (size_and_time(job.files[0]) or [0])[0] >= seconds * SPARSE]
    if not large:
        return {}
    to_records(keeping)
    files, memo = [job.files[0] for job in large], memo_of(keeping.records)
    before = list(map(size_and_time, files))
    contents = contents_of(files, keeping.records, runner)
    for file, as_it_was, content in zip(files, before, contents, strict=True):  # over Ray others have read them
        memo.remember(file, as_it_was, content)
    named = {f"{digest([content])}-{job.key}": job for content, job in zip(contents, large, strict=True)}
    known = keeping.records.get(keeping.kind, named)
    holds = keeping.holds or (lambda job, result: True)
    return {name: job for name, job in named.items() if name not in known or not holds(job, known[name])}


def run_parts(
    work: Work,
    parts: Sequence[Part],
    records: Records,
    runner: Runner,
    *,
    label: str = "planning",
    holds: Callable[[Job, Any], bool] | None = None,
) -> list[Any]:
    """Return what `work` makes of parts of jobs, in their order; what is recorded is not done again."""
    jobs = [
        Job(digest([work.__name__, METHOD, {k: v for k, v in args.items() if k not in ("path", "out")}]), job.name,
            {"path": job.args["path"], **args}, job.seconds, job.files)
        for job, args in parts
    ]  # fmt: skip
    keeping = Keeping(records, "parts", holds)
    return list(run_jobs(work, jobs, keeping, runner=runner, label=label, unit="part")) if jobs else []


def ranges_job(args: dict[str, Any]) -> list[int]:
    """The first frames of a video's ranges."""
    return plan_ranges(Path(args["path"]), args["seconds"])


def scan_job(args: dict[str, Any]) -> dict[str, Any]:
    """Look at one range."""
    return asdict(scan_range(Path(args["path"]), args["start"], args["end"], lead=args["lead"], **args["how"]))


def find_cuts(
    videos: Mapping[str, Job], records: Records, runner: Runner, *, seconds: float, how: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return of the videos that can be worked on in ranges of so many seconds: their starts, cuts and transitions.

    `how`: the last arguments of `scan_range`.
    """
    planned = run_parts(ranges_job, [(job, {"seconds": seconds}) for job in videos.values()], records, runner)
    starts = {name: found for name, found in zip(videos, planned, strict=True) if isinstance(found, list) and found[1:]}
    ranges: dict[str, list[Any]] = {name: [None] * len(found) for name, found in starts.items()}
    todo, lead = [(name, number) for name, found in starts.items() for number in range(len(found))], LEAD
    while todo:
        parts = []
        for name, number in todo:
            start, end = [*starts[name], None][number : number + 2]
            parts.append((videos[name], {"start": start, "end": end, "lead": lead, "how": how}))
        looked = run_parts(scan_job, parts, records, runner, label="finding cuts")
        for (name, number), found in zip(todo, looked, strict=True):
            failed = found.get("error", "")
            ranges[name][number] = RangeShots([], [], [], alone=failed) if failed else RangeShots(**found)
        ranges = {name: found for name, found in ranges.items() if _is_sound(found)}
        todo = [(name, number) for name, found in ranges.items() for number in unlike_before(found)]
        lead *= LONGER
    found_cuts = {name: joined(found) for name, found in ranges.items()}
    return {
        name: {"starts": starts[name], "cuts": cuts, "transitions": transitions}
        for name, (cuts, transitions) in found_cuts.items()
    }


def _is_sound(ranges: Sequence[RangeShots]) -> bool:
    return not any(part.alone for part in ranges) and len({str(part.size) for part in ranges}) == 1


def split_long(jobs: list[Job], options: Options, keeping: Keeping, seconds: float, runner: Runner) -> None:
    """Split sources of more than so many seconds in ranges, by several workers; recorded is what one would have made.

    What cannot be done so, such as a damaged file, is left to be done in one piece.
    """
    long = large_left(jobs, keeping, seconds, runner)
    if not long:
        return
    encoding = encoding_of(options)
    whole = scans_in_one_pass(options) and encoding.fps is None and not encoding.audio and not encoding.copy
    how = {"threshold": options.threshold, "whole": whole, "short_side": encoding.short_side}
    cuts = find_cuts(long, keeping.records, runner, seconds=seconds, how=how)
    own = {name: {**long[name].args, "method": source.METHOD} for name in cuts}
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
    scan = scan_of(Path(args["path"]), args["cuts"], args["transitions"])
    spans, rejects = planned_spans(scan, Options(**args["options"]))
    groups: list[list[Any]] = [[] for _ in args["starts"]]
    for span in spans:
        groups[bisect_right(args["starts"], span.start) - 1].append([span.start, span.end, span.resplit])
    return {"content": args["contents"][0][:16], "groups": [group for group in groups if group], "rejects": rejects}


def clips_job(args: dict[str, Any]) -> Record:
    """Cut the clips of one range."""
    path, options = Path(args["path"]), Options(**args["options"])
    target = partial(clip_path, Source(path, path.name, args["contents"][0][:16]), Path(args["out"]))
    scan = scan_of(path, (), ())
    clips = [(span, target(span)) for span in (Span(*given) for given in args["spans"])]
    cut_clips(path, scan, clips, encoding_of(options), seek=True)
    return {"clips": [clip_row(path, scan, span) for span, path in clips]}
