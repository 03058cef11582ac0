"""Run a whole line of dataset tools, as one file describes it, and show what came out on one page.

    python -m data_tools.pipeline CONFIG.toml [--out DIR] [section.key=value ...] [--dry-run]

CONFIG.toml names `input`, `out` and a section for each tool, in the order they run; configs/data/pipeline.toml is a
complete one. The keys of a section are the tool's long options, with _ for -. [run] holds workers, runner and address
for all of them. Paths are relative to the folder the command is given in, as on the tools' own command lines.

Each tool works in OUT/SECTION on the manifest of the one before. At the end there are `OUT/manifest.parquet`,
`OUT/rejects.parquet` (of all tools) and `OUT/report.html`. The same command again does only what is left to do: new
input files, a section whose options or files changed, and what follows from it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from data_tools import report
from opensora_repro.data.options import any_path, argument, local_path, option, parse, parser_of
from opensora_repro.data.origin import Maker, making
from opensora_repro.data.pipeline.config import Line, Step, load_line
from opensora_repro.errors import INTERRUPTED, DataError, UserError, run_command
from opensora_repro.files import is_file, one_line, remove_leftovers
from opensora_repro.storage.addresses import address_of

if TYPE_CHECKING:
    from opensora_repro.data.report.stages import ToolOutcome

URLS_FILE = "urls.parquet"  # what convert makes of tables of addresses, for download
TOOLS = ("convert", "download", "probe", "split", "score", "filter", "deduplicate", "caption")
Place = tuple[Step, "str | Path", Path]  # a step, what it reads, and the folder it writes to


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    config: str = argument("the line of tools", type=local_path, metavar="CONFIG.toml")
    overrides: list[str] = argument("changes to the config", nargs="*", metavar="section.key=value")
    out: str | None = option(
        "folder for everything that is made, instead of the config's", None, type=any_path, metavar="DIR"
    )
    dry_run: bool = option("check the config, print the commands, then stop", False)


build_parser = partial(parser_of, Arguments, "data_tools.pipeline", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status: of the first tool that failed, if one did."""
    args = Arguments(**vars(build_parser().parse_intermixed_args(argv)))
    return run_command(lambda: pipeline(args))


def pipeline(args: Arguments) -> int:
    """Check the config, then run what is not done yet; returns the exit status. Raises DataError."""
    tools = find_tools()
    known = {name: tool.Arguments for name, tool in tools.items()}
    line = load_line(args.config, args.overrides, known, report.Arguments, out=args.out)
    for step in line.steps:
        check_step(args.config, step, tools[step.tool])
    check_step(args.config, line.report, report)
    check_places(line)
    return show(line) if args.dry_run else run(line, tools)


def find_tools() -> dict[str, ModuleType]:
    """Return the tools that can stand in a line, by name."""
    return {name: importlib.import_module(f"data_tools.{name}") for name in TOOLS}


