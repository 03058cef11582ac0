"""Values that cannot work: ranges, choices, combinations of keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from opensora_repro.config.sections import (
    ALARMS,
    HIGHER_IS_BETTER,
    LOWER_IS_BETTER,
    BucketConfig,
    Config,
    ConfigError,
    DataConfig,
)
from opensora_repro.models.config import (
    ACTIVATION_CHECKPOINTING,
    ARCHITECTURES,
    TrainedConfig,
    block_layers,
    targeted_layers,
)

SAMPLERS = ("iddpm", "ddim", "dpm", "euler", "ab2", "heun")
_AT_LEAST_ONE = {
    "model": (
        "in_channels",
        "hidden_size",
        "depth",
        "num_heads",
        "caption_channels",
        "model_max_length",
        "input_sq_size",
    ),
    "data": ("num_frames", "frame_interval", "height", "width"),
    "vae": ("micro_batch_size",),
    "text": ("micro_batch_size",),
    "train": ("steps", "batch_size", "accumulation", "max_bad_steps"),
    "checkpoint": ("every",),
    "validation": ("max_samples",),
    "evaluate": ("clips",),
    "sample": ("steps",),
    "parallel": ("tp_size", "sp_size", "timeout"),
}
_AT_LEAST_ZERO = {
    "run": ("seed",),
    "model": ("base_size",),
    "data": ("num_workers", "decode_timeout", "draws", "fps", "packing_tokens"),
    "vae": ("tile_size",),
    "diffusion": ("shift",),
    "lora": ("rank",),
    "optim": ("weight_decay", "warmup_steps", "decay_steps", "clip_norm"),
    "checkpoint": ("keep",),
    "validation": ("every",),
    "evaluate": ("every", "samples", "steps"),
    "alarms": ("epochs",),
    "sample": ("every", "fps"),
}
_ABOVE_ZERO = {
    "model": ("mlp_ratio", "space_scale", "time_scale"),
    "diffusion": ("logit_std", "transform_scale"),
    "lora": ("alpha",),
    "optim": ("lr", "eps"),
}
_CHOICES = {
    "data.frame_sampling": ("window", "uniform"),
    "diffusion.objective": ("iddpm", "flow"),
    "diffusion.schedule": ("", "open_sora_1_2"),
    "diffusion.timestep_sampling": ("", "logit-normal", "uniform", "discrete", "speed"),
    "parallel.engine": ("torch", "colossalai"),
    "parallel.plugin": ("ddp", "fsdp", "zero1", "zero2", "hybrid"),
    "train.dtype": ("bf16", "fp32"),
    "train.kernels": ("auto", "eager", "triton"),
    "train.compile": ("auto", "on", "off"),
    "train.activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "sample.sampler": SAMPLERS,
}

ROUNDING = 1e-6  # of a sum of shares


def check_config(config: Config) -> None:
    """Raise ConfigError on a value that cannot work, whatever stage uses it."""

    def value(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} = {json.dumps(value(name))}: expected {expected}")

    for name in _names(_AT_LEAST_ONE, config):
        require(name, value(name) >= 1, "at least 1")
    for name in _names(_AT_LEAST_ZERO, config):
        require(name, value(name) >= 0, "0 or more")
    for name in _names(_ABOVE_ZERO, config):
        require(name, value(name) > 0, "more than 0")
    if config.parallel.plugin == "gemini":
        expected = "parallel.engine=torch parallel.plugin=fsdp, which spreads as much and goes on with its checkpoints"
        require("parallel.plugin", False, expected)
    for name, choices in _CHOICES.items():
        require(name, value(name) in choices, "one of " + ", ".join(choice or '""' for choice in choices))
    require("ema.decay", 0 <= config.ema.decay < 1, "0 or more and less than 1")
    for name in ("model.class_dropout_prob", "data.max_bad_fraction"):
        require(name, 0 <= value(name) <= 1, "a share from 0 to 1")
    require("optim.betas", all(0 <= beta < 1 for beta in config.optim.betas), "two values from 0 to below 1")
    require("model.patch_size", min(config.model.patch_size) >= 1, "sizes of at least 1")
    for name in ("alarms.stop", "alarms.off"):
        require(name, set(value(name)) <= set(ALARMS), "names out of " + ", ".join(ALARMS))
    shares = config.validation.timesteps
    require("validation.timesteps", bool(shares) and all(0 <= t <= 1 for t in shares), "shares from 0 to 1")
    for index in range(len(config.data.buckets)):
        _check_bucket(config.data.buckets, index)
    _check_together(config, require)
    _check_diffusion(config, require)
    _check_memory(config, require)
    _check_best(config, require)
    _check_parallel(config, require)
    _check_packing(config, require)
    _check_lora(config, require)


def _names(keys: dict[str, tuple[str, ...]], config: Config) -> Iterator[str]:
    """Those of them that the config has: `[model]` has its architecture's."""
    known = {section: {field.name for field in dataclasses.fields(getattr(config, section))} for section in keys}
    return (f"{section}.{key}" for section in keys for key in keys[section] if key in known[section])


