"""Keep the clips of a manifest that pass rules over its columns, and tell what each rule dropped.

    python -m data_tools.filter INPUT --out DIR --keep "motion > 0.5 and not duplicate" --percentile "motion <= 99%"

INPUT is a manifest, or any table with an `id`; a folder, a file or a pattern is probed first. A rule is an expression
over the columns: comparisons, `and`, `or`, `not`, `in ('a', 'b')`, + - * /, numbers, text in quotes, True, False, and
abs(x), len(text), lower(text), contains(text, "part"), startswith, endswith, missing(x), and column("name") for names
that are no words. `duration` is there in seconds even where the manifest has no such column. A row for which a rule
cannot tell, because a value is missing, is dropped: add `or missing(x)` to keep it. Parts joined by `and` are counted
one by one. A percentile is taken over all rows of the manifest, whatever the other rules drop; of fewer than 50 rows it
drops none.

DIR receives `manifest.parquet`, `rejects.parquet` (the reason is the first rule that dropped the row) and
`filter.json`: rows dropped by each rule alone and in order. `thumbnails/` shows for each numeric threshold the clips
just below and just above it. Rows are read in batches, so memory does not grow with the manifest; the result of a
second run is the same file, left untouched.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.data.progress import progress
from opensora_repro.errors import DataError, run_command
from opensora_repro.files import one_line

if TYPE_CHECKING:
    import numpy as np

    from opensora_repro.data.filter.step import FilterStep
    from opensora_repro.data.filter.thresholds import Nearest
    from opensora_repro.data.tables import Table, Value

PERCENTILE_ROWS = 50  # of fewer, a few per cent are a clip or none
PERCENTILE = re.compile(r"(?P<value>.+?)\s*(?P<op>>=|<=|>|<)\s*(?P<percent>\d+(\.\d*)?|\.\d+)\s*%", re.DOTALL)


@dataclass
class Rule:
    """A condition, what it compares with which number (where it is of that form), and what it did."""

    text: str
    check: Value
    measured: Value | None = None
    threshold: float | None = None
    percent: float | None = None
    dropped_alone: int = 0
    dropped_in_order: int = 0
    missing: int = 0  # of those dropped alone, the rows for which the rule could not tell
    nearest: Nearest | None = field(default=None, repr=False)

    def report(self) -> dict[str, Any]:
        shown = {"rule": self.text, "threshold": self.threshold, "percentile": self.percent}
        counts = {
            "dropped_alone": self.dropped_alone,
            "dropped_in_order": self.dropped_in_order,
            "missing": self.missing,
        }
        return {name: value for name, value in shown.items() if value is not None} | counts


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    input: str = argument(INPUT_HELP, type=any_path)
    out: str = option("folder for manifest.parquet and what was dropped", type=any_path, metavar="DIR")
    keep: str = option(
        'keep rows for which this holds, such as "motion > 0.5 and duration >= 2"; may be given again',
        argparse.SUPPRESS,
        dest="rules",
        action="append",
        type=lambda text: ("keep", text),
        metavar="RULE",
    )
    percentile: str = option(
        'keep rows on one side of a percentile, such as "sharpness >= 10%%"; may be given again',
        argparse.SUPPRESS,
        dest="rules",
        action="append",
        type=lambda text: ("percentile", text),
        metavar="RULE",
    )
    rules: list[tuple[str, str]] = field(default_factory=list)  # of both kinds, in the order given
    thumbnails: int = option("clips to show on each side of a numeric threshold; 0: none (%(default)s)", 6, metavar="N")


build_parser = partial(parser_of, Arguments, "data_tools.filter", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(
        made_by("filter", args)(lambda: filter_rows(args.input, Path(args.out), args.rules, thumbnails=args.thumbnails))
    )


def check(args: Arguments) -> None:
    """Raise DataError for options that cannot work, before any input is looked at."""
    check_options(args.rules, args.thumbnails)


def check_options(rules: list[tuple[str, str]], thumbnails: int) -> None:
    from opensora_repro.data.filter.expressions import split_conjunction

    if not rules:
        raise DataError("no rule given: add --keep RULE or --percentile RULE")
    if thumbnails < 0:
        raise DataError(f"--thumbnails {thumbnails}: expected 0 or more")
    for kind, text in rules:
        if kind == "percentile":
            percentile_parts(text)
        else:
            split_conjunction(text)


def filter_rows(given: str, out: Path, rules: list[tuple[str, str]], *, thumbnails: int = 0) -> int:
    """Write the kept rows, the rejects and the report; returns the exit status. `rules` are (kind, text) in order."""
    from opensora_repro.data.filter.thresholds import Nearest
    from opensora_repro.data.tables import open_table

    check_options(rules, thumbnails)
    manifest = manifest_of(given, out, Runner(), required_columns=("id",))
    table = open_table(manifest)
    if "id" not in table.schema.names:
        raise DataError(f"{manifest}: column id missing")
    compiled = [rule for kind, text in rules for rule in build_rules(kind, text, table)]
    if table.num_rows < PERCENTILE_ROWS:
        skipped = ", ".join(rule.text for rule in compiled if rule.percent is not None)
        compiled = [rule for rule in compiled if rule.percent is None]
        if skipped:
            print(f"{table.num_rows} rows are too few for a percentile ({PERCENTILE_ROWS}): nothing drops by {skipped}")
    for rule in compiled:
        if thumbnails and rule.threshold is not None and "path" in table.schema.names:
            rule.nearest = Nearest(rule.threshold, 3 * thumbnails)  # some may be unreadable
    rows, kept = apply_rules(table, compiled, out)
    write_report(out, compiled, rows, kept)
    if thumbnails:
        write_thumbnails(out / "thumbnails", compiled, manifest.absolute().parent, thumbnails)
    if not kept:
        raise DataError(f"{manifest}: no row passed the rules; {out / 'filter.json'} tells what each dropped")
    return 0


def build_rules(kind: str, text: str, table: Table) -> list[Rule]:
    """Compile one option's text; a percentile reads its column here. Raises DataError."""
    from opensora_repro.data.filter.expressions import compile_expression, split_conjunction, threshold_of
    from opensora_repro.data.tables import NUMBER, TRUTH

    if kind == "percentile":
        return [percentile_rule(text, table)]
    rules = []
    for part in split_conjunction(text):
        check = compile_expression(part, table.schema)
        if check.kind != TRUTH:
            raise DataError(f"{part!r}: is {check.kind}, a rule must be true or false for each row")
        if not check.columns:
            raise DataError(f"{part!r}: names no column")
        rule = Rule(part, check)
        if found := threshold_of(part):
            value = compile_expression(found[0], table.schema)
            if value.kind == NUMBER:
                rule.measured, rule.threshold = value, found[1]
        rules.append(rule)
    return rules


