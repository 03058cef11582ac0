"""One page about runs: curves, samples over time, evaluation, alarms, data, weights' origin, cost, what differs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.errors import check_least, run_command
from opensora_repro.files import read_json, user_path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.report",
        description=__doc__,
        epilog="The page is one file that fetches nothing. Every run writes its own, RUN/report.html, as it trains.",
    )
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="a run's folder; several are compared")
    add("--out", type=user_path, metavar="DIR", help="folder for report.html (default: that of the only RUN)")
    add(
        "--evaluation", nargs="+", type=user_path, default=[], metavar="FILE",
        help="evaluation.json of stages.evaluate, besides those that lie in the runs",
    )  # fmt: skip
    add("--price-per-gpu-hour", type=float, metavar="PRICE", help="in any currency, to tell costs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args), kept="")


def run(args: argparse.Namespace) -> int:
    price, out = args.price_per_gpu_hour, args.out
    check_least(args, "price_per_gpu_hour", least=0)
    if out is None and len(args.runs) > 1:
        raise ConfigError("--out: name a folder for the page of several runs")
    from opensora_repro.report.page import write_report
    from opensora_repro.run_folder import REPORT_FILE

    for path in args.evaluation:
        if not read_json(path).get("checkpoints"):
            raise ConfigError(f"--evaluation {path}: no evaluation.json of stages.evaluate")
    page: Path = (out or args.runs[0]) / REPORT_FILE
    write_report(args.runs, page, evaluations=args.evaluation, price=price)
    print(f"{len(args.runs)} run{'s' if len(args.runs) > 1 else ''}: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
