"""Split long videos at their cuts into clips that training reads fast.

    python -m data_tools.split INPUT --out DIR

INPUT is a video, a folder of videos (searched with its subfolders), a glob pattern, or a CSV or Parquet table with a
`path` column, such as `probe`'s manifest. DIR receives `clips/*.mp4`, `manifest.parquet` (one row a clip, captions
empty) and `rejects.parquet` (what gave no clip, with the reason). Run again, it does only what is not done yet: a
source is finished once it is recorded in `DIR/records.sqlite`, and is known by its content.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from functools import partial
from os.path import expanduser
from pathlib import Path

from opensora_repro.data.inputs import Items, find_inputs
from opensora_repro.data.jobs.cluster import Resources
from opensora_repro.data.jobs.course import Job, Keeping
from opensora_repro.data.jobs.records import Records
from opensora_repro.data.jobs.run import Runner, RunnerArguments, run_jobs, runner_of
from opensora_repro.data.jobs.steps import ToolStep
from opensora_repro.data.jobs.workers import num_cores
from opensora_repro.data.manifest import FILMED_RATE, LINEAGE, MANIFEST, SLOW, filmed_rates, write_parted
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.split import source
from opensora_repro.data.split.options import USUAL, Options, check_options, recipe_options
from opensora_repro.data.tables import Again, open_table
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import one_line, remove_leftovers, size_and_time

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
CLIP_COLUMNS = {**MANIFEST, **LINEAGE, "resplit": "bool"}
RESOURCES = Resources(memory=1 << 30)
FEW = 4  # sources a worker, up to which it pays to share one out: its frames are decoded twice then


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
    return run_command(made_by("split", args)(lambda: split(args)))


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


def split(args: Arguments) -> int:
    """Split every source, then write the manifest and the rejects; returns the exit status."""
    options, runner, out = options_of(args), runner_of(args), Path(args.out)
    inputs = find_inputs(args.input, out=out)
    make_ready(out)
    jobs = source.jobs_of(inputs.items, out, options)
    with Records(out) as records:
        source.take_over(records, jobs)
        keeping = Keeping(records, "sources", partial(source.has_its_clips, out), one_a_file=True)
        if args.share and options.detector == "shots" and are_few(inputs.items, runner):
            from opensora_repro.data.split.shared import split_long

            split_long(list(jobs), options, keeping, 60 * args.share, runner)
        found = run_jobs(
            source.split_job, jobs, keeping, runner=runner, label="splitting", unit="video", resources=RESOURCES
        )
    remove_leftovers(out / "clips")  # again: the workers of a run that was killed just before may have died since
    clips, rejects = write_parted(out, source.Outcome(inputs.items, found).clips, CLIP_COLUMNS)
    total = len(inputs.items)
    print(f"{total} videos, {clips} clips, {rejects} rejected, {inputs.others} other files: {one_line(out)}")
    if options.fps and (line := repeats(out / "manifest.parquet", float(Fraction(options.fps)))):
        print(f"warning: {line}", file=sys.stderr)
    if not clips:
        raise DataError(f"{args.input}: no clip came out; the reasons are in {out / 'rejects.parquet'}")
    return 0


def repeats(manifest: Path, fps: float) -> str:
    """Return a line on clips whose source has fewer frames a second; nothing where none has."""
    import pyarrow as pa

    table, slow, slowest = open_table(manifest), 0, float("inf")
    for batch in table.batches([name for name in LINEAGE if name != "source"]):
        rates = filmed_rates(pa.Table.from_batches([batch]))
        slow, slowest = slow + int((rates < SLOW * fps).sum()), min(slowest, float(rates.min(initial=slowest)))
    if not slow:
        return ""
    return (
        f"{slow} of {table.num_rows} clips were filmed at fewer frames a second (from {slowest:.4g} on) "
        f"than --fps {fps:g}, so that frames repeat and motion halts: give a lower --fps (data.fps of --for-training's "
        f"config), or leave them out: data_tools.filter --keep '{FILMED_RATE} >= {SLOW * fps:g}'"
    )


def are_few(items: Items, runner: Runner) -> bool:
    """Whether it pays to share one of the videos out."""
    return sum(not item.reason for item in items) <= FEW * (runner.workers or num_cores())


def make_ready(out: Path) -> None:
    (out / "clips").mkdir(parents=True, exist_ok=True)
    remove_leftovers(out / "clips")


# ---- as a step of a line, see jobs/steps.py


def steps_of(args: Arguments, columns: Mapping[str, str]) -> list[ToolStep]:
    out, options = Path(args.out), options_of(args)
    told = {"out": os.fspath(out.absolute()), "options": asdict(options), "long": long_seconds(args, options)}
    holds = partial(source.has_its_clips, out)
    make_ready(out)
    step = ToolStep(
        "split", out, "sources", source.split_job, RESOURCES, source.rows_of, CLIP_COLUMNS, source.job_of_row, told,
        holds, one_a_file=True,
    )  # fmt: skip
    return [step]


def long_seconds(args: Arguments, options: Options) -> float:
    """Return from how many seconds on a source may be one that several workers share: no line has those."""
    return 60 * args.share if args.share and options.detector == "shots" else float("inf")


def first_jobs(args: Arguments) -> Iterable[Job]:
    """Return the jobs of INPUT, but for files that may be long where there are few. Raises DataError."""
    from opensora_repro.data.split.shared import SPARSE

    options, out = options_of(args), Path(args.out)
    items = find_inputs(args.input, out=out).items
    large = long_seconds(args, options) * SPARSE if are_few(items, runner_of(args)) else float("inf")
    jobs = source.jobs_of(items, out, options)
    return Again(lambda: (job for job in jobs if (size_and_time(job.files[0]) or [0])[0] < large))


if __name__ == "__main__":
    sys.exit(main())