def percentile_parts(text: str) -> re.Match[str]:
    """Take "sharpness >= 10%" apart: value, op, percent. Raises DataError."""
    match = PERCENTILE.fullmatch(text.strip())
    if not match or float(match["percent"]) > 100:
        raise DataError(f'--percentile {text!r}: expected a column, <, <=, > or >=, and a percentage: "motion >= 10%"')
    return match


def percentile_rule(text: str, table: Table) -> Rule:
    """Turn "sharpness >= 10%" into a comparison with the tenth percentile of the whole column."""
    from opensora_repro.data.filter.expressions import compile_expression
    from opensora_repro.data.filter.thresholds import percentile
    from opensora_repro.data.tables import NUMBER

    match = percentile_parts(text)
    value = compile_expression(match["value"], table.schema)
    if value.kind != NUMBER or not value.columns:
        raise DataError(f"--percentile {text!r}: {match['value']} is {value.kind}, expected a column of numbers")

    def chunks() -> Iterator[np.ndarray]:
        for batch in table.batches(sorted(value.columns)):
            yield value.array(batch).to_numpy(zero_copy_only=False)

    threshold = percentile(chunks, float(match["percent"]))
    if threshold is None or not math.isfinite(threshold):
        raise DataError(f"--percentile {text!r}: {'all values are missing' if threshold is None else 'is infinite'}")
    check = compile_expression(f"({match['value']}) {match['op']} {threshold!r}", table.schema)
    return Rule(text.strip(), check, value, threshold, float(match["percent"]))