def _check_bucket(buckets: tuple[BucketConfig, ...], index: int) -> None:
    bucket, where = buckets[index], f"data.buckets[{index}]"
    for key, least in (("num_frames", 1), ("batch_size", 0)):
        if getattr(bucket, key) < least:
            raise ConfigError(f"{where}.{key} = {getattr(bucket, key)}: expected at least {least}")
    for share in bucket.keep if isinstance(bucket.keep, tuple) else (bucket.keep,):
        if not 0 <= share <= 1:
            raise ConfigError(f"{where}.keep = {share}: expected shares from 0 to 1")
    for other, found in enumerate(buckets[:index]):
        if (found.num_frames, found.resolution) == (bucket.num_frames, bucket.resolution):
            raise ConfigError(f"{where}: data.buckets[{other}] has its num_frames and resolution: make one of them")


def _check_together(config: Config, require: Any) -> None:
    model, data = config.model, config.data
    divides = model.hidden_size % model.num_heads == 0
    require("model.num_heads", divides, f"a divisor of model.hidden_size = {model.hidden_size}")
    require("model.hidden_size", model.hidden_size % 4 == 0, "a multiple of 4 (sine and cosine of rows and columns)")
    _check_model(config.model, require)
    uniform = data.frame_sampling == "uniform"
    expected = f'0 with data.frame_sampling = "uniform" (of a whole clip {data.num_frames} frames are taken)'
    require("data.fps", not (data.fps and uniform), expected)
    unset = data.frame_interval in (1, DataConfig.frame_interval)
    other = 'data.frame_sampling = "uniform"' if uniform else f"data.fps = {data.fps:g}"
    require("data.frame_interval", unset or not (data.fps or uniform), f"1 with {other} (frames are taken by time)")
    require("data.draws", not data.cache or data.draws > 0, "more than 0 with data.cache (a cache holds fixed draws)")


def _check_diffusion(config: Config, require: Any) -> None:
    """What goes with which objective, and what `[frame_masks]` leaves of all samples."""
    diffusion, sampler, steps = config.diffusion, config.sample.sampler, config.sample.steps
    iddpm = diffusion.objective == "iddpm"
    where = f"with diffusion.objective = {diffusion.objective}"
    if iddpm:
        require("model.pred_sigma", config.model.pred_sigma, f"true {where} (it learns the variance)")
        require("sample.sampler", sampler not in ("euler", "ab2", "heun"), f"iddpm, ddim or dpm {where}")
        require("sample.steps", steps <= 1000 or sampler == "dpm", f"at most 1000 with sample.sampler = {sampler}")
    require("diffusion.schedule", not (iddpm and diffusion.schedule), f'"" {where} (it is a flow\'s)')
    choices = ("uniform", "speed") if iddpm else ("logit-normal", "uniform", "discrete")
    drawn = diffusion.timestep_sampling in ("", *choices)
    require("diffusion.timestep_sampling", drawn, f"{', '.join(choices[:-1])} or {choices[-1]} {where}")
    shares = config.frame_masks.shares()
    for mode, share in shares.items():
        require(f"frame_masks.{mode}", 0 <= share <= 1, "a share from 0 to 1")
    require("frame_masks.noise", 0 <= config.frame_masks.noise < 1, "a level from 0 (none) to below 1")
    total = sum(shares.values())
    if total > 1 + ROUNDING:
        raise ConfigError(f"frame_masks: the shares add up to {total:.6g}: expected at most 1, the rest is given none")


