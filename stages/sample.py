"""Sample videos (mp4) or, with one frame, images (png) from a trained run or from published weights.

Weights, autoencoder, text encoder and every default come from the checkpoint, or are the release's; `OUT/0000.mp4` is
the first prompt's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts, read_prompts
from opensora_repro.errors import GOES_ON, run_command
from opensora_repro.files import user_path

SIZES = (
    "steps", "guidance", "num_frames", "height", "width", "fps", "sampler", "vae", "vae_tile", "text", "dtype",
    "shard_text",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.sample", description=__doc__)
    add = parser.add_argument
    source = "folder of a run (its newest checkpoint), a checkpoint, or published weights (file, folder, fetched NAME)"
    add("source", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    lines = "one prompt a line (UTF-8); blank lines and lines that start with # are passed over"
    prompts.add_argument("--prompts", type=user_path, metavar="FILE", help=lines)
    labels = "class number, for models conditioned on a class; may be given several times"
    prompts.add_argument("--label", action="append", metavar="N", help=labels)
    add(
        "--out", type=user_path, required=True, metavar="DIR", help="where the files go; samples of these settings stay"
    )
    add("--overwrite", action="store_true", help="replace the samples that are in DIR, whatever their settings")
    add("--seed", type=int, default=0, metavar="N", help="sample i's noise depends on (seed, i) alone (%(default)s)")
    add(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="prompts at once; changes results by rounding alone (%(default)s)",
    )
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--gif", action="store_true", help="also write 0000.gif, ...")
    add("--no-ema", action="store_true", help="use the trained weights, not their moving average")
    add("--num-heads", type=int, metavar="N", help="attention heads, where published weights cannot tell")
    add("--family", choices=("dit", "latte"), help="whose the weights are, where they cannot tell")
    sharing = "processes of torchrun that share a video's frames; groups of them share out the prompts (%(default)s)"
    add("--sp-size", type=int, default=1, metavar="N", help=sharing)
    add("--dry-run", action="store_true", help="check everything but the weights' values, print the plan and stop")
    add = parser.add_argument_group("by default as in the checkpoint's config, or its release's").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps (sample.steps)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 is none (sample.guidance)")
    add("--sampler", choices=("iddpm", "ddim", "dpm", "euler", "ab2"), help="(sample.sampler)")
    add("--num-frames", type=int, metavar="N", help="frames; 1 writes a png (data.num_frames)")
    add("--height", type=int, metavar="N", help="pixels (data.height)")
    add("--width", type=int, metavar="N", help="pixels (data.width)")
    add("--fps", type=int, metavar="N", help="frames a second of the written file (sample.fps)")
    add("--vae", type=expanduser, metavar="PATH", help="autoencoder: hub name or local folder (vae.path)")
    tiles = "decode larger frames in overlapping tiles of so many pixels, in less memory; 0: whole (vae.tile_size)"
    add("--vae-tile", type=int, metavar="N", help=tiles)
    add("--text", type=expanduser, metavar="PATH", help="text encoder: hub name or local folder (text.path)")
    shares = "each process of torchrun holds an equal share of T5, and gathers it part by part (text.shard)"
    add("--shard-text", action=argparse.BooleanOptionalAction, help=shares)
    add("--dtype", choices=("bf16", "fp32"), help="autocast (train.dtype)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(
        lambda: run(args),
        kept=f"what is finished is in {args.out}; {GOES_ON}",
        less_memory="Lower --batch-size, --num-frames, --height or --width",
    )


def run(args: argparse.Namespace) -> int:
    if not args.source.exists():  # seen without importing torch
        args.source = published(args.source)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out}: this is a file, expected a folder")
    check_numbers(args)
    return sample(args, given_prompts(args))


def published(name: Path) -> Path:
    """What the hub's cache holds of the catalog's weights of that name. Raises ConfigError, CatalogError."""
    from opensora_repro.weights.catalog import find_cached, similar_name

    found = find_cached(str(name))
    if found is None:
        raise ConfigError(f"{name}: no such run, checkpoint or weights file{similar_name(str(name))}")
    return found


def check_numbers(args: argparse.Namespace) -> None:
    for name in ("steps", "num_frames", "height", "width", "fps", "batch_size", "sp_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.vae_tile is not None and args.vae_tile < 0:
        raise ConfigError(f"--vae-tile {args.vae_tile}: expected at least 0")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ConfigError(f"--guidance {args.guidance}: expected a finite number")


def given_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        return read_prompts(args.prompts)
    prompts: list[str] = args.prompt or args.label
    check_prompts(prompts, "--prompt" if args.prompt else "--label")
    return prompts


def sample(args: argparse.Namespace, prompts: list[str]) -> int:
    """Look at all that can be seen without reading weights; then sample what is not there yet."""
    from dataclasses import replace

    from opensora_repro.parallel.mesh import launched_as
    from opensora_repro.sampling.run import SamplingRun, check_prompts_fit, pick_device, with_options
    from opensora_repro.sampling.source import find_source

    source = find_source(args.source, ema=not args.no_ema, num_heads=args.num_heads, family=args.family)
    source = replace(source, config=with_options(source.config, **{name: getattr(args, name) for name in SIZES}))
    check_prompts_fit(source, prompts, labels=args.label is not None)
    same = ("out", "seed", "batch_size", "sp_size", "device", "gif", "overwrite")
    run = SamplingRun(source, prompts, ema=not args.no_ema, **{name: getattr(args, name) for name in same})
    rank, world_size, local_rank = launched_as()
    device = pick_device(args.device, world_size, local_rank)
    # The run checks its processes, too; a dry run may be asked without torchrun what they would do.
    check = run.check(device, alone=args.dry_run and world_size == 1)
    if args.dry_run:
        for key, value in run.plan(check).items():
            print(f"{key:>14}  {value}")
    if rank == 0:
        for line in check.warnings:
            print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        return 0
    told = run.sample(check.folder, device) if check.todo else f"all {len(prompts)} were in {args.out} already"
    if rank == 0:
        print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
