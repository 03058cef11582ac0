"""What it takes to make clips of so many hours of footage: core hours of each tool, time on a cluster, cost.

    python -m data_tools.plan HOURS [--footage 720p] [--cores N] [--price-per-core-hour X]
                              [--gpu-seconds S --gpus N --price-per-gpu-hour Y] [--measured FILE.json]

Rates are what `python -m benchmarks.curation` measured: run it on a node of yours, with a video of yours (`--video`),
and name its JSON here; by default it is the one in benchmarks/results/. Models (captions, embeddings) are in no rate:
--gpu-seconds is what a clip takes of a GPU: time `data_tools.caption` on some hundred of yours.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opensora_repro.data.options import argument, local_path, option, parse, parser_of
from opensora_repro.errors import DataError, check_least, run_command

MEASURED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "curation.json"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    hours: float = argument("hours of footage", type=float)
    footage: str = option("which of the measured kinds it is like (%(default)s)", "720p", metavar="NAME")
    cores: int = option("cores that work at a time (%(default)s)", 64, metavar="N")
    used: float = option("share of the time that they work (%(default)s)", 0.9, metavar="X")
    gpu_seconds: float = option("seconds of a GPU that models take for a clip (%(default)s)", 0.0, metavar="S")
    gpus: int = option("GPUs that work at a time (%(default)s)", 1, metavar="N")
    price_per_core_hour: float | None = option("adds the cost", None, metavar="X")
    price_per_gpu_hour: float | None = option("adds the cost of the models", None, metavar="X")
    measured: str | None = option(
        "what benchmarks.curation wrote (benchmarks/results/curation.json)", None, type=local_path, metavar="FILE"
    )


build_parser = partial(parser_of, Arguments, "data_tools.plan", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse(Arguments, build_parser(), argv)
    return run_command(lambda: plan(args), kept="")


def check(args: Arguments) -> None:
    """Raise UserError for options that cannot work."""
    check_least(args, "cores", "gpus")
    if not 0 <= args.hours < math.inf:
        raise DataError(f"HOURS {args.hours}: expected 0 or more")
    check_least(args, "gpu_seconds", "price_per_core_hour", "price_per_gpu_hour", least=0)
    if args.price_per_gpu_hour is not None and not args.gpu_seconds:
        raise DataError("--price-per-gpu-hour: expected --gpu-seconds with it, what a clip takes of a GPU")
    if not 0 < args.used <= 1:
        raise DataError(f"--used {args.used}: expected more than 0 and at most 1")


def plan(args: Arguments) -> int:
    """Print the plan; returns the exit status."""
    from opensora_repro.data.plan.rates import plan_curation, read_rates, told_plan

    check(args)
    rates = read_rates(Path(args.measured) if args.measured else MEASURED, args.footage)
    found = plan_curation(
        rates, args.hours, cores=args.cores, gpus=args.gpus, gpu_seconds=args.gpu_seconds, used=args.used,
        core_price=args.price_per_core_hour, gpu_price=args.price_per_gpu_hour,
    )  # fmt: skip
    print("\n".join(told_plan(rates, found, args.hours, cores=args.cores, gpus=args.gpus)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
