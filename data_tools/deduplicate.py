"""Drop the clips of a manifest of any length that are near to a better one, by their embeddings.

    python -m data_tools.deduplicate INPUT --embeddings EMBEDDINGS.parquet --out DIR [--cosine .95]

INPUT is a manifest. EMBEDDINGS holds `id` and `embedding`, lists of numbers of one length, for clips of INPUT and maybe
others: `score --embed` and `score --clip` write it as embeddings.parquet. Of two clips whose embeddings have at least
that cosine, the larger stays, then the longer, then the first. More than 20,000 clips are compared within clusters
(SemDeDup), all of what a cluster holds; without faiss (`pip install faiss-cpu`) all are compared with each other.

DIR receives `manifest.parquet`, `deduplicate.json` with the counts, and `rejects.parquet`: each dropped clip with
`duplicate_of`, the best clip that is near to it, their `cosine`, and `kept`, the clip that stays for both. Clips
without an embedding stay, and are counted. Memory holds a few numbers a clip; the embeddings lie in a file of DIR
meanwhile.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora_repro.data.jobs.run import Runner
from opensora_repro.data.options import any_path, argument, option, parse, parser_of
from opensora_repro.data.origin import made_by
from opensora_repro.data.probe.rows import INPUT_HELP, manifest_of
from opensora_repro.errors import DataError, run_command


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    input: str = argument(INPUT_HELP, type=any_path)
    embeddings: str = option(
        "Parquet table with the columns id and embedding, such as score's embeddings.parquet",
        type=any_path,
        metavar="FILE",
    )
    out: str = option("folder for manifest.parquet and what was dropped", type=any_path, metavar="DIR")
    cosine: float = option(
        "embeddings that are at least so near are of near-duplicates (%(default)s)", 0.95, metavar="X"
    )


build_parser = partial(parser_of, Arguments, "data_tools.deduplicate", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(made_by("deduplicate", args)(lambda: deduplicate(args)))


def check(args: Arguments) -> None:
    """Raise DataError for options that cannot work, before any input is looked at."""
    if not 0 < args.cosine <= 1:
        raise DataError(f"--cosine {args.cosine}: expected more than 0 and at most 1")


def deduplicate(args: Arguments) -> int:
    """Write the kept rows, the rejects and the report; returns the exit status."""
    from opensora_repro.data.deduplicate.drops import find_drops, read_ranks, write_rows_of
    from opensora_repro.data.tables import open_table
    from opensora_repro.files import one_line, write_text
    from opensora_repro.process import limit_threads

    check(args)
    limit_threads()
    out = Path(args.out)
    table = open_table(manifest_of(args.input, out, Runner()))
    ids, ranks = read_ranks(table)
    drops, counts = find_drops(Path(args.embeddings), ids, ranks, args.cosine, out)
    write_rows_of(table, ids, drops, out)
    write_text(out / "deduplicate.json", json.dumps({**counts, "cosine": args.cosine}, indent=2) + "\n")
    if counts["without_embedding"]:
        print(f"{counts['without_embedding']:,} clips have no embedding, or one of zeros or NaN: they stay, uncompared")
    dropped, groups = counts["dropped"], counts["groups"]
    print(f"near-duplicates: {dropped:,} clips drop for {groups:,} that stay", end="")
    print(f", up to {counts['largest']:,} for one;", end=" ")
    print(f"{counts['rows'] - dropped:,} of {counts['rows']:,} rows kept: {one_line(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
