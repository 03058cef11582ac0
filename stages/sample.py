"""Sample videos (mp4) or, with one frame, images (png) from a trained run or from published weights.

Weights, autoencoder, text encoder and every default come from the checkpoint, or are the release's; `OUT/0000.mp4` is
the first prompt's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.config.checks import SAMPLERS
from opensora_repro.errors import GOES_ON, run_command
from opensora_repro.files import user_path
from opensora_repro.run_folder import check_folder
from opensora_repro.sampling.options import Options
from opensora_repro.weights.catalog import here_or_published


def parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m stages.sample", description=__doc__)
    add = parser.add_argument
    source = "folder of a run (its newest checkpoint), a checkpoint, or published weights (file, folder, fetched NAME)"
    add("source", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    lines = "one prompt a line (UTF-8); blank lines and lines that start with # are passed over"
    prompts.add_argument("--prompts", type=user_path, metavar="FILE", help=lines)
    negative = "what guidance leads away from, in place of the null caption"
    add("--negative", default="", metavar="TEXT", help=negative)
    expand = (
        "rewrite prompts like the captions of the training: URL[#MODEL] of an OpenAI-compatible API, or a local model"
    )
    add("--expand", metavar="URL|MODEL", help=expand)
    labels = "class number, for models conditioned on a class; may be given several times"
    prompts.add_argument("--label", action="append", metavar="N", help=labels)
    out = "where the files go; samples of these settings stay"
    add("--out", type=user_path, required=True, metavar="DIR", help=out)
    add("--overwrite", action="store_true", help="replace the samples that are in DIR, whatever their settings")
    add("--seed", type=int, default=0, metavar="N", help="sample i's noise depends on (seed, i) alone (%(default)s)")
    at_once = "prompts at once; changes results by rounding alone (%(default)s)"
    add("--batch-size", type=int, default=8, metavar="N", help=at_once)
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--gif", action="store_true", help="also write 0000.gif, ...")
    add("--best", action="store_true", help="of a run: its best checkpoint (checkpoint.keep_best), not its newest")
    add("--no-ema", action="store_true", help="use the trained weights, not their moving average")
    lora = "adapters added to the weights: a run with [lora], a checkpoint, peft's folder or file; repeatable"
    add("--lora", action="append", default=[], metavar="PATH[:WEIGHT]", help=lora)
    add("--num-heads", type=int, metavar="N", help="attention heads, where published weights cannot tell")
    add("--family", choices=("dit", "latte"), help="whose the weights are, where they cannot tell")
    sharing = "processes of torchrun that share a video's frames; groups of them share out the prompts (%(default)s)"
    add("--sp-size", type=int, default=1, metavar="N", help=sharing)
    add("--dry-run", action="store_true", help="check everything but the weights' values, print the plan and stop")
    add = parser.add_argument_group("by default as in the checkpoint's config, or its release's").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps (sample.steps)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 is none (sample.guidance)")
    add("--sampler", choices=SAMPLERS, help="(sample.sampler)")
    add("--num-frames", metavar="N", help="frames, or 1.2's name of so many: 4s, 2x; 1 writes a png (data.num_frames)")
    add("--height", type=int, metavar="N", help="pixels (data.height)")
    add("--width", type=int, metavar="N", help="pixels (data.width)")
    add("--resolution", metavar="NAME", help="in place of height and width: 144p to 4k, 256 to 2880")
    add("--aspect-ratio", metavar="H:W", help="with --resolution: the shape, height to width (9:16)")
    add("--seconds", type=float, metavar="X", help="in place of --num-frames: how long; of 1.2's models 2, 4, 8 or 16")
    add("--fps", type=int, metavar="N", help="frames a second of the written file (sample.fps)")
    add("--vae", type=expanduser, metavar="PATH", help="autoencoder: hub name or local folder (vae.path)")
    tiles = "decode larger frames in overlapping tiles of so many pixels, in less memory; 0: whole (vae.tile_size)"
    add("--vae-tile", type=int, metavar="N", help=tiles)
    add("--text", type=expanduser, metavar="PATH", help="text encoder: hub name or local folder (text.path)")
    shares = "each process of torchrun holds an equal share of T5, and gathers it part by part (text.shard)"
    add("--shard-text", action=argparse.BooleanOptionalAction, help=shares)
    add("--dtype", choices=("bf16", "fp32"), help="autocast (train.dtype)")
    add_speedups(parser.add_argument_group("faster, and not quite the same").add_argument)
    add_given(parser.add_argument_group("frames that are given, of files or of the video itself").add_argument)
    add = parser.add_argument_group("words that 1.2's captions end with, added to each prompt").add_argument
    add("--aesthetic", metavar="X", help="aesthetic score, 1 to 10; none: no such words (6.5 with 1.2's release)")
    add("--motion", metavar="X", help="motion score, from 0 on; about 5 is usual")
    add("--camera", metavar="TEXT", help='camera motion, such as "pan left"')
    return Options(**vars(parser.parse_args(joined(sys.argv[1:] if argv is None else argv))))


def add_speedups(add: Callable[..., object]) -> None:
    add("--fast", action="store_true", help="few steps of a second-order sampler, guidance in an interval; see below")
    interval = "noise levels, 0 (data) to 1, at which guidance acts; elsewhere half the work is left out"
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    serve = "steps that an output of spatial, temporal and cross attention serves, such as 2 4 6; 1: its own alone"
    add("--broadcast", type=int, nargs=3, metavar=("SPATIAL", "TEMPORAL", "CROSS"), help=serve)
    between = "shares of the steps between which --broadcast acts (0.1 0.9)"
    add("--broadcast-between", type=float, nargs=2, metavar=("LOW", "HIGH"), help=between)
    skipping = "skip all blocks while little changes, as stages.calibrate measured it (file beside the checkpoint)"
    add("--step-cache", nargs="?", const="", metavar="FILE[:THRESHOLD]|THRESHOLD", help=skipping)


def joined(argv: Sequence[str]) -> list[str]:
    """`--keep -8:=FILE` as `--keep=-8:=FILE`: argparse takes what begins with - for an option."""
    found: list[str] = []
    for word in argv:
        if found and found[-1] == "--keep":
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def add_given(add: Callable[..., object]) -> None:
    keep = "frames of FILE take places of the sample: 0=first.png, -8:=clip.mp4[0:8], 0:16=clip.mp4@0.6; repeatable"
    add("--keep", action="append", default=[], metavar="PLACE=FILE[SPAN]@STRENGTH", help=keep)
    add("--first", type=user_path, metavar="FILE", help="a picture, or a clip's first frame, to begin with")
    add("--last", type=user_path, metavar="FILE", help="a picture, or a clip's last frame, to end with")
    extend = "go on where a clip ends; with --before: lead to its beginning"
    add("--extend", type=user_path, metavar="FILE", help=extend)
    add("--before", action="store_true", help="see --extend")
    add("--join", type=user_path, nargs=2, metavar="FILE", help="from the first clip's end to the second's beginning")
    add("--loop", action="store_true", help="the last frame is followed by the first: clips are chained to close it")
    add("--edit", type=user_path, metavar="FILE", help="a clip, or a picture, to change by the prompt")
    add("--strength", type=float, metavar="X", help="how much --edit changes: 0 nothing, towards 1 everything")
    add("--inpaint", type=user_path, metavar="FILE", help="a clip, or a picture, of which --region alone is made anew")
    region = "of --inpaint: a picture that is white there, or a box in the clip's pixels"
    add("--region", metavar="MASK|X,Y,WIDTH,HEIGHT", help=region)
    conditions = "given frames at a clip's start or end, of --extend, --join and of chained clips (a quarter)"
    add("--condition-frames", type=int, metavar="N", help=conditions)
    add("--paste", action="store_true", help="kept frames as they are, not as the autoencoder gives them back")
    published = "1.1's and 1.2's loop,ref,ref_start,target,length,edit_ratio;... in latent frames"
    add("--mask-strategy", metavar="TEXT", help=published)
    add("--reference", metavar="FILE;FILE", help="pictures or clips of --mask-strategy")
    add("--mask-align", type=int, metavar="N", help="move --mask-strategy's starts to whole N latents, as 1.2 does (5)")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(
        lambda: run(args),
        kept=f"what is finished is in {args.out}; {GOES_ON}",
        less_memory="Lower --batch-size, --num-frames, --height or --width",
    )


def run(args: Options) -> int:
    source = here_or_published(args.source)  # seen without importing torch
    args = replace(args, source=best(source) if args.best else source)
    check_folder("--out", str(args.out))
    return sample(args)


def best(run: Path) -> Path:
    """The checkpoint that a run found best. Raises ConfigError."""
    from opensora_repro.run_folder import best_checkpoint

    found = best_checkpoint(run)
    if found is None:
        remedy = "train with checkpoint.keep_best, or leave --best out"
        raise ConfigError(f"--best: {run} has no checkpoints/best: {remedy}")
    return found


def sample(args: Options) -> int:
    """Look at all that can be seen without reading weights; then sample what is not there yet."""
    from opensora_repro.parallel.mesh import launched_as
    from opensora_repro.sampling.build import build_run
    from opensora_repro.sampling.run import pick_device

    run, lines = build_run(args, opens_files=True)
    rank, world_size, local_rank = launched_as()
    device = pick_device(args.device, world_size, local_rank)
    if run.speedups is not None:
        lines += run.speedups.lines(run.source.config, on_gpu=device.type == "cuda")
    # The run checks its processes, too; a dry run may be asked without torchrun what they would do.
    check = run.check(device, alone=args.dry_run and world_size == 1)
    if rank == 0 and run.expander is not None and run.unexpanded:
        run.expander.check()
        lines = [*lines, f"{len(run.unexpanded)} prompts will be rewritten by {args.expand}"]
    if args.dry_run:
        for key, value in run.plan(check).items():
            print(f"{key:>14}  {value}")
    if rank == 0:
        for line in lines:
            print(line)
        for line in check.warnings:
            print(f"warning: {line}", file=sys.stderr)
    if args.dry_run:
        return 0
    if check.todo or run.unexpanded:
        told = run.sample(check.folder, device)
    else:
        told = f"all {len(run.prompts)} were in {args.out} already"
    if rank == 0:
        print(told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
