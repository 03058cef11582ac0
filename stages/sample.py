"""Sample videos (mp4) or, with one frame, images (png) from a trained run or from published weights.

Weights, autoencoder, text encoder and every default come from the checkpoint, or are the release's; `OUT/0000.mp4` is
the first prompt's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora_repro.config import ConfigError
from opensora_repro.config.checks import SAMPLERS
from opensora_repro.config.prompts import check_prompts, is_blank, read_prompts
from opensora_repro.errors import GOES_ON, run_command
from opensora_repro.files import user_path

if TYPE_CHECKING:
    from opensora_repro.sampling.run import SamplingRun
    from opensora_repro.sampling.source import Source
    from opensora_repro.sampling.speedups import Speedups

LONGEST = 86_400  # seconds of a video
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
    negative = "what guidance leads away from, in place of the null caption"
    add("--negative", default="", metavar="TEXT", help=negative)
    expand = (
        "rewrite prompts like the captions of the training: URL[#MODEL] of an OpenAI-compatible API, or a local model"
    )
    add("--expand", metavar="URL|MODEL", help=expand)
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
    return parser.parse_args(joined(sys.argv[1:] if argv is None else argv))


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
    add(
        "--extend", type=user_path, metavar="FILE", help="go on where a clip ends; with --before: lead to its beginning"
    )
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


def run(args: argparse.Namespace) -> int:
    if not args.source.exists():  # seen without importing torch
        args.source = published(args.source)
    if args.best:
        args.source = best(args.source)
    if args.out.exists() and not args.out.is_dir():
        raise ConfigError(f"--out {args.out}: this is a file, expected a folder")
    return sample(args)


def published(name: Path) -> Path:
    """What the hub's cache holds of the catalog's weights of that name. Raises ConfigError, CatalogError."""
    from opensora_repro.weights.catalog import find_cached, similar_name

    found = find_cached(str(name))
    if found is None:
        raise ConfigError(f"{name}: no such run, checkpoint or weights file{similar_name(str(name))}")
    return found


def best(run: Path) -> Path:
    """The checkpoint that a run found best. Raises ConfigError."""
    from opensora_repro.run_folder import best_checkpoint

    found = best_checkpoint(run)
    if found is None:
        raise ConfigError(
            f"--best: {run} has no checkpoints/best: train with checkpoint.keep_best, or leave --best out"
        )
    return found


def check_numbers(args: argparse.Namespace) -> None:
    from opensora_repro.sampling.named_sizes import FRAMES, parse_frames

    if args.num_frames is not None:
        try:
            args.num_frames = parse_frames(args.num_frames)
        except ValueError:
            expected = f"a number, or one of {', '.join(FRAMES)}"
            raise ConfigError(f"--num-frames {args.num_frames}: expected {expected}") from None
    for name in (
        "steps",
        "num_frames",
        "height",
        "width",
        "fps",
        "batch_size",
        "sp_size",
        "condition_frames",
        "mask_align",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.vae_tile is not None and args.vae_tile < 0:
        raise ConfigError(f"--vae-tile {args.vae_tile}: expected at least 0")
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise ConfigError(f"--guidance {args.guidance}: expected a finite number")
    if args.seconds is not None and not 0 < args.seconds <= LONGEST:
        raise ConfigError(f"--seconds {args.seconds:g}: expected more than 0, and at most {LONGEST:,}")
    chained = args.loop or args.condition_frames is not None
    if args.seconds is not None and args.num_frames is not None and not chained:
        raise ConfigError("--seconds and --num-frames both say how long: give one")
    if args.resolution is not None and (args.height is not None or args.width is not None):
        raise ConfigError("--resolution stands for --height and --width: give it with --aspect-ratio alone")
    if args.aspect_ratio is not None and args.resolution is None:
        raise ConfigError(f"--aspect-ratio {args.aspect_ratio}: give --resolution, too, whose shapes it chooses from")
    if args.aesthetic not in (None, "none"):
        args.aesthetic = score(args.aesthetic, "aesthetic", 1, 10)
    if args.motion is not None:
        args.motion = score(args.motion, "motion", 0, math.inf)
    if args.before and args.extend is None:
        raise ConfigError("--before: give --extend, too, the clip that it leads to")
    if (args.edit is None) != (args.strength is None):
        raise ConfigError("--edit and --strength: give both, a clip and how much of it changes (0 to below 1)")
    if (args.inpaint is None) != (args.region is None):
        raise ConfigError("--inpaint and --region: give both, a clip and where in it something new is made")
    if args.inpaint is not None and args.edit is not None:
        raise ConfigError("--inpaint and --edit both say what all frames begin from: give one")
    if args.camera is not None and is_blank(args.camera):
        raise ConfigError("--camera: expected words, such as pan left")


def score(text: str | float, name: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or math.isinf(value):
        expected = f"a number from {least} on" if math.isinf(most) else f"a number from {least} to {most}"
        raise ConfigError(f"--{name} {text}: expected {expected}")
    return value


def given_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts:
        return read_prompts(args.prompts)
    prompts: list[str] = args.prompt or args.label
    check_prompts(prompts, "--prompt" if args.prompt else "--label")
    return prompts


def own_references(args: argparse.Namespace, prompts: list[str]) -> list[str]:
    """The prompts' texts; the JSON that 1.1's and 1.2's may end with goes to the options of its name. ConfigError."""
    if not any("{" in prompt for prompt in prompts):
        return prompts
    from opensora_repro.sampling.conditions import read_json

    parts = [read_json(prompt) for prompt in prompts]
    if len({(part.reference_path, part.mask_strategy) for part in parts}) > 1:
        raise ConfigError(
            "prompts that end with other references or strategies than each other: sample them one by one"
        )
    for option, value in (("reference", parts[0].reference_path), ("mask_strategy", parts[0].mask_strategy)):
        if value and getattr(args, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: the prompt's own JSON says it, too: give one")
        setattr(args, option, value or getattr(args, option))
    texts = [part.text.strip() for part in parts]
    check_prompts(texts, "--prompt without its JSON")
    return texts


def build_run(args: argparse.Namespace, *, opens_files: bool = False) -> tuple[SamplingRun, list[str]]:
    """What the options ask for, and lines on the frames that are given. Raises ConfigError, WeightsError.

    `opens_files`: prompts may name reference files, which only those who type them at this machine are to.
    """
    from dataclasses import replace

    from opensora_repro.sampling.run import SamplingRun, check_prompts_fit, with_options
    from opensora_repro.sampling.source import find_source

    check_numbers(args)
    prompts = given_prompts(args)
    prompts = own_references(args, prompts) if opens_files and not args.label else prompts
    if (args.mask_strategy is None) != (args.reference is None):
        raise ConfigError("--mask-strategy and --reference: give both, the places and what they take")
    if args.mask_align is not None and args.mask_strategy is None:
        raise ConfigError("--mask-align: give --mask-strategy, too, whose starts it moves")
    source = find_source(args.source, ema=not args.no_ema, num_heads=args.num_heads, family=args.family)
    if args.lora:
        from opensora_repro.weights.adapters import read_adapter

        adapters = [read_adapter(spec, ema=not args.no_ema) for spec in args.lora]
        source = replace(source, adapters=(*source.adapters, *adapters))
    given = {name: getattr(args, name) for name in SIZES} | named(args, source)
    lines = fast(args, source, given) if args.fast else []
    source = replace(source, config=with_options(source.config, **given))
    check_prompts_fit(source, prompts, labels=args.label is not None)
    more: dict[str, Any] = frames(args, source, prompts) if asks_for_frames(args, source, prompts) else {}
    lines += more.pop("lines", [])
    source, prompts = more.pop("source", source), more.pop("prompts", prompts)
    scores = score_words(args, source)
    same = ("out", "seed", "batch_size", "sp_size", "device", "gif", "overwrite")
    wished = speedups(args, source)
    run = SamplingRun(
        source,
        prompts,
        scores=scores,
        negative="" if is_blank(args.negative) else args.negative.strip(),
        **expansion(args, source),
        ema=not args.no_ema,
        speedups=wished,
        **more,
        **{name: getattr(args, name) for name in same},
    )
    return run, lines


def sample(args: argparse.Namespace) -> int:
    """Look at all that can be seen without reading weights; then sample what is not there yet."""
    from opensora_repro.parallel.mesh import launched_as
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


def expansion(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Who rewrites the prompts, and what of them was rewritten before. Raises ConfigError, ModelNotFound."""
    if args.expand is None:
        return {}
    if source.model.conditioning == "class":
        raise ConfigError(f"--expand: {source.path} is conditioned on a class, it reads no text")
    from opensora_repro.sampling.expand import Expander, remembered

    expander = Expander(args.expand, source.config.data.manifest)
    return {"expander": expander, "expanded": {} if args.overwrite else remembered(args.out)}


def fast(args: argparse.Namespace, source: Source, given: dict[str, Any]) -> list[str]:
    """Let `--fast` choose what was not given; a line on it."""
    from opensora_repro.sampling.speedups import fast_options

    chosen = fast_options(source, given | {"guidance_interval": args.guidance_interval})
    given |= {name: value for name, value in chosen.items() if name in SIZES}
    if "guidance_interval" in chosen:
        args.guidance_interval = chosen["guidance_interval"]
    words = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in chosen.items()
    }
    return ["--fast: " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in words.items())]


def speedups(args: argparse.Namespace, source: Source) -> Speedups | None:
    """What was asked for besides sampler and steps. Raises ConfigError."""
    if args.broadcast_between is not None and args.broadcast is None:
        raise ConfigError("--broadcast-between: give --broadcast, too, which acts there")
    if args.guidance_interval is args.broadcast is args.step_cache is None:
        return None
    from opensora_repro.sampling.caches import Broadcast
    from opensora_repro.sampling.speedups import Speedups, open_step_cache

    between: dict[str, Any] = {} if args.broadcast_between is None else {"between": tuple(args.broadcast_between)}
    return Speedups(
        None if args.guidance_interval is None else tuple(args.guidance_interval),
        None if args.broadcast is None else Broadcast(*args.broadcast, **between),
        None if args.step_cache is None else open_step_cache(args.step_cache, source, args.source),
    )


def named(args: argparse.Namespace, source: Source) -> dict[str, int]:
    """Height, width and frames that were asked for by name. Raises ConfigError."""
    from opensora_repro.sampling.named_sizes import DEFAULT_RATIO, frames_of_seconds, named_size

    found = {}
    if args.resolution is not None:
        ratio = args.aspect_ratio or ("1:1" if source.model.square else DEFAULT_RATIO)
        size = named_size(args.resolution, ratio, whole=not source.model.conditions)
        found["height"], found["width"] = size
    if args.seconds is not None:
        config = source.config
        if args.fps is not None:
            from dataclasses import replace

            config = replace(config, sample=replace(config.sample, fps=args.fps))
        args.total = frames_of_seconds(config, source.model, args.seconds)
        chained = args.total > source.longest or args.loop or args.condition_frames is not None
        if source.model.conditioning != "t5" or not chained:
            found["num_frames"] = args.total
    return found


def asks_for_frames(args: argparse.Namespace, source: Source, prompts: list[str]) -> bool:
    """Whether frames are given, clips are chained, or the prompt may be a script."""
    given = (
        args.keep,
        args.first,
        args.last,
        args.extend,
        args.join,
        args.edit,
        args.inpaint,
        args.mask_strategy,
        args.paste,
    )
    longer = getattr(args, "total", 0) > source.config.data.num_frames
    return any(given) or args.loop or longer or args.condition_frames is not None or is_script(prompts)


def is_script(prompts: list[str]) -> bool:
    return any(prompt.startswith(("0:", "0.0:", "|0|")) for prompt in prompts)


def frames(args: argparse.Namespace, source: Source, prompts: list[str]) -> dict[str, Any]:
    """What is given and chained, and lines on it. Raises ConfigError."""
    from dataclasses import replace

    from opensora_repro.sampling.chain import plan_chain, read_script, texts_of
    from opensora_repro.sampling.given import (
        condition_lengths,
        open_given,
        open_region,
        parse_keep,
        read_geometry,
        shorthands,
        told,
    )

    if source.model.conditioning != "t5":
        raise ConfigError(f"{source.path}: DiT and Latte take no given frames, and make no longer videos")
    script = read_script(prompts, f"--prompts {args.prompts}") if args.prompts else None
    geometry, data = read_geometry(source.config.vae), source.config.data
    total = getattr(args, "total", None)
    lengths = condition_lengths(geometry, data.num_frames, args.condition_frames)
    chain = plan_chain(total, data.num_frames, lengths, loop=args.loop)
    if chain is None and total is not None:
        data = replace(data, num_frames=total)
        lengths = condition_lengths(geometry, total, args.condition_frames)
    if args.gif and chain is not None:
        raise ConfigError("--gif: a video of chained clips is written as it goes, as mp4 alone")
    if script is not None and chain is None:
        raise ConfigError(f"--prompts {args.prompts}: a script needs chained clips: give --seconds, longer than a clip")
    if chain is None and any(len(texts_of(prompt)) > 1 for prompt in prompts):
        raise ConfigError("--prompt: |0|TEXT|2|TEXT counts chained clips: give --seconds, longer than a clip")
    short = ("first", "last", "extend", "before", "join", "edit", "strength", "inpaint")
    words = {name: getattr(args, name) for name in short}
    region = None if args.inpaint is None else open_region(args.region, args.inpaint, data)
    keeps = [*map(parse_keep, args.keep), *shorthands(**words, lengths=lengths)]
    windows = [part.window for part in chain.rounds()] if chain else [range(data.num_frames)]
    given = open_given(
        keeps, data, total=chain.total if chain else data.num_frames, paste=args.paste, strategy=args.mask_strategy,
        references=args.reference, align=args.mask_align, geometry=geometry, num_clips=len(windows),
        region=region,
    )  # fmt: skip
    lines = [str(chain)] if chain else []
    return {
        "lines": lines + (told(given, geometry, windows) if given else []),
        "source": replace(source, config=replace(source.config, data=data)),
        "prompts": prompts if script is None else [script],
        "given": given,
        "chain": chain,
    }


def score_words(args: argparse.Namespace, source: Source) -> dict[str, float | str]:
    """What is added to the prompts. Raises ConfigError for a model that reads none."""
    aesthetic = source.aesthetic if args.aesthetic is None else args.aesthetic
    given = {"aesthetic": None if aesthetic == "none" else aesthetic, "motion": args.motion, "camera": args.camera}
    found = {name: value for name, value in given.items() if value is not None}
    if found and source.model.conditioning == "class":
        raise ConfigError(f"--{next(iter(found))}: {source.path} is conditioned on a class, it reads no words")
    return found


if __name__ == "__main__":
    sys.exit(main())
