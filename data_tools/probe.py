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

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora_repro.data.inputs import find_inputs
from opensora_repro.data.jobs.course import Job
from opensora_repro.data.jobs.run import RunnerArguments, runner_of
from opensora_repro.data.jobs.steps import ToolStep
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import COLUMNS, RESOURCES, jobs_of, probe_all, probe_file, rows_of, suffixes
from opensora_repro.errors import run_command


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    input: str = argument("a video, folder, glob pattern or table (put -- before a leading dash)", type=any_path)
    out: str = option("folder for manifest.parquet and rejects.parquet", type=any_path, metavar="DIR")
    decode: bool = option("also decode every frame", False)
    images: bool = option("take the pictures of a folder, too", False)


build_parser = partial(parser_of, Arguments, "data_tools.probe", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    work = partial(probe_all, args.input, Path(args.out))
    return run_command(made_by("probe", args)(lambda: work(runner_of(args), decode=args.decode, images=args.images)))


# ---- as a step of a line, see jobs/steps.py


def steps_of(args: Arguments, columns: Mapping[str, str]) -> list[ToolStep]:
    """Return what is done row by row; of the columns a rule may use those that do not depend on other files."""
    told = {name: kind for name, kind in COLUMNS.items() if name not in ("id", "path", "same_as")}
    return [ToolStep("probe", Path(args.out), "files", probe_file, RESOURCES, rows_of, told)]


def first_jobs(args: Arguments) -> Iterable[Job]:
    """Return the jobs of INPUT. Raises DataError."""
    return jobs_of(find_inputs(args.input, out=Path(args.out), suffixes=suffixes(args.images)).items, args.decode)


if __name__ == "__main__":
    sys.exit(main())