def check_step(config: str, step: Step, tool: ModuleType) -> None:
    """Let the tool look at its options: what it requires, and what goes together. Raises DataError."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            parsed = parse(tool.Arguments, tool.build_parser(), command_of(step, "input", Path("out")))
        if hasattr(tool, "check"):
            tool.check(parsed)
    except SystemExit:
        reason = told.getvalue().strip().rpartition("error: ")[2]
        raise DataError(f"{config}: [{step.name}]: {one_line(reason)}") from None
    except UserError as error:
        raise DataError(f"{config}: [{step.name}]: {error}") from None


def check_places(line: Line) -> None:
    """Raise DataError where OUT is INPUT or lies in it, so that the next run would take clips for inputs."""
    source, out = Path(line.input), Path(line.out)
    folder = source.is_dir() or address_of(source)
    if folder and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"out = {one_line(out)}: lies in the input folder {one_line(source)}; choose one outside of it")


def command_of(step: Step, given: str | Path, folder: Path) -> list[str]:
    return [*step.options, *step.runner, f"--out={folder}", "--", str(given)]


def places(line: Line) -> list[Place]:
    """Return for each step what it reads and the folder it writes to."""
    from opensora_repro.data.report.stages import MANIFEST_FILE

    folders = [Path(line.out) / step.name for step in line.steps]
    inputs: list[str | Path] = [line.input]
    for (before, after), folder in zip(pairwise(line.steps), folders, strict=False):
        fetched = (before.tool, after.tool) == ("convert", "download")
        inputs.append(folder / (URLS_FILE if fetched else MANIFEST_FILE))
    return list(zip(line.steps, inputs, folders, strict=True))


def show(line: Line) -> int:
    """Print the commands and what is done already; returns the exit status."""
    from opensora_repro.data.pipeline.record import is_done

    fresh = True
    for number, (step, given, folder) in enumerate(places(line)):
        fresh = fresh and is_done(folder, step.tool, step.options, Path(given))
        state = "done" if fresh else "to do"
        if number == 0:
            state = "looks for new input" if fresh else "to do"
        print(f"{state}: python -m data_tools.{step.tool} {one_line(shlex.join(command_of(step, given, folder)))}")
    print(f"then: {one_line(Path(line.out) / 'manifest.parquet')}, rejects.parquet and report.html")
    return 0


def run(line: Line, tools: dict[str, ModuleType]) -> int:
    """Run the steps in order, then write the line's own tables and the page; returns the exit status."""
    from opensora_repro.data.pipeline.record import forget, is_done, record_done

    out, steps, planned_to = Path(line.out), places(line), 0
    for number, (step, given, folder) in enumerate(steps):
        title = f"[{number + 1}/{len(steps)}] {step.name}"
        if number and not is_file(Path(given)):
            raise DataError(f"[{step.name}]: the step before left no {Path(given).name}, which this one reads")
        # The first looks at its input every time: there may be new files.
        fresh = is_done(folder, step.tool, step.options, Path(given))
        if number and fresh:
            print(f"{title}: done before", flush=True)
            continue
        print(title, flush=True)
        if not fresh:
            forget(folder)
        if number >= planned_to:
            length, status = run_line(steps[number:], tools)
            planned_to = number + length
            if status:
                return failed(line, number, status, last=planned_to - 1)
        status = tools[step.tool].main(command_of(step, given, folder))
        remove_leftovers(folder)  # of runs that were killed
        if status:
            return failed(line, number, status)
        record_done(folder, step.tool, step.options, Path(given))
    return finish(line, out)


def run_line(steps: Sequence[Place], tools: dict[str, ModuleType]) -> tuple[int, int]:
    """Do what the first of these steps and those after it can do row by row, as one plan.

    When their turns come, the tools find it done. Returns how many steps the plan had, and the exit status.
    """
    from opensora_repro.data.jobs.line import run_steps
    from opensora_repro.data.jobs.run import runner_of
    from opensora_repro.data.pipeline.record import forget, is_done

    def work() -> int:
        plan = plan_of(steps, tools)
        if not plan.is_worth_it:
            return 0
        done = [is_done(folder, step.tool, step.options, Path(given)) for step, given, folder in steps[: plan.length]]
        for (_, _, folder), fresh in zip(steps, done, strict=False):
            if not fresh:
                forget(folder)
        jobs = tools[steps[0][0].tool].first_jobs(plan.first)
        planned.append(plan.length)
        run_steps(plan.steps, jobs, runner_of(plan.first), known_too=not all(done[1:]), then=plan.waits)
        return 0

    planned = list[int]()
    status = run_command(work)
    return sum(planned), status


@dataclass
class Plan:
    """Steps of a line that go row by row: of how many tools; the first one's options; what waits for all rows."""

    first: Any = None
    steps: list[Any] = field(default_factory=list)
    length: int = 0
    waits: str = ""

    @property
    def is_worth_it(self) -> bool:
        return sum(hasattr(step, "kind") for step in self.steps) > 1


