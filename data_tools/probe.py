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

import argparse
import sys
from os.path import expanduser
from pathlib import Path

from opensora_repro.data.jobs.run import add_runner_options, runner_of
from opensora_repro.data.probe.rows import probe_all
from opensora_repro.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_command(
        lambda: probe_all(args.input, Path(args.out), runner_of(args), decode=args.decode, images=args.images)
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data_tools.probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "input", type=expanduser, help="a video, folder, glob pattern or table (put -- before a leading dash)"
    )
    parser.add_argument(
        "--out", type=expanduser, required=True, metavar="DIR", help="folder for manifest.parquet and rejects.parquet"
    )
    parser.add_argument("--decode", action="store_true", help="also decode every frame")
    parser.add_argument("--images", action="store_true", help="take the pictures of a folder, too")
    add_runner_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