def apply_rules(table: Table, rules: list[Rule], out: Path) -> tuple[int, int]:
    """Read the rows once, write each to the manifest or to the rejects, and count; returns (rows, kept)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from opensora_repro.data.manifest import Rebase
    from opensora_repro.data.tables import table_writer

    rebase = Rebase(table.path.absolute().parent, out.absolute())
    told = [name for name in ("id", "path", "source") if name in table.schema.names]
    rejects = pa.schema([(name, pa.string()) for name in (*told, "stage", "reason")])
    reasons = pa.array([rule.text for rule in rules], pa.string())
    kept = 0
    with (
        table_writer(out / "manifest.parquet", table.schema) as write_kept,
        table_writer(out / "rejects.parquet", rejects) as write_reject,
        progress("filtering", table.num_rows, "row") as advance,
    ):
        for batch in table.batches():
            first = first_failures(rules, batch)
            good = pc.is_null(first)
            passed = rebase(batch.filter(good))
            kept += passed.num_rows
            write_kept(passed)
            bad = pc.invert(good)
            dropped = rebase(batch.filter(bad))
            columns = [dropped.column(name).cast(pa.string()) for name in told]
            stages = pa.repeat(pa.scalar("filter"), dropped.num_rows)
            why = reasons.take(first.filter(bad))
            write_reject(pa.RecordBatch.from_arrays([*columns, stages, why], schema=rejects))
            advance(batch.num_rows)
    return table.num_rows, kept


def first_failures(rules: list[Rule], batch: Any) -> Any:
    """Return for each row the number of the first rule that drops it, null where none does; count as we go."""
    import numpy as np
    import pyarrow as pa

    first = np.full(batch.num_rows, len(rules), dtype=np.int32)
    for number, rule in enumerate(rules):
        truth = rule.check.array(batch)
        rule.missing += truth.null_count
        fails = ~truth.fill_null(False).to_numpy(zero_copy_only=False)
        new = fails & (first == len(rules))
        first[new] = number
        rule.dropped_alone += int(fails.sum())
        rule.dropped_in_order += int(new.sum())
        if rule.nearest is not None and rule.measured is not None:
            rule.nearest.add(rule.measured.array(batch).to_numpy(zero_copy_only=False), batch)
    return pa.array(first, mask=first == len(rules))


def write_report(out: Path, rules: list[Rule], rows: int, kept: int) -> None:
    """Write filter.json and print the same as a table."""
    from opensora_repro.files import write_text

    report = {"rows": rows, "kept": kept, "dropped": rows - kept, "rules": [rule.report() for rule in rules]}
    write_text(out / "filter.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(f"{'dropped alone':>14} {'in order':>12} {'missing':>10}  rule")
    for rule in rules:
        shown = f"  ({rule.threshold:.6g})" if rule.percent is not None and rule.threshold is not None else ""
        print(
            f"{rule.dropped_alone:>14,} {rule.dropped_in_order:>12,} {rule.missing:>10,}  {' '.join(rule.text.split())}"
            f"{shown}"
        )
    print(f"{kept:,} of {rows:,} rows kept: {one_line(out)}")


def write_thumbnails(folder: Path, rules: list[Rule], clips: Path, count: int) -> None:
    """Write one contact sheet a numeric threshold; where no clip can be read there is none."""
    from opensora_repro.data.filter.thresholds import contact_sheet, read_thumbnails
    from opensora_repro.data.write import write_png

    for old in folder.glob("*.png"):
        old.unlink()
    for number, rule in enumerate(rules, start=1):
        if rule.nearest is None:
            continue
        below, above = (read_thumbnails(side, clips, count) for side in rule.nearest.sides())
        if below or above:
            name = re.sub(r"[^A-Za-z0-9]+", "-", rule.text).strip("-")[:60]
            write_png(folder / f"{number:02d}-{name}.png", contact_sheet(rule.text, below, above))


def steps_of(args: Arguments, columns: Mapping[str, str]) -> list[FilterStep]:
    """Return this tool as a step of a line, see jobs/steps.py. Raises NeedsAllRows."""
    from opensora_repro.data.filter.step import filter_step

    return [filter_step(Path(args.out).name, args.rules, columns)]


if __name__ == "__main__":
    sys.exit(main())
