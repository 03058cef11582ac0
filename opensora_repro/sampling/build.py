"""A sampling run of the options of `stages.sample`: what is sampled from, what is given, chained and made faster."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opensora_repro.config import ConfigError
from opensora_repro.config.prompts import check_prompts, is_blank
from opensora_repro.sampling.caches import Broadcast
from opensora_repro.sampling.chain import Chain, plan_chain, read_script, texts_of
from opensora_repro.sampling.conditions import read_json
from opensora_repro.sampling.expand import Expander, remembered
from opensora_repro.sampling.given import Given, condition_lengths, open_given, read_geometry, told
from opensora_repro.sampling.named_sizes import DEFAULT_RATIO, frames_of_seconds, named_size
from opensora_repro.sampling.options import Options, checked, given_prompts
from opensora_repro.sampling.run import SamplingRun, check_prompts_fit, with_options
from opensora_repro.sampling.source import ModelSource, find_source
from opensora_repro.sampling.speedups import Speedups, fast_options, open_step_cache
from opensora_repro.weights.adapters import read_adapter

SIZES = (
    "steps", "guidance", "num_frames", "height", "width", "fps", "sampler", "vae", "vae_tile", "text", "dtype",
    "shard_text",
)  # fmt: skip


def build_run(options: Options, *, opens_files: bool = False) -> tuple[SamplingRun, list[str]]:
    """What the options ask for, and lines on the frames that are given. Raises UserError.

    `opens_files`: prompts may name reference files, which only those who type them at this machine are to.
    """
    o = checked(options)
    prompts = given_prompts(o)
    if opens_files and not o.label:
        o, prompts = own_references(o, prompts)
    if (o.mask_strategy is None) != (o.reference is None):
        raise ConfigError("--mask-strategy and --reference: give both, the places and what they take")
    if o.mask_align is not None and o.mask_strategy is None:
        raise ConfigError("--mask-align: give --mask-strategy, too, whose starts it moves")
    source = find_source(o.source, ema=not o.no_ema, num_heads=o.num_heads, family=o.family)
    if o.lora:
        adapters = [read_adapter(spec, ema=not o.no_ema) for spec in o.lora]
        source = replace(source, adapters=(*source.adapters, *adapters))
    total = None if o.seconds is None else frames_of_seconds(source.config, source.model, o.seconds, fps=o.fps)
    o = replace(o, **named(o, source, total))
    o, lines = fast(o, source) if o.fast else (o, [])
    source = replace(source, config=with_options(source.config, **{name: getattr(o, name) for name in SIZES}))
    check_prompts_fit(source, prompts, labels=o.label is not None)
    given = chain = None
    if asks_for_frames(o, source, prompts, total):
        source, prompts, given, chain, more = frames(o, source, prompts, total)
        lines += more
    run = SamplingRun(
        source, prompts, o.out, seed=o.seed, batch_size=o.batch_size, sp_size=o.sp_size, device=o.device,
        ema=not o.no_ema, gif=o.gif, overwrite=o.overwrite,
        scores=score_words(o, source), speedups=speedups(o, source), given=given, chain=chain,
        negative="" if is_blank(o.negative) else o.negative.strip(), **expansion(o, source),
    )  # fmt: skip
    return run, lines


def own_references(options: Options, prompts: list[str]) -> tuple[Options, list[str]]:
    """The prompts' texts; the JSON that 1.1's and 1.2's may end with goes to the options of its name. ConfigError."""
    if not any("{" in prompt for prompt in prompts):
        return options, prompts
    parts = [read_json(prompt) for prompt in prompts]
    if len({(part.reference_path, part.mask_strategy) for part in parts}) > 1:
        others = "prompts that end with other references or strategies than each other"
        raise ConfigError(f"{others}: sample them one by one")
    told = {"reference": parts[0].reference_path, "mask_strategy": parts[0].mask_strategy}
    own: dict[str, Any] = {option: value for option, value in told.items() if value}
    for option in own:
        if getattr(options, option) is not None:
            raise ConfigError(f"--{option.replace('_', '-')}: the prompt's own JSON says it, too: give one")
    texts = [part.text.strip() for part in parts]
    check_prompts(texts, "--prompt without its JSON")
    return replace(options, **own), texts


def expansion(o: Options, source: ModelSource) -> dict[str, Any]:
    """Who rewrites the prompts, and what of them was rewritten before. Raises ConfigError, ModelNotFound."""
    if o.expand is None:
        return {}
    if source.model.conditioning == "class":
        raise ConfigError(f"--expand: {source.path} is conditioned on a class, it reads no text")
    expander = Expander(o.expand, source.config.data.manifest)
    return {"expander": expander, "expanded": {} if o.overwrite else remembered(o.out)}


