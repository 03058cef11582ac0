"""What a run will take: work, memory by part, the parallel layouts that fit, time and cost, and what sampling takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from os.path import expanduser
from typing import TYPE_CHECKING

from opensora_repro.config import Config, ConfigError, load_config
from opensora_repro.errors import check_least, run_command
from opensora_repro.files import user_path

if TYPE_CHECKING:
    from opensora_repro.planning.budget import Question

# Of the peak, by this planner's FLOPs: Open-Sora 1.0's published 28 thousand tokens a second on an H800 at 16x256x256,
# and the best that is public of trainings of such models.
PUBLISHED_UTILISATION, BEST_UTILISATION = 0.12, 0.33


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stages.plan",
        description=__doc__,
        epilog="Utilisation is model FLOPs over the GPU's peak; what checkpointing computes again does not count.",
    )
    add = parser.add_argument
    add("config", type=expanduser, metavar="CONFIG.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    add("--gpu", default="H100", metavar="NAME", help="kind of GPU, such as A100-40GB or 4090 (default: %(default)s)")
    add("--gpus", type=int, metavar="N", help="how many (default: as many as one sample needs)")
    add("--clips", type=int, metavar="N", help="training clips, to tell epochs")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--utilisation", type=float, metavar="SHARE",
        help=f"of the peak, 0 to 1; Open-Sora's published runs reached {PUBLISHED_UTILISATION}, "
        f"the best public ones {BEST_UTILISATION} (assumed)",
    )  # fmt: skip
    rate.add_argument(
        "--measured", type=user_path, metavar="PATH",
        help="take it from a run's folder, its metrics.jsonl or a benchmark's JSON, measured on the same kind of GPU",
    )  # fmt: skip
    add("--price-per-gpu-hour", type=float, metavar="PRICE", help="in any currency, to tell costs")
    add("--strides", metavar="T,H,W", help="frames, rows, columns a latent, of another autoencoder than vae.path")
    add("--json", action="store_true", help="print JSON: bytes, seconds, FLOPs")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args), kept="")


def run(args: argparse.Namespace) -> int:
    cfg = load_config(args.config, args.overrides)
    question = ask(args, cfg)
    from opensora_repro.data.buckets import buckets_of
    from opensora_repro.planning.budget import make_budget
    from opensora_repro.planning.report import as_json, plan_lines

    several, budget = len(buckets_of(cfg)), make_budget(cfg, question)
    if args.json:
        print(json.dumps(as_json(budget), indent=1))
    else:
        if several > 1:
            print(
                f"as if all steps were of the heaviest of {several} buckets, and memory of the one that needs the most;"
            )
            print("stages.buckets --plan tells of each\n")
        print("\n".join(plan_lines(cfg, budget)))
    return 0


def ask(args: argparse.Namespace, cfg: Config) -> Question:
    """Check the options. Raises UserError."""
    from opensora_repro.planning.budget import Question
    from opensora_repro.planning.gpus import find_gpu

    check_least(args, "gpus", "clips")
    check_least(args, "price_per_gpu_hour", least=0)
    strides = read_strides(args.strides) if args.strides else None
    gpu = find_gpu(args.gpu)
    gpu.peak(cfg.train.dtype)
    gpus = args.gpus or cfg.parallel.tp_size * cfg.parallel.sp_size
    utilisation = BEST_UTILISATION
    source = f"assumed, the best that is public; Open-Sora's own runs reached {PUBLISHED_UTILISATION:.0%}"
    if args.utilisation is not None:
        utilisation, source = args.utilisation, "given"
        if not 0 < utilisation <= 1:
            raise ConfigError(f"--utilisation {utilisation}: expected a share above 0, at most 1")
    elif args.measured is not None:
        from opensora_repro.planning.measured import measured_utilisation

        utilisation, source = measured_utilisation(args.measured, cfg, gpu)
    return Question(gpu, gpus, utilisation, source, args.clips, args.price_per_gpu_hour, strides)


def read_strides(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--strides {text!r}: expected three numbers of at least 1, such as 4,8,8")
    frames, rows, columns = map(int, parts)
    return frames, rows, columns


if __name__ == "__main__":
    sys.exit(main())
