"""Evaluate checkpoints side by side: held-out loss and what captions are worth in it, samples against real clips.

Numbers, their intervals and how they were come by go to OUT/evaluation.json and OUT/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.config.checks import SAMPLERS
from opensora_repro.errors import GOES_ON, run_command
from opensora_repro.files import user_path, user_place
from opensora_repro.run_folder import check_folder

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evaluate", description=__doc__)
    add = parser.add_argument
    source = "runs (their newest checkpoint), checkpoints, or published weights (file, folder, fetched NAME)"
    add("sources", nargs="+", metavar="RUN_OR_CHECKPOINT", type=user_path, help=source)
    add("--manifest", required=True, type=user_place, metavar="HELD_OUT", help="clips that were not trained on")
    add("--out", required=True, type=user_path, metavar="DIR", help="where the results go; what is done is not redone")
    add("--clips", type=int, default=64, metavar="N", help="held-out clips that are measured (%(default)s)")
    add("--samples", type=int, metavar="N", help="videos sampled from their captions; 0: none (as many as --clips)")
    levels = "noise levels of the loss, shares of the range"
    add("--levels", type=float, nargs="+", default=LEVELS, metavar="X", help=f"{levels} ({' '.join(map(str, LEVELS))})")
    features = "for distances: own (a small model, trained on the spot), a TorchScript file (I3D: FVD), or the folder "
    features += "of a video model of transformers, of timm's (FID) or of CLIP's; hub names mean what the cache holds "
    add("--features", type=expanduser, default="own", metavar="MODEL", help=features + "(%(default)s)")
    add("--clip", type=expanduser, metavar="PATH", help="CLIP model, for scores of samples against their captions")
    add("--lpips", type=expanduser, metavar="DIR", help="folder of VGG16's weights, for the autoencoder's LPIPS")
    train = "training clips, to look for copies of them (by default the run's, where they are still there)"
    add("--train", type=user_place, metavar="MANIFEST", help=train)
    add("--train-clips", type=int, default=500, metavar="N", help="of them that are looked at (%(default)s)")
    add(
        "--vbench", type=user_path, metavar="PROMPTS.json", help="VBench_full_info.json: write the videos it wants, too"
    )
    add("--seed", type=int, default=0, metavar="N", help="of the samples (%(default)s)")
    add("--batch-size", type=int, default=8, metavar="N", help="clips at once (%(default)s)")
    add("--device", help="such as cuda, cuda:1 or cpu (a GPU where there is one)")
    add("--no-ema", action="store_true", help="the trained weights, not their moving average")
    add = parser.add_argument_group("of the samples, by default as in the checkpoint's config").add_argument
    add("--steps", type=int, metavar="N", help="denoising steps (sample.steps)")
    add("--guidance", type=float, metavar="X", help="classifier-free guidance; 1 is none (sample.guidance)")
    add("--sampler", choices=SAMPLERS, help="(sample.sampler)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return run_command(
        lambda: run(args), kept=f"what is finished is in {args.out}; {GOES_ON}", less_memory="Lower --batch-size"
    )


def run(args: argparse.Namespace) -> int:
    check(args)
    from opensora_repro.evaluation.run import Options, evaluate
    from opensora_repro.parallel.mesh import launched_as
    from opensora_repro.process import keep_freed_memory, limit_threads
    from opensora_repro.sampling.run import pick_device

    limit_threads()
    rank, world_size, local_rank = launched_as()
    device = pick_device(args.device, world_size, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    options = Options(
        manifest=args.manifest,
        out=args.out,
        clips=args.clips,
        samples=args.clips if args.samples is None else args.samples,
        levels=tuple(args.levels),
        features=args.features,
        clip=args.clip,
        lpips=args.lpips,
        training=args.train,
        training_clips=args.train_clips,
        vbench=args.vbench,
        seed=args.seed,
        batch_size=args.batch_size,
        device=device,
        ema=not args.no_ema,
    )
    table = evaluate([find(path, args) for path in args.sources], options, lambda line: print(line, flush=True))
    if rank == 0:
        print(f"\n{table}\n{args.out / 'evaluation.json'}")
    return 0


def find(path: Path, args: argparse.Namespace) -> Any:
    from dataclasses import replace

    from opensora_repro.sampling.run import with_options
    from opensora_repro.sampling.source import find_source
    from opensora_repro.weights.catalog import here_or_published

    source = find_source(here_or_published(path), ema=not args.no_ema)
    given = {name: getattr(args, name) for name in ("sampler", "steps", "guidance")}
    return replace(source, config=with_options(source.config, **given))


def check(args: argparse.Namespace) -> None:
    for name, least in (("clips", 1), ("samples", 0), ("train_clips", 1), ("batch_size", 1), ("steps", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    for level in args.levels:
        if not 0 <= level <= 1:
            raise ConfigError(f"--levels {level:g}: expected shares of the noise range, from 0 to 1")
    if not args.manifest.is_file():
        raise ConfigError(f"--manifest {args.manifest}: no such file, expected a manifest of held-out clips")
    check_folder("--out", str(args.out))


if __name__ == "__main__":
    sys.exit(main())
