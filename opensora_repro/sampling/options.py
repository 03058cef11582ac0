"""What the options of `stages.sample` say, looked at before anything is loaded: numbers against each other, prompts.

Needs no torch, and is imported without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts, is_blank, read_prompts
from opensora_repro.errors import check_least

LONGEST, MOST_FRAMES = 86_400, 10_000_000  # seconds and frames of a video: more is a slip
NUMBERS = ("steps", "num_frames", "height", "width", "fps", "batch_size", "sp_size", "condition_frames", "mask_align")


@dataclass(frozen=True, kw_only=True)
class Options:
    """All of them by name, as they are given. None: as the checkpoint's config or its release has it, or not at all."""

    source: Path
    prompt: list[str] | None
    prompts: Path | None
    label: list[str] | None
    negative: str
    expand: str | None
    out: Path
    overwrite: bool
    seed: int
    batch_size: int
    sp_size: int
    device: str | None
    gif: bool
    best: bool
    no_ema: bool
    lora: list[str]
    num_heads: int | None
    family: str | None
    dry_run: bool

    steps: int | None
    guidance: float | None
    sampler: str | None
    num_frames: int | str | None
    height: int | None
    width: int | None
    resolution: str | None
    aspect_ratio: str | None
    seconds: float | None
    fps: int | None
    vae: str | None
    vae_tile: int | None
    text: str | None
    shard_text: bool | None
    dtype: str | None

    fast: bool
    guidance_interval: Sequence[float] | None
    broadcast: tuple[int, int, int] | None
    broadcast_between: Sequence[float] | None
    step_cache: str | None

    keep: list[str]
    first: Path | None
    last: Path | None
    extend: Path | None
    before: bool
    join: Sequence[Path] | None
    loop: bool
    edit: Path | None
    strength: float | None
    inpaint: Path | None
    region: str | None
    condition_frames: int | None
    paste: bool
    mask_strategy: str | None
    reference: str | None
    mask_align: int | None

    aesthetic: str | float | None
    motion: str | float | None
    camera: str | None

    @property
    def chains(self) -> bool:
        """Whether clips are chained however long the video is."""
        return self.loop or self.condition_frames is not None


def checked(options: Options) -> Options:
    """With numbers in place of their words. Raises UserError for what cannot be, or does not go together."""
    o, num_frames = options, options.num_frames
    if num_frames is not None:
        from opensora_repro.sampling.named_sizes import FRAMES, parse_frames

        try:
            num_frames = parse_frames(str(num_frames))
        except ValueError:
            expected = f"a number, or one of {', '.join(FRAMES)}"
            raise ConfigError(f"--num-frames {num_frames}: expected {expected}") from None
        if num_frames > MOST_FRAMES:
            raise ConfigError(f"--num-frames {num_frames}: expected at most {MOST_FRAMES:,}")
    o = replace(o, num_frames=num_frames)
    check_least(o, *NUMBERS)
    if o.vae_tile is not None and o.vae_tile < 0:
        raise ConfigError(f"--vae-tile {o.vae_tile}: expected at least 0")
    if o.guidance is not None and not math.isfinite(o.guidance):
        raise ConfigError(f"--guidance {o.guidance}: expected a finite number")
    if o.seconds is not None and not 0 < o.seconds <= LONGEST:
        raise ConfigError(f"--seconds {o.seconds:g}: expected more than 0, and at most {LONGEST:,}")
    if o.seconds is not None and o.num_frames is not None and not o.chains:
        raise ConfigError("--seconds and --num-frames both say how long: give one")
    if o.resolution is not None and (o.height is not None or o.width is not None):
        raise ConfigError("--resolution stands for --height and --width: give it with --aspect-ratio alone")
    if o.aspect_ratio is not None and o.resolution is None:
        raise ConfigError(f"--aspect-ratio {o.aspect_ratio}: give --resolution, too, whose shapes it chooses from")
    if o.aesthetic not in (None, "none"):
        o = replace(o, aesthetic=score(o.aesthetic, "aesthetic", 1, 10))
    if o.motion is not None:
        o = replace(o, motion=score(o.motion, "motion", 0, math.inf))
    if o.before and o.extend is None:
        raise ConfigError("--before: give --extend, too, the clip that it leads to")
    if (o.edit is None) != (o.strength is None):
        raise ConfigError("--edit and --strength: give both, a clip and how much of it changes (0 to below 1)")
    if (o.inpaint is None) != (o.region is None):
        raise ConfigError("--inpaint and --region: give both, a clip and where in it something new is made")
    if o.inpaint is not None and o.edit is not None:
        raise ConfigError("--inpaint and --edit both say what all frames begin from: give one")
    if o.camera is not None and is_blank(o.camera):
        raise ConfigError("--camera: expected words, such as pan left")
    return o


def score(text: str | float, name: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most or math.isinf(value):
        expected = f"a number from {least} on" if math.isinf(most) else f"a number from {least} to {most}"
        raise ConfigError(f"--{name} {text}: expected {expected}")
    return value


def given_prompts(options: Options) -> list[str]:
    if options.prompts:
        return read_prompts(options.prompts)
    prompts = options.prompt or options.label or []
    check_prompts(prompts, "--prompt" if options.prompt else "--label")
    return prompts
