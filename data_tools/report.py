"""Show a dataset on one page: what went through each tool, what the clips look like, what was dropped and why.

    python -m data_tools.report INPUT [INPUT ...] --out DIR

Each INPUT is the --out folder of a tool, in the order they ran, or a manifest. DIR receives `report.html`, one file
that fetches nothing: rows, seconds of video and rejects of each stage; clips with captions and scores, evenly spread
over the last manifest; a histogram of each column of numbers (behind it, where a stage is a filter's, the rows before
that), counts of each column of few values; captions' lengths, words and flags; groups of near-duplicates; a filter's
rules; rejects by reason. Tables are read in batches, so memory does not grow with them. `DIR/pictures` keeps the
pictures that were made, so that a second run makes only what is new.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from opensora_repro.data.jobs.run import Runner, RunnerArguments, runner_of
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.progress import progress
from opensora_repro.errors import check_least, run_command
from opensora_repro.storage.addresses import is_address, relative, within

if TYPE_CHECKING:
    from opensora_repro.data.report.page import Report
    from opensora_repro.data.report.rows import Groups
    from opensora_repro.data.report.stages import ToolOutcome
    from opensora_repro.data.tables import Table

CLIPS = 48
GROUPED = ("duplicate_group", "caption_flag")  # columns whose values are told with some of their rows
DUPLICATE_GROUPS, DUPLICATES = 8, 4
FLAGS, FLAGGED = 8, 5
CAPTIONS_READ = 50_000
WORDS_SHOWN = 60
CLIP_COLUMNS = ("id", "path", "caption", "caption_flag", "num_frames", "fps", "height", "width")
NO_SCORES = ("file_size", "coded_height", "coded_width", "rotation", "duration")  # numbers, but of the file


@dataclass(frozen=True, kw_only=True)
class Arguments(RunnerArguments):
    """What the command line says."""

    inputs: list[str] = argument(
        "a tool's --out folder, or a manifest; in order", type=any_path, nargs="+", metavar="INPUT"
    )
    out: str = option("folder for report.html", type=any_path, metavar="DIR")
    clips: int = option("clips to show; 0: no pictures (%(default)s)", CLIPS, metavar="N")


build_parser = partial(parser_of, Arguments, "data_tools.report", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(lambda: run(args))


def check(args: Arguments) -> None:
    """Raise UserError for options that cannot work, before any input is looked at."""
    check_least(args, "clips", least=0)
    runner_of(args)


def run(args: Arguments) -> int:
    check(args)
    return report(args.inputs, Path(args.out), args.clips, runner_of(args))


def report(inputs: Sequence[str], out: Path, clips: int, runner: Runner) -> int:
    """Write the page; returns the exit status. Raises DataError."""
    from opensora_repro.data.report.page import page
    from opensora_repro.data.report.stages import find_stages
    from opensora_repro.files import one_line, write_text

    stages = find_stages(inputs)
    told = gather(stages, clips)
    last = last_of(stages)
    if last and last.manifest:
        told.strips["clips"] = strips_of(told.clips, last, out, runner)
        told.links = {row["path"]: link(within(last.folder, row["path"]), out) for row in told.clips if row.get("path")}
    if told.duplicates and clips:
        members = [row for group in told.duplicates.largest for row in group.rows]
        stage = next(stage for stage in stages if stage.manifest is first_with(stages, GROUPED[0]))
        told.strips["duplicates"] = strips_of(members, stage, out, runner)
    path = out / "report.html"
    write_text(path, page(told))
    rows, rejected = told.stages[-1][1].rows, sum(counts.rejected for _, counts in told.stages)
    several = "s" if len(stages) > 1 else ""
    print(f"{len(stages)} stage{several}, {rows:,} rows, {rejected:,} rejected: {one_line(path)}")
    return 0


def gather(stages: Sequence[ToolOutcome], clips: int) -> Report:
    """Read all tables; return what the page tells, but for the pictures."""
    from opensora_repro.data.report.page import Report
    from opensora_repro.data.report.rows import rows_at, spread
    from opensora_repro.data.report.stages import count_sources, count_stage
    from opensora_repro.data.report.summary import Summary, frequent_words, summarize

    last, before = last_of(stages), before_filter(stages)
    with progress("reading", rows_to_read(stages), "row") as advance:
        counted = [(stage.name, count_stage(stage, advance)) for stage in stages]
        told = Report(
            counted, {stage.name: stage.rules for stage in stages if stage.rules}, Summary(),
            last.name if last else "", before.name if before else "", [], [], [], 0,
        )  # fmt: skip
        if last and last.manifest:
            table = last.manifest
            told.columns = summarize(table, advance, before.manifest if before else None)
            told.scores = scores_of(table)
            columns = [n for n in (*CLIP_COLUMNS, *told.scores) if n in table.schema.names]
            told.clips = rows_at(table, spread(table.num_rows, clips), columns) if clips and columns else []
            if "caption" in table.schema.names:
                sampled = rows_at(table, spread(table.num_rows, CAPTIONS_READ), ["caption"])
                told.words = frequent_words((str(row["caption"] or "") for row in sampled), WORDS_SHOWN)
                told.words_of = len(sampled)
        told.sources = count_sources(stages, last, advance)
        told.duplicates = groups(stages, GROUPED[0], advance, DUPLICATE_GROUPS, DUPLICATES)
        told.flags = groups(stages, GROUPED[1], advance, FLAGS, FLAGGED)
    return told


def last_of(stages: Sequence[ToolOutcome]) -> ToolOutcome | None:
    """Return the last stage that has rows."""
    return next((stage for stage in reversed(stages) if stage.manifest), None)


def before_filter(stages: Sequence[ToolOutcome]) -> ToolOutcome | None:
    """Return the stage before the first filter: the rows that the last stage's are to be seen against."""
    at = next((number for number, stage in enumerate(stages) if stage.rules and number > 0), 0)
    return stages[at - 1] if at and stages[at - 1].manifest else None


