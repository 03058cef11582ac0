"""A sampling run of the options of `stages.sample`: what is sampled from, what is given, chained and made faster."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts
from opensora_repro.sampling.caches import Broadcast
from opensora_repro.sampling.chain import plan_chain, read_script, texts_of
from opensora_repro.sampling.conditions import read_json
from opensora_repro.sampling.expand import Expander, remembered
from opensora_repro.sampling.given import (
    condition_lengths,
    open_given,
    open_region,
    parse_keep,
    read_geometry,
    shorthands,
    told,
)
from opensora_repro.sampling.named_sizes import DEFAULT_RATIO, frames_of_seconds, named_size
from opensora_repro.sampling.options import check_numbers, given_prompts
from opensora_repro.sampling.run import SamplingRun, check_prompts_fit, with_options
from opensora_repro.sampling.source import Source, find_source
from opensora_repro.sampling.speedups import Speedups, fast_options, open_step_cache
from opensora_repro.weights.adapters import read_adapter

SIZES = (
    "steps", "guidance", "num_frames", "height", "width", "fps", "sampler", "vae", "vae_tile", "text", "dtype",
    "shard_text",
)  # fmt: skip


def build_run(args: argparse.Namespace, *, opens_files: bool = False) -> tuple[SamplingRun, list[str]]:
    """What the options ask for, and lines on the frames that are given. Raises ConfigError, WeightsError.

    `opens_files`: prompts may name reference files, which only those who type them at this machine are to.
    """
    check_numbers(args)
    prompts = given_prompts(args)
    prompts = own_references(args, prompts) if opens_files and not args.label else prompts
    if (args.mask_strategy is None) != (args.reference is None):
        raise ConfigError("--mask-strategy and --reference: give both, the places and what they take")
    if args.mask_align is not None and args.mask_strategy is None:
        raise ConfigError("--mask-align: give --mask-strategy, too, whose starts it moves")
    source = find_source(args.source, ema=not args.no_ema, num_heads=args.num_heads, family=args.family)
    if args.lora:
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
        negative=args.negative.strip(),
        **expansion(args, source),
        ema=not args.no_ema,
        speedups=wished,
        **more,
        **{name: getattr(args, name) for name in same},
    )
    return run, lines


def own_references(args: argparse.Namespace, prompts: list[str]) -> list[str]:
    """The prompts' texts; the JSON that 1.1's and 1.2's may end with goes to the options of its name. ConfigError."""
    if not any("{" in prompt for prompt in prompts):
        return prompts
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


def expansion(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Who rewrites the prompts, and what of them was rewritten before. Raises ConfigError, ModelNotFound."""
    if args.expand is None:
        return {}
    if source.model.conditioning == "class":
        raise ConfigError(f"--expand: {source.path} is conditioned on a class, it reads no text")
    expander = Expander(args.expand, source.config.data.manifest)
    return {"expander": expander, "expanded": {} if args.overwrite else remembered(args.out)}


def fast(args: argparse.Namespace, source: Source, given: dict[str, Any]) -> list[str]:
    """Let `--fast` choose what was not given; a line on it."""
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
    between: dict[str, Any] = {} if args.broadcast_between is None else {"between": tuple(args.broadcast_between)}
    return Speedups(
        None if args.guidance_interval is None else tuple(args.guidance_interval),
        None if args.broadcast is None else Broadcast(*args.broadcast, **between),
        None if args.step_cache is None else open_step_cache(args.step_cache, source, args.source),
    )


def named(args: argparse.Namespace, source: Source) -> dict[str, int]:
    """Height, width and frames that were asked for by name. Raises ConfigError."""
    found = {}
    if args.resolution is not None:
        ratio = args.aspect_ratio or ("1:1" if source.model.square else DEFAULT_RATIO)
        size = named_size(args.resolution, ratio, whole=not source.model.conditions)
        found["height"], found["width"] = size
    if args.seconds is not None:
        config = source.config
        if args.fps is not None:
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
