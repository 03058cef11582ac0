"""What the options of `stages.sample` say, looked at before anything is loaded: numbers against each other, prompts.

Needs no torch.
"""

from __future__ import annotations

import argparse
import math

from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts, is_blank, read_prompts
from opensora_repro.sampling.named_sizes import FRAMES, parse_frames


def check_numbers(args: argparse.Namespace) -> None:

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
    if args.seconds is not None and not (math.isfinite(args.seconds) and args.seconds > 0):
        raise ConfigError(f"--seconds {args.seconds:g}: expected more than 0")
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