def _check_model(model: TrainedConfig, require: Any) -> None:
    named = type(model) is ARCHITECTURES.get(model.architecture)
    require("model.architecture", named, f"what {type(model).__name__} is called")
    if model.architecture == "stdit" and model.temporal_attention:
        require("model.size_conditioning", not model.size_conditioning, "false in a video model (PixArt-1024-MS's)")
        require("model.base_size", not model.base_size, "0 in a video model (PixArt's)")
    thirds = model.size_conditioning or "ar" in model.conditions
    told = "size_conditioning" if model.size_conditioning else f'architecture = "{model.architecture}"'
    expected = f"a multiple of 3 with model.{told} (height, width and their ratio)"
    require("model.hidden_size", model.hidden_size % 3 == 0 or not thirds, expected)
    pairs = model.hidden_size // model.num_heads % 2 == 0
    require("model.num_heads", pairs or not model.rotary, "heads of an even width (rotary positions turn pairs)")
    require("model.skip_y_embedder", not model.skip_y_embedder, "false in a run, whose captions the model embeds")


def _check_memory(config: Config, require: Any) -> None:
    """What spares memory, and what it cannot go with.

    An update within the backward pass comes before anything is known of the whole gradient.
    """
    optim, train, parallel = config.optim, config.train, config.parallel
    if train.activation_checkpointing == "none":
        expected = 'false with train.activation_checkpointing = "none" (it moves what checkpointing keeps)'
        require("train.offload_activations", not train.offload_activations, expected)
    require("text.shard", not (config.text.shard and config.text.offload), "false with text.offload = true")
    for holds, expected in (
        ((parallel.engine, parallel.plugin) == ("torch", "ddp"), "parallel.engine = torch with plugin ddp"),
        (optim.clip_norm == 0, "optim.clip_norm = 0 (the norm is known too late)"),
        (train.accumulation == 1, "train.accumulation = 1"),
        (train.max_bad_steps == 1, "train.max_bad_steps = 1 (a non-finite step cannot be skipped)"),
        (not optim.offload, "optim.offload = false"),
    ):
        require("optim.in_backward", holds or not optim.in_backward, f"false, or {expected}")


# What each metric needs to be measured in training; others are measured by stages.evaluate alone.
_MEASURED_WITH = {
    **dict.fromkeys(("loss", "caption_gap", "motion_gap"), ()),
    **dict.fromkeys(("flicker", "motion_distance", "static", "blank", "noise"), ("samples",)),
    **dict.fromkeys(("frechet", "kernel"), ("samples", "features")),
    **dict.fromkeys(("clip_score", "text_match"), ("samples", "clip")),
}


def _check_best(config: Config, require: Any) -> None:
    """The best checkpoint can be kept only where what is measured is saved."""
    name, key = config.checkpoint.keep_best, "checkpoint.keep_best"
    metric, at, _ = name.partition("@")
    if not metric:
        return
    evaluate, validation = config.evaluate, config.validation
    expected = f"one of {', '.join((*LOWER_IS_BETTER, *HIGHER_IS_BETTER))}"
    require(key, metric in LOWER_IS_BETTER or metric in HIGHER_IS_BETTER, expected)
    if not evaluate.every:
        known = config.checkpoint.keep_best in ("loss", "psnr", "ssim")
        require(key, bool(validation.every) and known, "none without evaluate.every (or loss with validation.every)")
    else:
        require(key, metric in _MEASURED_WITH, f"one of {', '.join(_MEASURED_WITH)}, which [evaluate] measures")
        levels = [f"loss@{level:g}" for level in validation.timesteps]
        expected = f"{metric}, or of validation.timesteps {', '.join(levels)}"
        require(key, not at or name in levels, expected)
        for needed in _MEASURED_WITH[metric]:
            require(key, bool(getattr(evaluate, needed)), f"another without evaluate.{needed}, or set that")
    name, every = ("evaluate", evaluate.every) if evaluate.every else ("validation", validation.every)
    saved = every % config.checkpoint.every == 0
    require(key, saved, f"{name}.every = {every} to be a multiple of checkpoint.every = {config.checkpoint.every}")


