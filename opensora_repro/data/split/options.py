"""What a source's clips depend on besides its content: the options of `data_tools.split`, filled in and checked."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from opensora_repro.errors import DataError

if TYPE_CHECKING:
    from opensora_repro.data.split.cut import Encoding

USUAL: dict[str, Any] = {"min_frames": 8, "short_side": 0, "fps": ""}  # where neither they nor a config are given


@dataclass(frozen=True)
class Options:
    """What a source's clips depend on besides its content."""

    detector: str
    threshold: float | None
    min_frames: int
    max_frames: int
    crf: int
    trim: int | None = None
    preset: str = "veryfast"
    short_side: int = 0
    fps: str = ""
    audio: bool = False
    copy: bool = False
    for_training: bool = False


def recipe_options(path: str) -> dict[str, Any]:
    """Return the options with which every clip holds a whole sample of a stage's config, at the config's speed.

    A sample takes every `data.frame_interval`-th frame and is shown at `sample.fps`, so what is filmed moves at its own
    speed where clips have the product of both; by time, it takes `data.fps`. The short side fits in landscape and
    portrait. Raises DataError.
    """
    from opensora_repro.config import ConfigError, load_config
    from opensora_repro.config.sections import sample_fps
    from opensora_repro.data.buckets import kept_buckets
    from opensora_repro.data.sample_frames import interval_of

    try:
        cfg = load_config(path)
        buckets = kept_buckets(cfg)  # clips that others keep none of would be lost
    except ConfigError as error:
        raise DataError(f"--for-training: {error}") from None
    data, several = cfg.data, bool(cfg.data.buckets)
    pictures, interval = all(bucket.num_frames == 1 for bucket in buckets), interval_of(data)
    shortest = min(bucket.num_frames for bucket in buckets if pictures or bucket.num_frames > 1)
    return {
        # A bucket takes clips of so many whole intervals, and of about its own ratio
        "min_frames": shortest * interval if several else (shortest - 1) * interval + 1,
        "short_side": max((min if several else max)(bucket.height, bucket.width) for bucket in buckets),
        "fps": "" if pictures or data.frame_sampling == "uniform" else f"{data.fps or interval * sample_fps(cfg):g}",
    }


def check_options(args: Options) -> Options:
    """Raise DataError for numbers that cannot work; it names the option."""
    if args.threshold is not None and not args.threshold > 0:
        raise DataError(f"--threshold {args.threshold}: expected a number above 0")
    if args.min_frames < 1:
        raise DataError(f"--min-frames {args.min_frames}: expected at least 1")
    if args.max_frames and args.max_frames < args.min_frames:
        raise DataError(f"--max-frames {args.max_frames}: expected 0 or at least --min-frames {args.min_frames}")
    if not 0 <= args.crf <= 51:
        raise DataError(f"--crf {args.crf}: expected 0 to 51")
    if args.trim is not None and args.trim < 0:
        raise DataError(f"--trim {args.trim}: expected 0 or more frames")
    if args.short_side and args.short_side < 16:
        raise DataError(f"--short-side {args.short_side}: expected 0 or at least 16 pixels")
    try:
        wrong = args.fps != "" and not 0 < Fraction(args.fps) <= 1000
    except (ValueError, ZeroDivisionError):
        wrong = True
    if wrong:
        raise DataError(f"--fps {args.fps}: expected a number or a fraction, such as 24 or 30000/1001")
    return args


def encoding_of(options: Options) -> Encoding:
    from opensora_repro.data.split.cut import TRAINING_SIDE, Encoding

    return Encoding(
        crf=options.crf,
        preset=options.preset,
        short_side=options.short_side or (TRAINING_SIDE if options.for_training else 0),
        fps=Fraction(options.fps) if options.fps else None,
        audio=options.audio,
        copy=options.copy and not options.for_training,
        fast_decode=options.for_training,
    )


def scans_in_one_pass(options: Options) -> bool:
    """Whether clips are written while their cuts are found."""
    return options.detector == "shots" and not options.max_frames