def fast(options: Options, source: ModelSource) -> tuple[Options, list[str]]:
    """Let `--fast` choose what was not given; a line on it."""
    chosen = fast_options(source, vars(options))
    words = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in chosen.items()
    }
    told = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in words.items())
    return replace(options, **chosen), [f"--fast: {told}"]


def speedups(o: Options, source: ModelSource) -> Speedups | None:
    """What was asked for besides sampler and steps. Raises ConfigError."""
    if o.broadcast_between is not None and o.broadcast is None:
        raise ConfigError("--broadcast-between: give --broadcast, too, which acts there")
    if o.guidance_interval is o.broadcast is o.step_cache is None:
        return None
    between: dict[str, Any] = {} if o.broadcast_between is None else {"between": tuple(o.broadcast_between)}
    interval: Any = None if o.guidance_interval is None else tuple(o.guidance_interval)
    return Speedups(
        interval,
        None if o.broadcast is None else Broadcast(*o.broadcast, **between),
        None if o.step_cache is None else open_step_cache(o.step_cache, source, o.source),
    )


def named(o: Options, source: ModelSource, total: int | None) -> dict[str, Any]:
    """Height, width and frames that were asked for by name. Raises ConfigError."""
    found: dict[str, Any] = {}
    if o.resolution is not None:
        ratio = o.aspect_ratio or ("1:1" if source.model.square else DEFAULT_RATIO)
        found["height"], found["width"] = named_size(o.resolution, ratio, whole=not source.model.conditions)
    if total is not None and (source.model.conditioning != "t5" or not (total > source.longest or o.chains)):
        found["num_frames"] = total
    return found


def asks_for_frames(o: Options, source: ModelSource, prompts: list[str], total: int | None) -> bool:
    """Whether frames are given, clips are chained, or the prompt may be a script."""
    given = (o.keep, o.first, o.last, o.extend, o.join, o.edit, o.inpaint, o.mask_strategy, o.paste, o.chains)
    script = any(prompt.startswith(("0:", "0.0:", "|0|")) for prompt in prompts)
    return any(given) or (total or 0) > source.config.data.num_frames or script


def frames(
    o: Options, source: ModelSource, prompts: list[str], total: int | None
) -> tuple[ModelSource, list[str], Given | None, Chain | None, list[str]]:
    """Source and prompts for what is given and chained, that itself, and lines on it. Raises ConfigError."""
    if source.model.conditioning != "t5":
        raise ConfigError(f"{source.path}: DiT and Latte take no given frames, and make no longer videos")
    script = read_script(prompts, f"--prompts {o.prompts}") if o.prompts else None
    geometry, data = read_geometry(source.config.vae), source.config.data
    lengths = condition_lengths(geometry, data.num_frames, o.condition_frames)
    chain = plan_chain(total, data.num_frames, lengths, loop=o.loop)
    if chain is None and total is not None:
        data = replace(data, num_frames=total)
        lengths = condition_lengths(geometry, total, o.condition_frames)
    if o.gif and chain is not None:
        raise ConfigError("--gif: a video of chained clips is written as it goes, as mp4 alone")
    if script is not None and chain is None:
        raise ConfigError(f"--prompts {o.prompts}: a script needs chained clips: give --seconds, longer than a clip")
    if chain is None and any(len(texts_of(prompt)) > 1 for prompt in prompts):
        raise ConfigError("--prompt: |0|TEXT|2|TEXT counts chained clips: give --seconds, longer than a clip")
    windows = [part.window for part in chain.rounds()] if chain else [range(data.num_frames)]
    given = open_given(o, data, lengths, total=chain.total if chain else data.num_frames, geometry=geometry,
                       num_clips=len(windows))  # fmt: skip
    lines = [*([str(chain)] if chain else []), *(told(given, geometry, windows) if given else [])]
    source = replace(source, config=replace(source.config, data=data))
    return source, prompts if script is None else [script], given, chain, lines


def score_words(o: Options, source: ModelSource) -> dict[str, float | str]:
    """What is added to the prompts. Raises ConfigError for a model that reads none."""
    aesthetic = source.aesthetic if o.aesthetic is None else o.aesthetic
    given = {"aesthetic": None if aesthetic == "none" else aesthetic, "motion": o.motion, "camera": o.camera}
    found = {name: value for name, value in given.items() if value is not None}
    if found and source.model.conditioning == "class":
        raise ConfigError(f"--{next(iter(found))}: {source.path} is conditioned on a class, it reads no words")
    return found