def first_with(stages: Sequence[ToolOutcome], column: str) -> Table | None:
    """Return the first manifest that has the column: later ones may have dropped what it tells of."""
    return next((s.manifest for s in stages if s.manifest and column in s.manifest.schema.names), None)


def groups(
    stages: Sequence[ToolOutcome], column: str, advance: Callable[[int], None], count: int, members: int
) -> Groups | None:
    from opensora_repro.data.report.rows import find_groups

    table = first_with(stages, column)
    if table is None:
        return None
    columns = [name for name in CLIP_COLUMNS if name in table.schema.names]
    return find_groups(table, column, columns, advance, count=count, members=members)


def rows_to_read(stages: Sequence[ToolOutcome]) -> int:
    """Return about how many rows all passes read, for the progress."""
    tables = [table for stage in stages for table in (stage.manifest, stage.rejects) if table]
    last, before = last_of(stages), before_filter(stages)
    again = [stage.manifest for stage in (last, last, last, before, before) if stage and stage.manifest]
    again += [stage.rejects for stage in stages if stage.rejects]
    for column in GROUPED:
        if found := first_with(stages, column):
            again += [found, found]
    return sum(table.num_rows for table in [*tables, *again])


def scores_of(table: Table) -> list[str]:
    """Return the columns of numbers that were measured on the clips."""
    from opensora_repro.data.manifest import LINEAGE, MANIFEST
    from opensora_repro.data.report.summary import number_columns

    return [
        name for name in number_columns(table.schema)
        if name in table.schema.names and name not in (*MANIFEST, *LINEAGE, *NO_SCORES)
    ]  # fmt: skip


def link(path: Path, out: Path) -> str:
    """Return the address of a file for a page in `out`: always a path, whatever the file is called."""
    way = relative(path.absolute(), out.absolute())
    return quote(way, safe="/:" if is_address(way) else "/", errors="surrogateescape")


def strips_of(rows: Sequence[dict[str, Any]], stage: ToolOutcome, out: Path, runner: Runner) -> dict[str, Any]:
    from opensora_repro.data.report.thumbnails import read_strips

    return read_strips(rows, stage.folder.absolute(), out, runner)


if __name__ == "__main__":
    sys.exit(main())