def plan_of(steps: Sequence[Place], tools: dict[str, ModuleType]) -> Plan:
    """Return what the first of these steps and those after it can do row by row."""
    from opensora_repro.data.jobs.run import runner_of
    from opensora_repro.data.jobs.steps import NeedsAllRows

    plan = Plan()
    for step, given, folder in steps:
        tool = tools[step.tool]
        if not hasattr(tool, "first_jobs" if not plan.length else "steps_of"):
            break
        args = parse(tool.Arguments, tool.build_parser(), command_of(step, given, folder))
        if plan.length and hasattr(args, "runner") and runner_of(args) != runner_of(plan.first):
            break
        try:
            plan.steps += tool.steps_of(args, dict(plan.steps[-1].columns) if plan.steps else {})
        except NeedsAllRows as error:
            plan.waits = str(error)
            break
        plan.first, plan.length = plan.first or args, plan.length + 1
    return plan


def failed(line: Line, number: int, status: int, last: int = 0) -> int:
    """Say which step failed, or which up to the `last` were one plan, and show on the page how far the line came.

    Returns the exit status.
    """
    if status == INTERRUPTED:  # the tool has said so
        return status
    step, out = line.steps[number], Path(line.out)
    stale = "; the manifest there is an earlier run's" if is_file(out / "manifest.parquet") else ""
    name = f"{step.name} to {line.steps[last].name}" if last > number else step.name
    print(f"error: [{name}] failed (exit status {status}); the same command goes on there{stale}", file=sys.stderr)
    with contextlib.suppress(DataError):  # nothing to show yet
        stages = stages_of(replace(line, steps=line.steps[: number + 1]), out)
        # Where it left rows, they are an earlier run's.
        write_report(line, [s for s in stages if s.folder != out / step.name or not s.manifest], out)
    return status


def finish(line: Line, out: Path) -> int:
    """Write manifest, rejects and page, print what came out; returns the exit status."""
    from opensora_repro.data.pipeline.record import write_manifest_of, write_rejects_of

    stages = stages_of(line, out)
    with_rows = [stage for stage in stages if stage.manifest]
    if not with_rows:
        raise DataError(f"{one_line(line.input)}: no row came out; {one_line(out)} holds what each tool rejected")
    rejected = write_rejects_of(stages, out / "rejects.parquet")
    last = with_rows[-1]
    with making(Maker("pipeline", {}, str(last.folder / "manifest.parquet"), out)):
        rows = write_manifest_of(last, out / "manifest.parquet")
    write_report(line, stages, out)
    remove_leftovers(out)
    summarize(stages)
    table, refused = one_line(out / "manifest.parquet"), one_line(out / "rejects.parquet")
    print(f"{rows:,} rows: {table};  {rejected:,} rejected: {refused}")
    return 0


def stages_of(line: Line, out: Path) -> list[ToolOutcome]:
    """Return the steps' outcomes; one that writes no manifest is left out."""
    from opensora_repro.data.report.stages import MANIFEST_FILE, REJECTS_FILE, find_stages

    folders = [out / step.name for step in line.steps]
    left = [f for f in folders if is_file(f / MANIFEST_FILE) or is_file(f / REJECTS_FILE)]
    if not left:
        raise DataError(f"{one_line(out)}: no step left a table")
    return find_stages([str(folder) for folder in left])


def write_report(line: Line, stages: Sequence[ToolOutcome], out: Path) -> None:
    from opensora_repro.data.jobs.run import runner_of

    inputs = [str(stage.folder) for stage in stages]
    if not inputs:
        raise DataError(f"{one_line(out)}: no step left a table")
    options = [*line.report.options, *line.report.runner, f"--out={out}", "--", *inputs]
    args = parse(report.Arguments, report.build_parser(), options)
    report.report(args.inputs, out, args.clips, runner_of(args))


def summarize(stages: Sequence[ToolOutcome]) -> None:
    print(f"{'rows':>12} {'rejected':>10}  stage")
    for stage in stages:
        rows, rejected = (table.num_rows if table else 0 for table in (stage.manifest, stage.rejects))
        print(f"{rows:>12,} {rejected:>10,}  {stage.name}")


if __name__ == "__main__":
    sys.exit(main())
