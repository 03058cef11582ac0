"""What can be sampled: a run, a checkpoint, or published weights in any layout; and the memory that it takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from opensora_repro.config import Config, ConfigError, load_recorded
from opensora_repro.data.buckets import as_sampled, buckets_of
from opensora_repro.files import read_json
from opensora_repro.frozen.autoencoder import Autoencoder
from opensora_repro.frozen.text import (
    ConditionEncoder,
    T5Text,
)
from opensora_repro.models.config import ModelConfig
from opensora_repro.planning.fit import room_on
from opensora_repro.planning.report import size
from opensora_repro.planning.sampling import sampling_memory
from opensora_repro.run_folder import CONFIG_FILE, STATE_FILE, list_checkpoints, list_steps
from opensora_repro.weights.adapters import Adapter, has_adapter, read_adapter
from opensora_repro.weights.families import empty_model
from opensora_repro.weights.files import WeightsFile, open_weights, recorded_sha256
from opensora_repro.weights.published import describe

# Frames of the longest clips that releases were trained with, where their defaults are shorter
LONGEST = {"stdit": 64, "stdit2": 128, "stdit3": 408}


@dataclass(frozen=True)
class ModelSource:
    """Weights, the model that they make, and the defaults of their run or release."""

    path: Path
    weights: WeightsFile
    model: ModelConfig
    config: Config
    aesthetic: float | None = None  # the score that its release adds to prompts
    longest: int = 0  # frames of the longest clips that it was trained with
    trained_with_masks: bool = False
    adapters: tuple[Adapter, ...] = ()  # which join the weights


def find_source(
    path: Path, *, ema: bool = True, num_heads: int | None = None, family: str | None = None
) -> ModelSource:
    """Look at a run (its newest checkpoint), a checkpoint, or published weights. Raises ConfigError, WeightsError.

    A name of the catalog, which no file here has, means what the hub's cache holds of it.
    """
    checkpoint = _own_checkpoint(path)
    if checkpoint is not None:
        recorded_sha256(checkpoint / CONFIG_FILE)
        recorded = load_recorded(checkpoint / CONFIG_FILE)
        config = as_sampled(recorded)
        name = "ema.safetensors" if ema else "model.safetensors"
        longest = max(bucket.num_frames for bucket in buckets_of(recorded))
        masks = any(recorded.frame_masks.shares().values())
        adapters = (read_adapter(str(checkpoint), ema=ema),) if has_adapter(checkpoint) else ()
        weights = _adapted_weights(checkpoint, config) if adapters else open_weights(checkpoint / name)
        return ModelSource(
            checkpoint, weights, config.model, config, longest=longest, trained_with_masks=masks, adapters=adapters
        )
    file = open_weights(path, ema=ema)
    found = describe(file, num_heads=num_heads, family=family)
    own = file.config is not None  # a run's, whose captions need not end with scores
    architecture = getattr(found.model, "architecture", "")
    return ModelSource(
        path,
        file,
        found.model,
        found.config,
        None if own else found.family.aesthetic,
        max(found.config.data.num_frames, LONGEST.get(architecture, 0)),
        any(found.config.frame_masks.shares().values()) or (not own and architecture in ("stdit2", "stdit3")),
    )


def _adapted_weights(checkpoint: Path, config: Config) -> WeightsFile:
    """Those that a run with [lora] has trained its adapters for. Raises ConfigError where they are others by now."""
    found = open_weights(config.init.weights)
    recorded = read_json(checkpoint / STATE_FILE).get("identity", {}).get("init.weights", {})
    digests = {facts["sha256"] for facts in recorded.values()}
    if {recorded_sha256(file) for file in found.files} != digests:
        raise ConfigError(
            f"{config.init.weights} holds other weights than {checkpoint} was trained for (sha256 differs): restore "
            f"them, or sample others with its adapters: stages.sample WEIGHTS --lora {checkpoint}"
        )
    return found


def _own_checkpoint(path: Path) -> Path | None:
    """The folder itself if it is one of our checkpoints, or a run's newest; None for anything else."""
    if not path.is_dir():
        return None
    found = list_checkpoints(path) or list_steps(path)
    if found or (path / STATE_FILE).is_file():
        checkpoint = found[-1] if found else path
        if not (checkpoint / CONFIG_FILE).is_file():
            raise ConfigError(f"{checkpoint}: {CONFIG_FILE} is missing; this is not a whole checkpoint")
        return checkpoint
    if not any(path.iterdir()):
        raise ConfigError(f"{path}: no checkpoint in this run yet (looked for checkpoints/step-*)")
    return None


def weights_sha256(source: ModelSource) -> str:
    """Of the files that are read, wherever they lie. Raises WeightsError for a checkpoint's that has changed."""
    digests = [recorded_sha256(file) for file in source.weights.files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def check_memory(
    source: ModelSource,
    vae: Autoencoder,
    conditions: ConditionEncoder,
    device: torch.device,
    *,
    batch_size: int,
    sp_size: int = 1,
    world_size: int = 1,
    kept: float = 0.0,
) -> str:
    """A line on what a process needs and this machine has; `kept`: bytes of caches.

    Raises ConfigError where it does not have that at all.
    """
    data, stride = source.config.data, vae.spatial_stride
    whole = {side: getattr(data, side) // stride * stride for side in ("height", "width")}
    vae_cfg = replace(source.config.vae, path=str(vae.frozen.folder))
    cfg = replace(source.config, vae=vae_cfg, data=replace(data, **whole))
    if isinstance(conditions, T5Text):
        cfg = replace(cfg, text=replace(cfg.text, path=str(conditions.frozen.folder)))
    parameters = sum(parameter.numel() for parameter in empty_model(source.model).parameters())
    need = sampling_memory(
        cfg, source.model, parameters, batch_size=batch_size, device_type=device.type,
        reads_t5=isinstance(conditions, T5Text), sp_size=sp_size, world_size=world_size,
    )  # fmt: skip
    need = replace(need, denoising=need.denoising + kept)
    room = room_on(device)
    peak = room.processes * need.peak
    parts = f"weights {size(need.weights)}, autoencoder and text encoder {size(need.frozen)}, "
    parts += f"denoising {size(need.denoising)} or decoding {size(need.decoding)}"
    if peak > room.limit:
        data = cfg.data
        raise ConfigError(
            f"{batch_size} samples at once of {data.num_frames} frames of {data.height}x{data.width} need about "
            f"{size(peak)} ({parts}), {room.place} has {size(room.limit)}: "
            "lower --batch-size, --num-frames, --height or --width, or decode in tiles (--vae-tile 256)"
        )
    warning = "" if peak <= room.free else f", and only {size(room.free)} are {room.state} now"
    return f"about {size(peak)} of {room.place}'s {size(room.limit)}{warning} ({parts})"