def _check_packing(config: Config, require: Any) -> None:
    """Rows of clips differ from one to the next in all that others count on."""
    if not config.data.packing_tokens:
        return
    parallel = config.parallel
    require("data.packing_tokens", bool(config.data.buckets), "0, or [[data.buckets]], which give clips their shapes")
    for index, bucket in enumerate(config.data.buckets):
        if bucket.batch_size:
            raise ConfigError(
                f"data.buckets[{index}].batch_size = {bucket.batch_size}: expected none with data.packing_tokens: "
                "train.batch_size counts clips of any bucket"
            )
    where = "with data.packing_tokens"
    require("parallel.engine", parallel.engine == "torch", f"torch {where}")
    require("parallel.plugin", parallel.plugin == "ddp", f"ddp {where} (others alter the blocks)")
    require("parallel.sp_size", parallel.sp_size == 1, f"1 {where}")
    require("train.compile", config.train.compile != "on", f"off or auto {where} (no row is like another)")
    require("optim.in_backward", not config.optim.in_backward, f"false {where} (a step has several rows)")


def _check_lora(config: Config, require: Any) -> None:
    lora, parallel = config.lora, config.parallel
    require("lora.dropout", 0 <= lora.dropout < 1, "a share from 0 to below 1")
    if not lora.rank:
        return
    layers = {name for spans in config.model.block_spans for name in block_layers(config.model, spans)}
    for target in lora.targets:
        if not any(targeted_layers(config.model, (target,), spans) for spans in config.model.block_spans):
            expected = f"parts of a block's {', '.join(sorted(layers))}"
            raise ConfigError(f"lora.targets: {json.dumps(target)} is no layer of this model: expected {expected}")
    require("init.weights", bool(config.init.weights), f"weights, which lora.rank = {lora.rank} adapts")
    where = f"with lora.rank = {lora.rank}"
    require("parallel.tp_size", parallel.tp_size == 1, f"1 {where} (adapters are not cut)")
    require("parallel.sp_size", parallel.sp_size == 1, f"1 {where}")
    require("train.compile", config.train.compile != "on", f"off or auto {where}")
    packs = bool(config.data.packing_tokens and lora.dropout)
    require("lora.dropout", not packs, "0 with data.packing_tokens (rows hold several samples)")


def _check_parallel(config: Config, require: Any) -> None:
    """Combinations that no number of processes makes possible; the engine checks that number itself."""
    parallel, model = config.parallel, config.model
    plugin, tp_size, sp_size = parallel.plugin, parallel.tp_size, parallel.sp_size
    known = ("ddp", "fsdp") if parallel.engine == "torch" else ("ddp", "zero1", "zero2", "hybrid")
    require("parallel.plugin", plugin in known, f"one of {', '.join(known)} with parallel.engine = {parallel.engine}")
    require("parallel.tp_size", tp_size == 1 or plugin == "hybrid", f"1 with parallel.plugin = {plugin} (hybrid cuts)")
    if config.train.compile == "on":
        compiles = plugin != "fsdp" and tp_size == sp_size == 1
        require("train.compile", compiles, "off or auto with plugin fsdp, tp_size or sp_size (they alter the blocks)")
    require("parallel.sp_size", sp_size == 1 or model.temporal_attention, "1 without model.temporal_attention")
    if model.num_heads % tp_size:
        raise ConfigError(f"model.num_heads: {model.num_heads} heads are not divisible by tp_size={tp_size}")
    width = int(model.hidden_size * model.mlp_ratio)
    if width % tp_size:
        raise ConfigError(f"model.mlp_ratio: the MLP's {width} channels are not divisible by tp_size={tp_size}")
    for bucket in config.data.buckets or (config.data,):
        frames = -(-bucket.num_frames // model.patch_size[0])
        if frames < sp_size:
            where = f" of {bucket.resolution} in data.buckets" if isinstance(bucket, BucketConfig) else ""
            raise ConfigError(f"parallel.sp_size = {sp_size}: there are only {frames} latent frames to share{where}")
