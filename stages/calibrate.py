"""Measure on a run's own prompts how far a step cache may go, for `stages.sample --step-cache`.

The prompts are sampled in full, which tells how the change of the blocks' input foretells that of what they add; then
with thresholds on that, each of which is told with its speed-up and its PSNR to the full sampler's videos.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from opensora_repro.config.checks import SAMPLERS
from opensora_repro.errors import check_least, run_command
from opensora_repro.files import user_path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.calibrate", description=__doc__)
    add = parser.add_argument
    source = "folder of a run (its newest checkpoint), a checkpoint, or published weights (file, folder)"
    add("source", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    lines = "one prompt a line, as the model will be asked; a dozen are enough"
    add("--prompts", type=user_path, required=True, metavar="FILE", help=lines)
    add("--out", type=user_path, metavar="FILE", help="where to write (step_cache.json beside the checkpoint)")
    fastest = "take the fastest threshold with at least so much (%(default)g)"
    add("--psnr", type=float, default=30.0, metavar="DB", help=fastest)
    add("--seed", type=int, default=0, metavar="N", help="of the noise (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at once (%(default)s)")
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--no-ema", action="store_true", help="for the trained weights, not their moving average")
    add = parser.add_argument_group("by default as in the checkpoint's config, or its release's").add_argument
    add("--sampler", choices=SAMPLERS, help="(sample.sampler)")
    add("--steps", type=int, metavar="N", help="denoising steps (sample.steps)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance (sample.guidance)")
    add("--num-frames", type=int, metavar="N", help="(data.num_frames)")
    add("--height", type=int, metavar="N", help="pixels (data.height)")
    add("--width", type=int, metavar="N", help="pixels (data.width)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: run(args), kept="nothing is written before the end", less_memory="Lower --batch-size")


def run(args: argparse.Namespace) -> int:
    from opensora_repro.config.prompts import read_prompts

    check_least(args, "steps", "batch_size", "num_frames", "height", "width")
    return measure(args, read_prompts(args.prompts))


def measure(args: argparse.Namespace, prompts: list[str]) -> int:
    import json
    from dataclasses import replace

    from opensora_repro.files import write_text
    from opensora_repro.run_folder import check_file
    from opensora_repro.sampling.calibration import calibrate
    from opensora_repro.sampling.run import pick_device, with_options
    from opensora_repro.sampling.source import find_source
    from opensora_repro.sampling.speedups import CALIBRATION
    from opensora_repro.weights.catalog import here_or_published

    path = here_or_published(args.source)
    source = find_source(path, ema=not args.no_ema)
    names = ("sampler", "steps", "guidance", "num_frames", "height", "width")
    config = with_options(source.config, **{name: getattr(args, name) for name in names})
    out = args.out or (path if path.is_dir() else path.parent) / CALIBRATION
    check_file("--out", out)
    found = calibrate(
        replace(source, config=config), prompts, pick_device(args.device, 1, 0), seed=args.seed,
        batch_size=args.batch_size, least_psnr=args.psnr,
    )  # fmt: skip
    write_text(out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if not any(row["psnr"] >= args.psnr for row in found["thresholds"]):
        print(f"warning: no threshold keeps {args.psnr:g} dB, the smallest is taken", file=sys.stderr)
    print(f"threshold {found['threshold']:g} taken; written to {out}, which stages.sample --step-cache reads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
