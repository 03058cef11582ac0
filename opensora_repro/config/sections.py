"""The sections of a run's configuration, how they are read and written, and what cannot work."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from opensora_repro.models.config import ACTIVATION_CHECKPOINTING, STDiTConfig


class ConfigError(ValueError):
    """A mistake in a config file or an override; the message is one line meant for the user."""


@dataclass(frozen=True)
class RunConfig:
    dir: str = ""  # where config, metrics, checkpoints and samples go
    seed: int = 42


@dataclass(frozen=True)
class InitConfig:
    weights: str = ""  # weights to start from (a file, a checkpoint or a run); resuming needs no key


@dataclass(frozen=True)
class DataConfig:
    manifest: str = ""  # Parquet or CSV
    val_manifest: str = ""  # held-out samples for the validation loss; empty: none
    num_frames: int = 16
    frame_interval: int = 3  # take every n-th frame of the window
    height: int = 256
    width: int = 256
    flip: bool = True  # mirror half of the samples whose caption names no side
    num_workers: int = 2
    draws: int = 0  # 0: new window, crop and flip every epoch; k: cycle through k fixed draws a sample
    cache: str = ""  # folder for encoded latents and text (needs draws > 0); empty: encode every step
    max_bad_fraction: float = 0.1  # stop when more of the samples than this cannot be read


@dataclass(frozen=True)
class VaeConfig:
    path: str = "stabilityai/sd-vae-ft-ema"  # hub name or local folder
    micro_batch_size: int = 8  # frames encoded or decoded at once


@dataclass(frozen=True)
class TextConfig:
    path: str = "DeepFloyd/t5-v1_1-xxl"  # hub name or local folder
    micro_batch_size: int = 8  # captions encoded at once on a GPU; a CPU takes them one by one
    offload: bool = False  # on a GPU: keep the weights in host memory, stream them layer by layer


@dataclass(frozen=True)
class DiffusionConfig:
    objective: str = "iddpm"  # "iddpm" or "flow"
    logit_mean: float = 0.0  # flow: timesteps are sigmoid(normal(mean, std)) before the shift
    logit_std: float = 1.0
    shift: float = 0.0  # flow: > 0 fixes the shift towards noise; 0: by the number of tokens


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0  # linear decay to zero over the last n steps
    clip_norm: float = 1.0  # 0: the gradient norm is recorded, not clipped
    in_backward: bool = False  # update each weight as soon as its gradient is complete, and free that
    offload: bool = False  # on a GPU: keep Adam's moments and the weights' average in host memory, stream them


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 8  # samples a process reads at once
    accumulation: int = 1  # micro-batches a step
    dtype: str = "bf16"  # autocast dtype: "bf16" or "fp32"; weights and optimizer stay float32
    kernels: str = "auto"  # "eager" (torch's operations), "triton" (fused ones), "auto": triton on a GPU
    compile: str = "auto"  # torch.compile of the blocks: "on", "off", "auto": on a GPU, each layer whole on a process
    activation_checkpointing: str = "full"  # "none", "full" (blocks run again) or "selective" (but for what is dear)
    offload_activations: bool = False  # on a GPU: what checkpointing keeps of a block's input waits in host memory
    overlap: bool = True  # on a GPU: encode the next micro-batch while the model trains; takes memory for both at once
    max_bad_steps: int = 5  # stop after this many non-finite steps in a row


@dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.9999  # approached from below: min(decay, (1 + n) / (10 + n)) after n updates; 0: no averaging


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1000
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    background: bool = False  # write behind the training, which waits for a copy in host memory alone


@dataclass(frozen=True)
class ValidationConfig:
    every: int = 0  # 0: never
    timesteps: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of the noise range
    max_samples: int = 64


@dataclass(frozen=True)
class SampleConfig:
    every: int = 0  # 0: never during training
    prompts: tuple[str, ...] = ()
    sampler: str = "iddpm"  # "iddpm", "ddim", "dpm" for IDDPM models; flow models always use "euler"
    steps: int = 100
    guidance: float = 7.0
    fps: int = 8


@dataclass(frozen=True)
class ParallelConfig:
    engine: str = "torch"  # "torch" (DDP) or "colossalai"
    plugin: str = "ddp"  # of colossalai: "ddp", "zero1", "zero2", "gemini", "hybrid" (ZeRO-1 with tensor parallelism)
    tp_size: int = 1  # processes that share each weight matrix, by attention heads
    sp_size: int = 1  # processes that share each sample's frames
    timeout: int = 600  # seconds without progress after which a run of several processes is ended


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: STDiTConfig = field(default_factory=STDiTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `section.key=value` overrides, check types and ranges. Raises ConfigError (one line)."""
    return parse_config(read_toml(path), overrides, where=str(path))


def load_recorded(path: str | Path) -> Config:
    """Read the config.toml that a run has left, of this release or of an earlier one. Raises ConfigError."""
    table = read_toml(path)
    train = table.get("train", {})
    if isinstance(train.get(_CHECKPOINTING), bool):
        train[_CHECKPOINTING] = _WAS_CHECKPOINTING[train[_CHECKPOINTING]]
    return parse_config(table, where=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return a TOML file's content. Raises ConfigError (one line)."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"config {path}: cannot be read ({reason})") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config {path}: not valid TOML: {' '.join(str(error).split())}") from None


def parse_config(table: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """Build a Config from parsed TOML (`{section: {key: value}}`) and overrides. Raises ConfigError."""
    sections = typing.get_type_hints(Config)
    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for section, content in table.items():
        if section not in sections:
            raise ConfigError(f"{where}: unknown section [{section}]; did you mean {_closest_section(section)}?")
        if not isinstance(content, dict):
            raise ConfigError(f"{where}: [{section}] must be a section of keys, found {section} = {content!r}")
        for key, value in content.items():
            hint = _hint(section, key, where)
            values[section][key] = _convert(f"{section}.{key}", value, hint, where)
    for override in overrides:
        section, key, value = _parse_override(override)
        values[section][key] = value
    config = Config(**{name: cls(**values[name]) for name, cls in sections.items()})
    check_config(config)
    return config


def dump_toml(config: Config) -> str:
    """Every key of the resolved config as TOML; `load_config` of it gives an equal config."""
    import tomli_w

    return tomli_w.dumps(config_dict(config))


def config_dict(config: Config) -> dict[str, dict[str, Any]]:
    """`{section: {key: value}}` with lists for tuples, as TOML and JSON have them."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in section.items()}
        for name, section in dataclasses.asdict(config).items()
    }


def config_hash(config: Config) -> str:
    """Short digest of all values, the same in every process and Python version."""
    text = json.dumps(config_dict(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known_keys() -> Iterator[str]:
    for section, cls in typing.get_type_hints(Config).items():
        for item in dataclasses.fields(cls):
            yield f"{section}.{item.name}"


def _hint(section: str, key: str, where: str) -> Any:
    hints = typing.get_type_hints(typing.get_type_hints(Config)[section])
    if key not in hints:
        raise ConfigError(f"{where}: unknown key {section}.{key}; did you mean {_closest_key(section, key)}?")
    return hints[key]


def _closest_section(section: str) -> str:
    known = list(typing.get_type_hints(Config))
    if section in (name.split(".")[1] for name in _known_keys()):
        return _closest_key("", section)
    return "[" + difflib.get_close_matches(section, known, n=1, cutoff=0.0)[0] + "]"


def _closest_key(section: str, key: str) -> str:
    """The key itself in another section, else the most alike here, else the most alike anywhere."""
    known = list(_known_keys())
    same = [name for name in known if name.split(".")[1] == key]
    here = [name.split(".")[1] for name in known if name.split(".")[0] == section]
    alike = difflib.get_close_matches(key, here, n=1, cutoff=0.6)
    if alike:
        return f"{section}.{alike[0]}"
    if same:
        return same[0]
    return difflib.get_close_matches(f"{section}.{key}", known, n=1, cutoff=0.0)[0]


def _parse_override(override: str) -> tuple[str, str, Any]:
    name, equals, raw = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not equals or not dot:
        guess = _closest_key("", section)
        raise ConfigError(f"override {override!r}: expected section.key=value, such as {guess}=...")
    sections = typing.get_type_hints(Config)
    if section not in sections:
        guess = _closest_key(_closest_section(section).strip("[]"), key)
        raise ConfigError(f"override {override!r}: unknown key {section}.{key}; did you mean {guess}?")
    hint = _hint(section, key, f"override {override!r}")
    value = toml_value(raw.strip())
    # A path such as `run.dir=2024` is text whatever TOML would make of it.
    if hint is str and not isinstance(value, str):
        value = raw.strip()
    return section, key, _convert(f"{section}.{key}", value, hint, f"override {override!r}")


def toml_value(raw: str) -> Any:
    """A TOML value, or the text itself where it is none (`init.weights=runs/stage1` needs no quotes)."""
    try:
        parsed = tomllib.loads(f"value = {raw}")
    except tomllib.TOMLDecodeError:
        return raw
    return parsed["value"] if len(parsed) == 1 else raw


# What the key's values were called in earlier releases
_CHECKPOINTING = "activation_checkpointing"
_WAS_CHECKPOINTING = {True: "full", False: "none"}


def _convert(name: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: bool, int, float, str or a tuple of them; strict but for int -> float."""
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(name, value, typing.get_args(hint), where)
    exact = type(value) is hint
    if hint is float and type(value) is int:
        value, exact = float(value), True
    if hint is float and exact and not math.isfinite(value):
        raise ConfigError(f"{where}: {name} = {value}: expected a finite number")
    if not exact:
        expected = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}[hint]
        if name == f"train.{_CHECKPOINTING}" and isinstance(value, bool):
            expected = f'"{_WAS_CHECKPOINTING[value]}", or "selective"'
        shown = json.dumps(value) if isinstance(value, (str, bool)) else value
        raise ConfigError(f"{where}: {name} = {shown}: expected {expected}")
    return value


def _convert_tuple(name: str, value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: {name} = {json.dumps(value, default=str)}: expected a list, such as [...]")
    if kinds[-1] is not Ellipsis and len(value) != len(kinds):
        raise ConfigError(f"{where}: {name} = {list(value)}: expected a list of {len(kinds)} values")
    kinds = kinds if kinds[-1] is not Ellipsis else (kinds[0],) * len(value)
    return tuple(
        _convert(f"{name}[{index}]", item, kind, where)
        for index, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


_AT_LEAST_ONE = {
    "model": ("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length"),
    "data": ("num_frames", "frame_interval", "height", "width"),
    "vae": ("micro_batch_size",),
    "text": ("micro_batch_size",),
    "train": ("steps", "batch_size", "accumulation", "max_bad_steps"),
    "checkpoint": ("every",),
    "validation": ("max_samples",),
    "sample": ("steps", "fps"),
    "parallel": ("tp_size", "sp_size", "timeout"),
}
_AT_LEAST_ZERO = {
    "run": ("seed",),
    "model": ("base_size",),
    "data": ("num_workers", "draws"),
    "diffusion": ("shift",),
    "optim": ("weight_decay", "warmup_steps", "decay_steps", "clip_norm"),
    "checkpoint": ("keep",),
    "validation": ("every",),
    "sample": ("every",),
}
_ABOVE_ZERO = {
    "model": ("mlp_ratio", "space_scale", "time_scale"),
    "diffusion": ("logit_std",),
    "optim": ("lr", "eps"),
}
_CHOICES = {
    "diffusion.objective": ("iddpm", "flow"),
    "parallel.engine": ("torch", "colossalai"),
    "parallel.plugin": ("ddp", "zero1", "zero2", "gemini", "hybrid"),
    "train.dtype": ("bf16", "fp32"),
    "train.kernels": ("auto", "eager", "triton"),
    "train.compile": ("auto", "on", "off"),
    "train.activation_checkpointing": ACTIVATION_CHECKPOINTING,
    "sample.sampler": ("iddpm", "ddim", "dpm", "euler"),
}


def check_config(config: Config) -> None:
    """Raise ConfigError on a value that cannot work, whatever stage uses it."""

    def value(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{name} = {json.dumps(value(name))}: expected {expected}")

    for name in _names(_AT_LEAST_ONE):
        require(name, value(name) >= 1, "at least 1")
    for name in _names(_AT_LEAST_ZERO):
        require(name, value(name) >= 0, "0 or more")
    for name in _names(_ABOVE_ZERO):
        require(name, value(name) > 0, "more than 0")
    for name, choices in _CHOICES.items():
        require(name, value(name) in choices, "one of " + ", ".join(choices))
    require("ema.decay", 0 <= config.ema.decay < 1, "0 or more and less than 1")
    require("model.class_dropout_prob", 0 <= config.model.class_dropout_prob <= 1, "a share from 0 to 1")
    require("data.max_bad_fraction", 0 <= config.data.max_bad_fraction <= 1, "a share from 0 to 1")
    require("optim.betas", all(0 <= beta < 1 for beta in config.optim.betas), "two values from 0 to below 1")
    require("model.patch_size", min(config.model.patch_size) >= 1, "sizes of at least 1")
    shares = config.validation.timesteps
    require("validation.timesteps", bool(shares) and all(0 <= t <= 1 for t in shares), "shares from 0 to 1")
    _check_together(config, require)
    _check_memory(config, require)
    _check_parallel(config, require)


def _names(keys: dict[str, tuple[str, ...]]) -> Iterator[str]:
    return (f"{section}.{key}" for section in keys for key in keys[section])


def _check_together(config: Config, require: Any) -> None:
    model, data = config.model, config.data
    divides = model.hidden_size % model.num_heads == 0
    require("model.num_heads", divides, f"a divisor of model.hidden_size = {model.hidden_size}")
    require("model.hidden_size", model.hidden_size % 4 == 0, "a multiple of 4 (sine and cosine of rows and columns)")
    image, sizes = not model.temporal_attention, model.hidden_size % 3 == 0 or not model.size_conditioning
    require(
        "model.size_conditioning", image or not model.size_conditioning, "false in a video model (PixArt-1024-MS's)"
    )
    require("model.base_size", image or not model.base_size, "0 in a video model (PixArt's)")
    require("model.hidden_size", sizes, "a multiple of 3 with model.size_conditioning (height, width and their ratio)")
    require("data.draws", not data.cache or data.draws > 0, "more than 0 with data.cache (a cache holds fixed draws)")
    if config.diffusion.objective == "iddpm":
        require("model.pred_sigma", model.pred_sigma, "true with diffusion.objective = iddpm (it learns the variance)")
        sampler, steps = config.sample.sampler, config.sample.steps
        require("sample.sampler", sampler != "euler", "iddpm, ddim or dpm with diffusion.objective = iddpm")
        require("sample.steps", steps <= 1000 or sampler == "dpm", f"at most 1000 with sample.sampler = {sampler}")


def _check_memory(config: Config, require: Any) -> None:
    """An update within the backward pass comes before anything is known of the whole gradient."""
    optim, train, parallel = config.optim, config.train, config.parallel
    recomputes = train.activation_checkpointing != "none"
    require(
        "train.offload_activations",
        recomputes or not train.offload_activations,
        'false with train.activation_checkpointing = "none" (it moves what checkpointing keeps)',
    )
    for holds, expected in (
        (parallel.engine == "torch", "parallel.engine = torch"),
        (optim.clip_norm == 0, "optim.clip_norm = 0 (the norm is known too late)"),
        (train.accumulation == 1, "train.accumulation = 1"),
        (train.max_bad_steps == 1, "train.max_bad_steps = 1 (a non-finite step cannot be skipped)"),
        (not optim.offload, "optim.offload = false"),
    ):
        require("optim.in_backward", holds or not optim.in_backward, f"false, or {expected}")


def _check_parallel(config: Config, require: Any) -> None:
    """Combinations that no number of processes makes possible; the engine checks that number itself."""
    parallel, model = config.parallel, config.model
    plugin, tp_size, sp_size = parallel.plugin, parallel.tp_size, parallel.sp_size
    require("parallel.plugin", parallel.engine != "torch" or plugin == "ddp", "ddp with parallel.engine = torch")
    require("parallel.tp_size", tp_size == 1 or plugin == "hybrid", f"1 with parallel.plugin = {plugin} (hybrid cuts)")
    require("parallel.sp_size", sp_size == 1 or plugin != "gemini", "1 with parallel.plugin = gemini")
    bf16 = config.train.dtype == "bf16"
    require("train.dtype", bf16 or plugin != "gemini", "bf16 with parallel.plugin = gemini (its weights are)")
    if config.train.compile == "on":
        compiles = plugin != "gemini" and tp_size == sp_size == 1
        require("train.compile", compiles, "off or auto with plugin gemini, tp_size or sp_size (they alter the blocks)")
    require("parallel.sp_size", sp_size == 1 or model.temporal_attention, "1 without model.temporal_attention")
    if model.num_heads % tp_size:
        raise ConfigError(f"model.num_heads: {model.num_heads} heads are not divisible by tp_size={tp_size}")
    if int(model.hidden_size * model.mlp_ratio) % tp_size:
        width = int(model.hidden_size * model.mlp_ratio)
        raise ConfigError(f"model.mlp_ratio: the MLP's {width} channels are not divisible by tp_size={tp_size}")
    frames = -(-config.data.num_frames // model.patch_size[0])
    if frames < sp_size:
        raise ConfigError(f"parallel.sp_size = {sp_size}: there are only {frames} latent frames to share")
